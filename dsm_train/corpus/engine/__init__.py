"""Steps over shards of pages that resume after a kill."""
