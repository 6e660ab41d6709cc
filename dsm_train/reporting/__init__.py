"""What a run leaves to look at: metrics, samples, reports, curves."""
