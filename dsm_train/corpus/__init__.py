"""Corpus of mathematics from Common Crawl: extract, deduplicate, rank in rounds, decontaminate, tokenise."""
