"""Output similarity: do similar outputs go with similar representations? (paper, section 4.3, Tables 1 and 4)."""
