"""The same optimizer step in two layouts, compared."""
