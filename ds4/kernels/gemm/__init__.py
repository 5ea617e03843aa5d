"""Projections of a prompt's activations by packed weights."""
