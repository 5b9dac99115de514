"""T5 in Flax NNX."""
