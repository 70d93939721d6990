"""Retrieval: do the most similar images show the same objects? (paper, section 4.2, Tables 2 and 3)."""
