"""Numerical operations, with platform-specific implementations where they are faster."""
