"""Hugging Face PEFT's adapters."""
