"""The corpus on a synthetic web with known truth."""
