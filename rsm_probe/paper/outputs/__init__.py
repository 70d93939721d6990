"""Output similarity: are images alike inside that a classifier treats alike? (paper, section 4.3, Tables 1 and 4)."""
