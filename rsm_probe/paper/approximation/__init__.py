"""Approximation quality: the share of the optimum that a matching reaches, and its time (paper, 4.4 and Table 5)."""
