"""Benchmarks: what the ops cost beside what else computes the same, in one process."""
