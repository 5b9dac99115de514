"""Launches of T5X and of google-research/prompt-tuning, read from their gin files as data."""
