"""Rounds of ranking pages with fastText and annotating domains."""
