"""Evaluation sets: annotations, protocols, and their downloads."""
