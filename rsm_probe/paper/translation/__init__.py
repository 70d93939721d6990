"""Translation sensitivity: are overlapping crops of an image similar? (paper, section 4.1, Figures 2 and 7)."""
