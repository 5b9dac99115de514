"""Generating, scoring and predicting with trained prompts, alone and as ensembles."""
