"""Tokenised examples, cached, bucketed by length and batched."""
