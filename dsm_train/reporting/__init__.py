"""Records of a run: its folder, metrics, samples, report, learning curve."""
