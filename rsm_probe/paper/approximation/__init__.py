"""Approximation quality: what share of the optimum a matching reaches, and how fast (paper, section 4.4, Table 5)."""
