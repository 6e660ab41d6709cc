"""HTML to text that keeps mathematics as LaTeX."""
