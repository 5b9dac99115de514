"""Hugging Face checkpoints of models."""
