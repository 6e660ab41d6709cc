"""One file per stage of the command line."""
