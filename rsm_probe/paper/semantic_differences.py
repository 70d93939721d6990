"""The part of a report that compares the semantic RSM with every baseline: differences, and counts of clear ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.paper.similarity_rules import CLASS_TOKEN, matching_title
from rsm_probe.runs.tables import Row, escaped, kernel_title, markdown, with_interval

BETTER, WORSE = "▲", "▼"


def semantic_differences(
    table: Sequence[Row],
    measures: Mapping[str, tuple[str, bool]],
    settings: Mapping[str, Any],
    keys: Sequence[str] = (),
) -> str:
    """Write how the semantic RSM differs from every other rule, and count the cells in which it clearly does.

    Args:
        table: rows of a result, with a difference (semantic minus rule) and its interval for each measure.
        measures: key of a difference -> what is compared, and whether lower values are better.
        settings: settings of the study.
        keys: further keys that distinguish rows, such as the size of a database.

    Returns:
        Markdown; "" if the study has no semantic RSM or nothing to compare it with.
    """
    semantic = table[0].get("semantic", "")
    rows = [row for row in table if row["matching"] != semantic]
    notes = _notes(table, settings)
    if not semantic or not rows:
        return notes
    title = matching_title(semantic)
    parts = [
        f"## The semantic RSM against each baseline\n\nDifferences are *{title}* minus the baseline, with the "
        f"{settings['level']:.0%} interval from the same draws for both. {BETTER}: the interval excludes 0, and "
        f"*{title}* is better; {WORSE}: the interval excludes 0, and the baseline is better; no mark: undecided. "
        f"Untrained models stand below the trained ones of the same layer. By chance alone, about "
        f"{1 - settings['level']:.0%} of cells without a difference have a mark.\n"
    ]
    for key, (what, lower_is_better) in measures.items():
        parts += [f"{what}:\n", _differences(rows, key, lower_is_better, keys)]
    first, (what, lower_is_better) = next(iter(measures.items()))
    parts += [_conclusion(*group, what, title) for group in _verdicts(rows, first, lower_is_better).items()]
    parts += ["\nThe same by kernel:\n", _counts(rows, measures)]
    return "\n".join([*parts, *([notes] if notes else [])])


def verdict(row: Row, key: str, lower_is_better: bool = False) -> str:
    """Say who is better by a difference of the semantic RSM: the semantic RSM (▲), the rule of the row (▼), or "".

    Args:
        row: a row with the difference, `<key>_low` and `<key>_high`.
        key: key of the difference.
        lower_is_better: whether lower values of what is compared are better.
    """
    above, below = row[f"{key}_low"] > 0, row[f"{key}_high"] < 0
    if lower_is_better:
        above, below = below, above
    return BETTER if above else WORSE if below else ""


def _differences(rows: Sequence[Row], key: str, lower_is_better: bool, keys: Sequence[str]) -> str:
    """A table with models, layers and kernels in rows and baselines in columns."""
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    # Sorting is stable: models of one network come together, in the order of the study.
    order = {name: number for number, name in enumerate(dict.fromkeys(row["network"] for row in rows))}
    layers = {name: number for number, name in enumerate(dict.fromkeys(row["layer"] for row in rows))}
    kernels = {name: number for number, name in enumerate(dict.fromkeys(row["kernel"] for row in rows))}

    def beside(row: Row) -> tuple[Any, ...]:
        where = order[row["network"]], layers[row["layer"]], row["locations"]
        return (*where, *(row[name] for name in keys), kernels[row["kernel"]], row["untrained"])

    for row in sorted(rows, key=beside):
        where = row["model"], row["layer"], row["locations"], *(row[name] for name in keys), kernel_title(row["kernel"])
        cell = with_interval(row, key, f"{key}_low", f"{key}_high")
        lines.setdefault(where, {})[row["matching"]] = f"{cell} {verdict(row, key, lower_is_better)}".strip()
    names = list(dict.fromkeys(row["matching"] for row in rows))
    cells = [[*where, *(line.get(name, "-") for name in names)] for where, line in lines.items()]
    return markdown(["model", "layer", "S", *keys, "kernel", *map(_baseline, names)], cells)


def _verdicts(
    rows: Sequence[Row], key: str, lower_is_better: bool, keys: Sequence[str] = ()
) -> dict[tuple[Any, ...], list[str]]:
    """The verdicts of all cells by training and baseline, and by further keys; see `verdict`."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["untrained"]):
        if not math.isnan(row[key]):
            group = row["untrained"], row["matching"], *(row[name] for name in keys)
            groups.setdefault(group, []).append(verdict(row, key, lower_is_better))
    return groups


def _conclusion(group: tuple[Any, ...], verdicts: Sequence[str], what: str, title: str) -> str:
    """Say in how many cells the semantic RSM is better or worse than a baseline."""
    untrained, name = group
    better, worse, undecided = (verdicts.count(kind) for kind in (BETTER, WORSE, ""))
    return (
        f"- {_networks(untrained)}, {what}: *{title}* is better than *{_baseline(name)}* in {better} of "
        f"{len(verdicts)} cells, worse in {worse}, and undecided in {undecided}."
    )


def _counts(rows: Sequence[Row], measures: Mapping[str, tuple[str, bool]]) -> str:
    """A table that counts cells by measure, training, baseline and kernel."""
    cells = []
    for key, (what, lower_is_better) in measures.items():
        for (untrained, name, kernel), verdicts in _verdicts(rows, key, lower_is_better, ["kernel"]).items():
            counts = [verdicts.count(kind) for kind in (BETTER, WORSE, "")]
            names = what, _networks(untrained), _baseline(name), kernel_title(kernel)
            cells.append([*names, len(verdicts), *counts])
    head = "measure", "networks", "baseline", "kernel", "cells", f"semantic better {BETTER}", f"baseline better {WORSE}"
    return markdown([*head, "undecided"], cells)


def _networks(untrained: bool) -> str:
    return "Untrained" if untrained else "Trained"


def _baseline(name: str) -> str:
    return "equal locations" if name == "identity" else matching_title(name)


def _notes(table: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """What readers must know of baselines that do not suit every layer."""
    notes = []
    if "gem" in settings["matchings"]:
        notes.append(
            f"*{matching_title('gem')}* raises values below 1e-6 to 1e-6 first, so that negative values do not count: "
            f"of layers that end without a ReLU (linear bottlenecks, transformer blocks), it reads only the positive "
            f"part.\n"
        )
    if CLASS_TOKEN in settings["matchings"]:
        layers: dict[str, dict[str, bool]] = {}
        for row in table:
            of_model = layers.setdefault(row["model"], {})
            of_model[row["layer"]] = of_model.get(row["layer"], False) or row["matching"] == CLASS_TOKEN
        without = {model: [name for name, there in known.items() if not there] for model, known in layers.items()}
        lacking = [
            f"{escaped(model)} ({'all layers' if len(names) == len(layers[model]) else ', '.join(map(escaped, names))})"
            for model, names in without.items()
            if names
        ]
        where = f" It is left out where a layer has none: {'; '.join(lacking)}." if lacking else ""
        notes.append(f"*{matching_title(CLASS_TOKEN)}*: the first token beside the locations.{where}\n")
    return "\n".join(notes)
