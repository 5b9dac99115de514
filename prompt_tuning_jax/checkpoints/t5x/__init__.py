"""T5X checkpoints of models and prompts."""
