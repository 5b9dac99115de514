"""Ablations: many runs that differ in one or two settings, with their figure and table."""
