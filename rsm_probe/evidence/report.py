"""Reports of the evidence: tables per factor, and sentences that say no more than their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.evidence.depth import depth_section
from rsm_probe.evidence.differences import DIFFERENCE, SEMANTIC_RULE, Verdicts, apart, baselines, gains, varies, verdict
from rsm_probe.evidence.words import listed_in_words, rule_title, what_of
from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_words import COMPARED
from rsm_probe.runs.tables import Row, TableResult, accuracy_line, escaped, kernel_title, markdown, with_interval
from rsm_probe.streaming.result import SweepResult

# Study -> what is compared.
MEANS = {
    "retrieval": "objects of the nearest image",
    "translation": "overlapping crops against others, AUROC",
    "outputs": "correlation with the divergence of outputs, Pearson",
    "factors": "objects of the nearest image, at all levels",
}
_SAID = {"win": "above 0", "tie": "contains 0", "loss": "below 0"}


def factors_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """Write a summary over all factors, and for each factor a table and its sentences."""
    base = result.settings["base"]
    what = what_of(base)
    parts = [
        "# Where semantic RSMs win, one factor at a time\n",
        f"Retrieval of images of the set *{escaped(base['images']['source'])}* by their objects: {base['queries']} "
        f"queries, {base['database_sizes'][0]} images, seed {base['seed']}, images of seed {base['images']['seed']}. "
        f"*{what}*: as in the report of retrieval. Each factor changes alone; all else is the base setting. A "
        f"difference is the {what} of the semantic RSM (permutation-invariant) minus that of a baseline, on the same "
        f"queries, with the {base['level']:.0%} interval over queries (whole scenes, where frames share one).\n",
        accuracy_line(accuracies),
        "## Summary\n",
        "Differences whose interval lies above 0 / contains 0 / lies below 0, over all levels, layers and kernels. The "
        "cells of a factor share images or models, so they are not independent evidence, and the base setting counts "
        "once in each factor.\n",
        summary_table(result.table, ["factor"]),
    ]
    for factor in distinct(result.table, "factor"):
        rows = result.select(factor=factor)
        parts += [f"## {escaped(factor)}\n", _table(rows), *_sentences(rows)]
    return "\n".join(parts)


def summary_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Format wins, ties and losses of the semantic RSM, with some keys and models in rows and baselines in columns."""
    names = baselines(rows)
    lines = _by(rows, [*keys, "model"])
    cells = [
        [*line, *(str(Verdicts.of(row for row in mine if row["matching"] == name)) for name in names)]
        for line, mine in lines.items()
    ]
    return markdown([*keys, "model", *(f"against {rule_title(name)}" for name in names)], cells)


def _table(rows: Sequence[Row]) -> str:
    """Format the score of the semantic RSM and its differences, with models, layers, kernels and levels in rows."""
    names, cells = baselines(rows), []
    # The levels of a model, layer and kernel stand below each other.
    together = [row for part in _by(rows, ["model", "layer", "kernel"]).values() for row in part]
    for line in _by(together, ["model", "layer", "locations", "kernel", "level"]).values():
        rules = {row["matching"]: row for row in line}
        where = line[0]
        cells.append(
            [
                where["level"], where["model"], where["layer"], where["locations"], kernel_title(where["kernel"]),
                with_interval(rules[SEMANTIC_RULE], "score"),
                *(with_interval(rules[name], *DIFFERENCE) if name in rules else "-" for name in names),
            ]
        )  # fmt: skip
    heading = ["level", "model", "layer", "S", "kernel", rule_title(SEMANTIC_RULE)]
    return markdown([*heading, *(f"minus {rule_title(name)}" for name in names)], cells)


def _sentences(rows: Sequence[Row]) -> list[str]:
    """A list item per baseline, for trained and for untrained models."""
    lines = []
    for name in baselines(rows):
        for untrained in (False, True):
            mine = [r for r in rows if (r["matching"], r["untrained"]) == (name, untrained) and verdict(r)]
            if mine:
                lines.append(f"- {_sentence(mine, name, untrained)}")
    return [*lines, ""]


def _sentence(rows: Sequence[Row], name: str, untrained: bool) -> str:
    """Say of a baseline how many differences lie clear of 0, what they are, and whether levels differ."""
    counts, kernels = Verdicts.of(rows), distinct(rows, "kernel")
    text = [
        f"Against *{rule_title(name)}*, {'untrained' if untrained else 'trained'}: above 0 in {counts.wins} of "
        f"{counts.total} cells, below 0 in {counts.losses}; the interval contains 0 in {counts.ties}."
    ]
    # A line over the levels has one layer and kernel, unless they are what changes.
    constant = [key for key in ("layer", "kernel") if not varies(rows, key)]
    lines = _by(rows, ["model", *constant])
    for line in lines.values():
        if not untrained and (line[0]["kernel"] == kernels[0] or "kernel" not in constant):
            where = [escaped(line[0]["model"]), *([escaped(line[0]["layer"])] if "layer" in constant else [])]
            where += [kernel_title(kernels[0])] if "kernel" in constant else []
            values = [
                f"{with_interval(r, *DIFFERENCE, digits=2)} at {escaped(r['level'])} ({_SAID[verdict(r)]})"
                for r in line
            ]
            text.append(f"{', '.join(where)}: {listed_in_words(values)}.")
    first, last = (escaped(distinct(rows, "level")[k]) for k in (0, -1))
    changes = [apart(line[0], line[-1]) for line in lines.values() if len(line) > 1]
    larger, smaller = changes.count("larger"), changes.count("smaller")
    if larger or smaller:
        text.append(
            f"Of {len(changes)} lines from {first} to {last}, the intervals at the ends do not overlap in "
            f"{larger + smaller}: the difference is larger at {last} in {larger} and smaller in {smaller}."
        )
    elif changes:
        text.append(f"The intervals at {first} and {last} overlap in all {len(changes)} lines: no trend is shown.")
    return " ".join(text)


def _by(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by the values of some keys, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def gains_of(kind: str, table: Sequence[Row]) -> list[Row]:
    """The differences between the semantic RSM and the rules of a study of a kind in `COMPARED`; see `gains`."""
    key, lower_is_better = COMPARED[kind]
    return gains(table, key, -1 if lower_is_better else 1)


def evidence_report(
    results: Mapping[str, Any],
    kinds: Mapping[str, str],
    sources: Mapping[str, str],
    seeds: Mapping[str, tuple[int, int]],
    versions: Mapping[str, Any],
) -> str:
    """Summarise all studies by baseline, and join their reports.

    Args:
        results: results of the studies by name.
        kinds: kind of each study, such as "retrieval".
        sources: models -> where they come from.
        seeds: studies -> their seeds, and those of their images.
        versions: what `provenance` returns.
    """
    named = ", ".join(f"{package} {version}" for package, version in versions["versions"].items())
    parts = [
        "# Evidence: semantic RSMs against baselines\n",
        f"Models: {'; '.join(f'{escaped(name)} ({escaped(source)})' for name, source in sources.items())}.\n"
        if sources
        else "",
        f"Seeds of the studies and of their images: "
        f"{'; '.join(f'{escaped(name)} {own}, {images}' for name, (own, images) in seeds.items())}.\n",
        f"{versions['finished'][:10]}, Python {versions['python']}, {versions['machine']}; {named}.\n",
        "## All studies\n",
        "How often the semantic RSM is better than each baseline: differences whose interval lies "
        "above 0 / contains 0 / lies below 0, over layers and kernels. Each report below has the values. Cells of one "
        "study share images, so they are not independent evidence.\n",
    ]
    rows = []
    for name, kind in kinds.items():
        if kind in COMPARED:
            compared = gains_of(kind, results[name].table)
            rows += [{**row, "study": name, "compared": MEANS[kind]} for row in compared]
    if rows:
        parts.append(summary_table(rows, ["study", "compared"]))
    sweeps = {name: result for name, result in results.items() if isinstance(result, SweepResult)}
    if sweeps:
        parts += ["## By depth\n", *depth_section(sweeps)]
    for name in kinds:
        file = getattr(results[name], "folder", None) and results[name].folder / "report.md"
        if file is not None and file.exists():
            parts.append(file.read_text(encoding="utf-8"))
    return "\n".join(part for part in parts if part)
