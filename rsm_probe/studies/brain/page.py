"""The page of a study of brains: which layer and which notion of similarity explains the RDMs best, if any does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_parts import centred_text, counted
from rsm_probe.report.default import plots
from rsm_probe.report.page import Chart, Group, Page, Part, Section, Table
from rsm_probe.runs.tables import Row, kernel_title, with_interval
from rsm_probe.studies.brain.figures import brain_figures
from rsm_probe.studies.brain.result import NOTIONS_COMPARED, WITH_BEST, BrainResult, correction_of
from rsm_probe.studies.brain.words import counted_subjects, measure_title, notion_words, rsm_words

# RSMs that the answer names; further ones are counted.
_MOST_NAMED = 3
_DIFFERENCE = ("difference", "low", "high")
_DRAWN = {"both": "images and {dimension}s", "images": "images", "subjects": "{dimension}s"}
_CORRECTIONS = {
    "fdr": "corrected for their number by the false discovery rate (Benjamini & Hochberg 1995)",
    "holm": "corrected for their number by Holm's method",
    None: "not corrected for their number",
}


def brain_page(result: BrainResult, settings: Mapping[str, Any]) -> Page:
    """Lay out the page of a finished run, without command and with what only the result knows as provenance.

    Args:
        result: the result.
        settings: settings of the study.
    """
    facts, table, evaluation = result.facts, result.table, result.evaluation
    subjects = counted_subjects(evaluation.sizes["subject"], facts["dimension"])
    whose = facts["subjects"] or f"RDMs ({facts['dissimilarity']}) of {subjects}"
    rules = [notion_words(name) for name in distinct(table, "matching")]
    notes = [
        *(["The subjects are simulated: no brain was measured."] if facts["subjects"] else []),
        *_equal_rsms(result),
    ]
    return Page(
        "Models and brains",
        "Which layer, and which notion of similarity, explains the RDMs best?",
        f"{whose}; {evaluation.attrs['images']:,} images of the set {settings['images']['source']}; "
        f"{counted(distinct(table, 'model'), 'model')}; {counted(distinct(table, 'layer'), 'layer')}; "
        f"{counted(rules, 'notion')}; "
        f"{counted([kernel_title(kernel) for kernel in distinct(table, 'kernel')], 'kernel')}; "
        f"{centred_text(settings)}.",
        answer(result),
        [_explained(result), _notions(result), _with_best(result), _by_subject(result), _method(result)],
        command="",
        provenance={"Images": facts["joined"], **({"Subjects": facts["subjects"]} if facts["subjects"] else {})},
        notes=notes,
    )


def _equal_rsms(result: BrainResult) -> list[str]:
    """Name layers of a model that have the same RSM: they cannot be told apart, and count more than once."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row, values in zip(result.table, result.evaluation["value"].values, strict=True):
        key = row["model"], row["matching"], row["kernel"], tuple(values.round(12))
        if not math.isnan(row["mean"]):
            groups.setdefault(key, []).append(row["layer"])
    same = dict.fromkeys((model, tuple(layers)) for (model, *_), layers in groups.items() if len(layers) > 1)
    named = "; ".join(f"{', '.join(layers)} of {model}" for model, layers in same)
    return [f"Equal RSMs, of which each counts: {named}."] if same else []


def answer(result: BrainResult) -> str:
    """Say which RSM explains the subjects best, against the noise ceiling, and from which it cannot be told apart."""
    attributes, table = result.evaluation.attrs, result.table
    what, level = measure_title(attributes["measure"]), attributes["level"]
    whom = counted_subjects(attributes["subjects"], result.facts["dimension"])
    known = [row for row in table if not math.isnan(row["mean"])]
    if (best := result.best) is None:
        highest = max(known, key=lambda row: row["mean"], default=None)
        closing = "" if highest is None else f" The highest mean is {_value(highest)} of the {rsm_words(highest)}."
        if (least := 1 / (attributes["repeats"] + 1)) > 1 - level + 1e-12:
            closing += (
                f" {attributes['repeats']:,} random orders give no p value below {least:.2g}, so none could: take more "
                "(repeats)."
            )
        return (
            f"No layer is shown to explain the RDMs of {whom} over {attributes['images']:,} images: none of the "
            f"{len(table)} RSMs agrees with them better than chance, by a permutation test corrected for all of them "
            f"(p up to {1 - level:.2g} counts).{closing} {_ceiling_words(result)}"
        ).strip()
    above = sum(row["above_chance"] for row in table)
    sentence = (
        f"The {rsm_words(best)} explains the RDMs of {whom} over {attributes['images']:,} images best: {what} "
        f"{_value(best)}. {_ceiling_words(result)} {_reached(result, best)} {_tied_words(result)} "
        f"{_notion_words(result)} "
        f"{f'All {above}' if above == len(table) else f'{above} of {len(table)}'} RSMs explain the RDMs better than "
        "chance."
    )
    return " ".join(sentence.split())


def _value(row: Row) -> str:
    return f"{with_interval(row, 'mean')}"


def _ceiling_words(result: BrainResult) -> str:
    (low, high), whose = result.ceiling, result.facts["dimension"]
    if math.isnan(low):
        return f"There is no noise ceiling for this measure and number of {whose}s."
    shared = "" if low > 0 else f" Its lower end is not above 0: the {whose}s share little that a model could explain."
    return f"The noise ceiling is {low:.3f} to {high:.3f}.{shared}"


def _reached(result: BrainResult, best: Row) -> str:
    if math.isnan(result.ceiling[0]):
        return ""
    whose = result.facts["dimension"]
    if best["below_ceiling"]:
        return f"It stays below the ceiling, so something that the {whose}s share is left to explain."
    if math.isnan(best["p_ceiling"]):
        return f"Two {whose}s are too few to test whether it reaches the ceiling."
    if best["mean"] >= result.ceiling[0]:
        return f"It reaches the ceiling: it agrees with a {whose} at least as well as the average of the others does."
    return "It lies below the ceiling, but not significantly."


def _tied_words(result: BrainResult) -> str:
    tied = [row for row in result.table if row["tied_with_best"]]
    if not result.compared(WITH_BEST):
        return ""
    if not tied:
        return "All other RSMs are shown to explain the RDMs less well."
    named = "; ".join(f"the {rsm_words(row)}" for row in sorted(tied, key=lambda row: -row["mean"])[:_MOST_NAMED])
    more = f"; and {len(tied) - _MOST_NAMED} more" if len(tied) > _MOST_NAMED else ""
    others = len(result.table) - 1
    whom = f"any of the other {others}" if len(tied) == others > 1 else f"{len(tied)} of the other {others}"
    return f"It cannot be told apart from {whom}: {named}{more}."


def _notion_words(result: BrainResult) -> str:
    """In how many layers a matching explains the subjects better than the identity, and worse."""
    rows, said = result.compared(NOTIONS_COMPARED), []
    for matching in distinct(rows, "matching_a"):
        mine = [row for row in rows if row["matching_a"] == matching]
        better = sum(row["decided"] and row["difference"] > 0 for row in mine)
        worse = sum(row["decided"] and row["difference"] < 0 for row in mine)
        said.append(
            f"The {notion_words(matching)} RSM explains them better than the spatio-semantic RSM of the same layer in "
            f"{better or 'none'} of {len(mine)} cases and worse in {worse or 'none'}; {len(mine) - better - worse} are "
            "undecided."
        )
    return " ".join(said)


def _explained(result: BrainResult) -> Section:
    """The chart of all means against the noise ceiling, and the figure for print."""
    rows = [
        {
            **row,
            "kernel_name": kernel_title(row["kernel"]),
            "verdict": "above chance" if row["above_chance"] else "",
            "ceiling": "below the noise ceiling" if row["below_ceiling"] else "not shown to be below it",
            "standing": _standing(row),
        }
        for row in result.table
    ]
    (low, high), whose = result.ceiling, result.facts["dimension"]
    chart = interval_chart(
        rows, "layer", ("mean", "low", "high"), measure_title(result.evaluation.attrs["measure"]), _titles(rows),
        menus={"model": "model ", "kernel_name": "kernel "},
        hover={"ceiling": "noise ceiling", "standing": "against the best"}, reference=0.0,
        verdicts={"verdict": "by the permutation test"}, band=None if math.isnan(low) else (low, high),
    )  # fmt: skip
    keys = [
        "model", "layer", "matching", "kernel", "mean", "low", "high", "p", "p_corrected", "p_ceiling_corrected",
        "above_chance", "below_ceiling", "best", "tied_with_best",
    ]  # fmt: skip
    cells = [[_cell(key, row[key]) for key in keys] for row in result.table]
    parts: list[Part] = [
        Chart(
            "explained", chart,
            f"Means over {whose}s with their intervals, by layer. Filled points are above chance after correction. The "
            "grey band is the noise ceiling, the dashed line marks 0. Point at a mean, or tap it, to read if it is "
            "below the ceiling and told apart from the best. Click on the legend, or tap it, to single out a notion of "
            "similarity.",
            Table("brain", keys, cells, digits=4),
        ),
        _for_print(result, "explained"),
    ]  # fmt: skip
    return Section(
        "How well each layer explains the RDMs",
        f"Each RSM is compared with the RDM of every {whose}, and the values are averaged over {whose}s.",
        parts,
    )


def _standing(row: Row) -> str:
    if row["best"]:
        return "the best"
    return "not told apart from the best" if row["tied_with_best"] else ""


def _cell(key: str, value: Any) -> Any:
    if key == "matching":
        return notion_words(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return kernel_title(value) if key == "kernel" else value


def _titles(rows: Sequence[Row], key: str = "matching") -> dict[str, str]:
    """Matchings with their notion, the semantic one last, as in the figures for print."""
    return {name: notion_words(name) for name in sorted(distinct(rows, key), key=lambda name: name == "optimal")}


def _notions(result: BrainResult) -> Section:
    heading = "Semantic against spatio-semantic"
    rows = [
        {
            **row, "model": row["model_a"], "layer": row["layer_a"], "kernel_name": kernel_title(row["kernel_a"]),
            "matching": row["matching_a"], "verdict": _who(row),
        }
        for row in result.compared(NOTIONS_COMPARED)
    ]  # fmt: skip
    if not rows:
        return Section(heading, "No layer has RSMs of both notions of similarity.")
    chart = interval_chart(
        rows, "layer", _DIFFERENCE, "difference of the means",
        {name: f"{title} minus spatio-semantic" for name, title in _titles(rows).items()},
        menus={"model": "model ", "kernel_name": "kernel "}, reference=0.0, verdicts={"verdict": "which is better"},
    )  # fmt: skip
    keys = ["model", "layer", "kernel_name", "matching", *_DIFFERENCE, "p", "p_corrected", "verdict"]
    cells = [[notion_words(row[key]) if key == "matching" else row[key] for key in keys] for row in rows]
    text = (
        "At every layer, the mean of one notion of similarity minus that of the spatio-semantic RSM, in the same draws "
        f"of {_drawn(result)}. p values are {_CORRECTIONS[correction_of(result.evaluation.attrs['correction'])]}. "
        "Hollow points are undecided."
    )
    caption = "Differences with their intervals; the dashed line marks 0."
    parts: list[Part] = [Chart("notions", chart, caption, Table("notions", keys, cells, digits=4))]
    return Section(heading, text, [*parts, _for_print(result, "differences")])


def _for_print(result: BrainResult, name: str) -> Group:
    """The figures for print with this name, folded."""
    return Group("The figure for print", [plot for plot in plots(brain_figures(result)) if plot.name.startswith(name)])


def _who(row: Row) -> str:
    """Which of the two explains the subjects better; "" where that is undecided."""
    if not row["decided"]:
        return ""
    return f"{notion_words(row['matching_a' if row['difference'] > 0 else 'matching_b'])} explains more"


def _with_best(result: BrainResult) -> Section:
    heading = "The best against the others"
    rows = result.compared(WITH_BEST)
    if not rows:
        return Section(heading, "No RSM explains the RDMs better than chance, so there is no best one to compare.")
    named = {
        "model": lambda row: row["model_b"], "layer": lambda row: row["layer_b"],
        "notion": lambda row: notion_words(row["matching_b"]), "kernel": lambda row: kernel_title(row["kernel_b"]),
    }  # fmt: skip
    # What all have in common says nothing here, and takes the width of a telephone.
    varying = [name for name, of in named.items() if name == "layer" or len({of(row) for row in rows}) > 1]
    cells = [
        ["yes" if row["decided"] else "no", *(named[name](row) for name in varying),
         *(row[key] for key in (*_DIFFERENCE, "p", "p_corrected"))]
        for row in sorted(rows, key=lambda row: row["difference"])
    ]  # fmt: skip
    columns = ["told apart", *varying, *_DIFFERENCE, "p", "p_corrected"]
    best = result.best
    assert best is not None
    return Section(
        heading,
        f"The mean of the {rsm_words(best)} minus that of every other RSM, nearest first. The best was picked on the "
        "same data, so its lead is a little too large; confirm a small lead on other images or subjects.",
        [Table("best", columns, cells, digits=4)],
    )


def _by_subject(result: BrainResult) -> Section:
    best = result.best or max(result.table, key=lambda row: -math.inf if math.isnan(row["mean"]) else row["mean"])
    values = result.evaluation["value"].values[[row["rsm"] for row in result.table].index(best["rsm"])]
    dimension = result.facts["dimension"]
    cells = [[name, float(value)] for name, value in zip(result.facts["names"], values, strict=True)]
    return Section(
        f"Every {dimension}",
        f"The {rsm_words(best)}, which has the highest mean, with the RDM of every {dimension}.",
        [Table("subjects", [dimension, measure_title(result.evaluation.attrs["measure"])], cells)],
    )


def _drawn(result: BrainResult) -> str:
    """What the bootstrap draws."""
    return _DRAWN[result.evaluation.attrs["draw"]].format(dimension=result.facts["dimension"])


def _method(result: BrainResult) -> Section:
    attributes, whose = result.evaluation.attrs, result.facts["dimension"]
    correction = _CORRECTIONS[correction_of(attributes["correction"])]
    dual = (
        " This is the dual bootstrap: it counts the noise of the measurements once, where draws of "
        f"{_drawn(result)} together count it three times (Schütt et al. 2023)."
        if attributes["draw"] == "both"
        else ""
    )
    ceiling = (
        ""
        if math.isnan(result.ceiling[0])
        else f"\n\nThe noise ceiling is the range in which the true model is expected, as {whose}s differ from each "
        f"other: its lower end is the mean value of a {whose} with the average of the others, its upper end that with "
        "the average of all (Nili et al. 2014)."
    )
    if any(not math.isnan(row["p_ceiling"]) for row in result.table):
        ceiling += " A two-sided t test in the same draws compares every mean with the lower end."
    of = "differences" if "t test" not in ceiling else "differences and of the noise ceiling"
    every = attributes["images"] * (attributes["images"] - 1) // 2
    missing = every - attributes.get("pairs", every)
    left_out = (
        f"Of {every:,} pairs of images, {missing:,} are missing from at least one RDM, and are left out of every "
        "comparison.\n\n"
        if missing
        else ""
    )
    return Section(
        "How this was computed",
        f"{left_out}"
        f"{100 * attributes['level']:.4g}% intervals are t intervals with {attributes['dof']} degrees of freedom "
        f"around the mean; its standard error comes from {attributes['repeats']:,} draws of {_drawn(result)} with "
        f"replacement.{dual}\n\n"
        f"Above chance: a permutation test shuffles the images of all RDMs {attributes['repeats']:,} times and "
        "compares every mean with the largest standardised mean of all RSMs in each order, one-sided, so that p values "
        f"hold for all RSMs together (Nichols & Holmes 2002). It says nothing about other {whose}s."
        f"{ceiling}\n\n"
        f"p values of {of} are {correction}.",
    )
