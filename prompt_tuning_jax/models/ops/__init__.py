"""Numerical operations, one implementation per platform where it pays."""
