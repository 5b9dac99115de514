"""Tokenized examples, cached, bucketed by length and batched."""
