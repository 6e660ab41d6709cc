"""Causal attention over packed sequences that may share prompts."""
