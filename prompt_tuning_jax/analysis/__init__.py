"""Compares prompts with each other, and carries them from one model to another."""
