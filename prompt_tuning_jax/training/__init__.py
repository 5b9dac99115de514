"""Training: a pure step, the loop around it, evaluation, and what a run writes down."""
