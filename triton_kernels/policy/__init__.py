"""Advantages, KL and the clipped objective on log-probabilities."""
