"""Tasks, generated or read from files, and tokenizers."""
