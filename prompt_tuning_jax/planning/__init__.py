"""Estimates the cost of a step on absent chips, from the program compiled for them."""
