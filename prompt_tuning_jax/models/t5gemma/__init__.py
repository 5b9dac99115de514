"""T5Gemma and T5Gemma 2 in Flax NNX."""
