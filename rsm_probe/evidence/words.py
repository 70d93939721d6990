"""How reports and figures of the evidence call rules and scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsm_probe.evidence.differences import SEMANTIC_RULE
from rsm_probe.paper.similarity_rules import matching_title

# In sentences, rules are called by what they compare; the tables of the paper have shorter names.
_TITLES = {SEMANTIC_RULE: "semantic RSM", "identity": "equal locations"}


def rule_title(rule: str) -> str:
    """What a rule is called in sentences, such as "equal locations"; others keep their name."""
    return _TITLES.get(rule, matching_title(rule))


def what_of(retrieval: Mapping[str, Any]) -> str:
    """The name of the score of a retrieval, from its settings."""
    return {"f1": "F1@1", "iou": "IoU@1"}[retrieval["score"]]


def listed_in_words(names: list[str]) -> str:
    """Join names as in a sentence: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
