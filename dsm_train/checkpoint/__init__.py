"""Checkpoints of a run: when they are written, where the run stood, and the one to continue from."""
