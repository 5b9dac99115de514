"""Training: a pure step, the loop around it, evaluation, and the files that a run writes."""
