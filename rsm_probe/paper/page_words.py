"""What the pages of experiments say of semantic RSMs and baselines: no more than the intervals support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.semantic_differences import BETTER, WORSE, verdict
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.tables import Row, kernel_title, with_interval

SEMANTIC_BETTER, BASELINE_BETTER = "the semantic RSM is better", "the baseline is better"


def rule_words(name: str) -> str:
    """What a matching or baseline is called in sentences and legends."""
    words = {"identity": "equal locations", "optimal": "semantic (optimal)"}
    return words.get(name, matching_title(name).replace("PI", "semantic"))


def rule_titles(rows: Sequence[Row], key: str = "matching") -> dict[str, str]:
    """Name of each rule in the rows -> its title; the semantic RSMs and the identity come first."""
    names = distinct(rows, key)
    return {name: rule_words(name) for name in sorted(names, key=lambda name: name not in ("optimal", "identity"))}


def verdict_words(row: Row, key: str, lower_is_better: bool = False) -> str:
    """Say who is better by a difference of the semantic RSM; "" if its interval contains 0 or is unknown."""
    return {BETTER: SEMANTIC_BETTER, WORSE: BASELINE_BETTER, "": ""}[verdict(row, key, lower_is_better)]


def differences(table: Sequence[Row], key: str, lower_is_better: bool = False) -> list[Row]:
    """The rows of baselines that have a difference from the semantic RSM, with who is better under `verdict`."""
    return [
        {**row, "verdict": verdict_words(row, key, lower_is_better)}
        for row in table
        if row["matching"] != row.get("semantic", "") and not math.isnan(row.get(key, math.nan))
    ]


def semantic_answer(
    table: Sequence[Row],
    values: tuple[str, str, str],
    key: str,
    what: str,
    level: float,
    *,
    lower_is_better: bool = False,
    words: tuple[str, str] = ("higher", "lower"),
    kernel: str = "cosine",
) -> str:
    """Answer in two sentences whether the semantic RSM is better than equal locations and other baselines.

    Args:
        table: rows of a result.
        values: keys of a value and of the lower and upper end of its interval.
        key: key of the difference between the semantic RSM and the rule of a row.
        what: name of the value.
        level: level of the intervals.
        lower_is_better: whether lower values are better.
        words: what a better and what a worse value is called.
        kernel: kernel of the example, if the table has it.
    """
    rows = [row for row in table if not row.get("untrained")] or list(table)
    trained = "an untrained" if rows[0].get("untrained") else "a trained"
    compared = differences(rows, key, lower_is_better)
    if not compared:
        return f"{_range(rows, values, what)} No semantic RSM is compared with a baseline in this run."
    names = distinct(compared, "matching")
    first = "identity" if "identity" in names else names[0]
    better, undecided, worse = _counts(compared, first)
    higher, lower = words
    sentence = (
        f"By the {level:.0%} intervals, {what} of the semantic RSM is {higher} than that of {rule_words(first)} in "
        f"{better} of {better + worse + undecided} cells (a cell is a layer of {trained} model under one "
        f"kernel{_further(rows)}), {lower} in {worse}, and undecided in {undecided}"
    )
    if others := [name for name in names if name != first]:
        listed = ", ".join(f"{rule_words(name)} {'/'.join(map(str, _counts(compared, name)))}" for name in others)
        sentence += f"; {higher}/undecided/{lower} against the other baselines: {listed}"
    return f"{sentence}. {_example(rows, compared, first, values, key, what, kernel)}"


# Study -> key of the difference "semantic RSM minus rule" in its rows, and whether lower values are better.
COMPARED = {
    "retrieval": ("difference", False),
    "translation": ("difference", False),
    "outputs": ("pearson_difference", True),
    "factors": ("difference", False),
}


def joint_answer(tables: Mapping[str, tuple[str, Sequence[Row]]]) -> str:
    """Answer in how many cells of several studies the semantic RSM is better than equal locations and average pooling.

    Args:
        tables: name of a study -> its kind and the rows of its result; kinds without such a comparison do not count.
    """
    counted: dict[str, dict[str, str]] = {"identity": {}, "pooled": {}}
    for name, (kind, table) in tables.items():
        if kind in COMPARED:
            rows = differences([row for row in table if not row.get("untrained")], *COMPARED[kind])
            for rule, of_rule in counted.items():
                if any(row["matching"] == rule for row in rows):
                    of_rule[name] = "/".join(map(str, _counts(rows, rule)))
    if not counted["identity"]:
        return (
            "No study compares a semantic RSM of a trained model with equal locations. Each answers for itself below."
        )
    equal, pooled = (", ".join(f"{name} {count}" for name, count in of_rule.items()) for of_rule in counted.values())
    beside = f" The same for average pooling: {pooled}." if pooled else ""
    return (
        "Cells (layers of trained models under one kernel) in which the semantic RSM is better than equal locations / "
        f"undecided / worse, by their intervals: {equal}.{beside} Cells of a study share images, so they are not "
        "independent evidence; the values and the other baselines stand below."
    )


def _counts(compared: Sequence[Row], name: str) -> tuple[int, int, int]:
    """In how many cells the semantic RSM is better than a baseline, neither, and worse."""
    said = [row["verdict"] for row in compared if row["matching"] == name]
    return said.count(SEMANTIC_BETTER), said.count(""), said.count(BASELINE_BETTER)


def _further(rows: Sequence[Row]) -> str:
    return " and a size of the database" if "database" in rows[0] and len(distinct(rows, "database")) > 1 else ""


def _example(
    rows: Sequence[Row],
    compared: Sequence[Row],
    name: str,
    values: tuple[str, str, str],
    key: str,
    what: str,
    kernel: str,
) -> str:
    """The numbers of one cell that does not depend on the result: the last layer of the first model."""
    mine = [row for row in compared if row["matching"] == name and row["model"] == compared[0]["model"]]
    mine = [row for row in mine if row["kernel"] == kernel] or mine
    last = mine[-1]
    where = {k: last[k] for k in ("model", "layer", "kernel", "locations", "database") if k in last}
    semantic = next(
        row for row in rows if row["matching"] == last["semantic"] and all(row[k] == where[k] for k in where)
    )
    better = "semantic RSM" if last["verdict"] == SEMANTIC_BETTER else "baseline"
    said = f"by which the {better} is the better of the two" if last["verdict"] else "which is undecided"
    return (
        f"In the last layer of the first model ({last['layer']} of {last['model']}, {kernel_title(last['kernel'])}), "
        f"{what} is {with_interval(semantic, *values)} for the semantic RSM and {with_interval(last, *values)} for "
        f"{rule_words(name)}: a difference of {with_interval(last, key, f'{key}_low', f'{key}_high')}, "
        f"{said}."
    )


def _range(rows: Sequence[Row], values: tuple[str, str, str], what: str) -> str:
    known = [row for row in rows if not math.isnan(row[values[0]])]
    if not known:
        return f"{what} is undefined in all layers."
    ends = [choose(known, key=lambda row: row[values[0]]) for choose in (min, max)]
    low, high = (
        f"{with_interval(row, *values)} ({rule_words(row['matching'])}, {row['layer']} of {row['model']})"
        for row in ends
    )
    return f"{what} lies between {low} and {high}."


def verdict_counts(compared: Sequence[Row]) -> list[list[Any]]:
    """Count cells by measure, training, baseline and kernel.

    Args:
        compared: rows as `differences` makes them, with a `measure`.

    Returns:
        Measure, networks, baseline, kernel, cells, and in how many the semantic RSM is better, worse, and neither.
    """
    groups: dict[tuple[str, bool, str, str], list[str]] = {}
    for row in compared:
        key = row["measure"], bool(row.get("untrained")), row["matching"], row["kernel"]
        groups.setdefault(key, []).append(row["verdict"])
    return [
        [
            measure, "untrained" if untrained else "trained", rule_words(name), kernel_title(kernel), len(said),
            said.count(SEMANTIC_BETTER), said.count(BASELINE_BETTER), said.count(""),
        ]
        for (measure, untrained, name, kernel), said in groups.items()
    ]  # fmt: skip
