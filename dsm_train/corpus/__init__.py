"""From Common Crawl to training tokens: extract, deduplicate, rank in rounds, decontaminate, tokenise."""
