"""Prompt tuning for T5 in JAX: frozen models, trained prompts."""
