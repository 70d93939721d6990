"""How the figures and the page of a study of brains call things."""

from __future__ import annotations

from rsm_probe.paper.page_words import rule_words
from rsm_probe.runs.tables import Row

# Measure -> what its values are.
_MEASURES = {
    "rsa-spearman": "Spearman correlation with RDMs",
    "rsa-pearson": "Pearson correlation with RDMs",
    "rsa-kendall": "Kendall correlation (tau-a) with RDMs",
    "rsa-cosine": "cosine with RDMs",
    "cka": "CKA with RDMs (unbiased)",
    "cka-biased": "CKA with RDMs (biased)",
    "distance-correlation": "distance correlation with RDMs",
}
# The two notions of similarity.
_NOTIONS = {"identity": "spatio-semantic", "optimal": "semantic"}


def measure_title(name: str) -> str:
    """What the values of a measure are."""
    return _MEASURES.get(name, f"{name} with RDMs")


def notion_words(matching: str) -> str:
    """The notion of similarity of a matching, such as "semantic"."""
    return _NOTIONS.get(matching) or rule_words(matching)


def rsm_words(row: Row, side: str = "") -> str:
    """An RSM in a sentence: the notion, layer, model and kernel of a row, or of one side of a difference."""
    matching, layer, model, kernel = (row[f"{key}{side}"] for key in ("matching", "layer", "model", "kernel"))
    return f"{notion_words(matching)} RSM of {layer_words(layer)} of {model} ({kernel} kernel)"


def layer_words(layer: str) -> str:
    """A layer in a sentence; those of a sequence of modules are called by numbers."""
    return layer if any(letter.isalpha() for letter in layer) else f"layer {layer}"


def counted_subjects(count: int, dimension: str) -> str:
    """A number of subjects, sessions or regions."""
    return f"{count:,} {dimension}{'s' if count != 1 else ''}"
