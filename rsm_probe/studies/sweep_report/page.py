"""The report page of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rsm_probe.errors import StorageError
from rsm_probe.execution.amounts import format_seconds
from rsm_probe.figures import thinned
from rsm_probe.report.default import REPORT
from rsm_probe.report.page import Group, Page, Part, Picture, Pictures, Section, Table, Thumbnail
from rsm_probe.report.write import INSTALL, write_page
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.sweep_request import RESULT
from rsm_probe.studies.panels import kernel_name, semantic_matchings
from rsm_probe.studies.sweep_report.shown import SHOWN, Neighbours, RankChange, Shown
from rsm_probe.studies.sweep_report.summary import (
    answer,
    certainty,
    certificate,
    images_in_words,
    pairs_matched,
    question,
    setting,
    title,
)

# Values of CKA in the grids, beyond which some models are left out.
_MOST_VALUES = 600_000
# Pairs whose rank changes most, above those of each layer.
_TOP = 4


def sweep_page(
    result: SweepResult, shown: Shown | None, heading: str, command: str, facts: Mapping[str, str] | None = None
) -> Page:
    """The page of a sweep.

    Args:
        result: its result.
        shown: what its run stored for the page; None if it stored nothing, as a sweep in Python.
        heading: title of the page.
        command: the command that makes the numbers.
        facts: further facts for the end of the page; see `rsm_probe.report.facts`.

    Raises:
        StorageError: Vega-Altair is not installed.
    """
    try:
        from rsm_probe.studies.sweep_report.cka_grids import cka_chart
        from rsm_probe.studies.sweep_report.curves import diagonal_chart, dynamics_chart
    except ImportError as error:
        raise StorageError(f"the page of a sweep needs Vega-Altair; {INSTALL}") from error
    models, notes = _models(result)
    notes += list(shown.notes) if shown is not None else [_NOTHING_SHOWN]
    semantics = semantic_matchings(result)
    sections = [
        Section(
            "CKA between layers", certainty(result, shown), [cka_chart(result, shown if semantics else None, models)]
        ),
    ]
    if semantics:
        sections.append(
            Section("Each layer: semantic against spatio-semantic", "", [diagonal_chart(result, shown, models)])
        )
    if shown is not None and shown.changes:
        sections += [changes_section(shown), neighbours_section(shown)]
    if networks := {name: steps for name, steps in result.networks.items() if len(steps) > 1}:
        sections.append(Section("Training dynamics", "", [dynamics_chart(result, networks)]))
    sections.append(Section("Models", "", [_model_table(result)]))
    about = {
        "Images": images_in_words(result, shown),
        "Cost": pairs_matched(result) + _time(shown, facts or {}),
        "Certificate": certificate(result),
    }
    words = question(result), setting(result, shown), answer(result, shown, models)
    return Page(heading, *words, sections, command, {**about, **(facts or {})}, notes)


def _time(shown: Shown | None, facts: Mapping[str, str]) -> str:
    """How long the run took, unless the facts say it."""
    if shown is None or not shown.seconds or "Time" in facts:
        return ""
    return f"; {format_seconds(shown.seconds)} in the last run"


_NOTHING_SHOWN = (
    f"RSMs, pairs of images and nearest neighbours are missing here: the folder has no {SHOWN}, which `rsm-probe run` "
    "stores. Sweeps in Python and runs of earlier versions do not have it; run the study again to add it."
)


def _models(result: SweepResult) -> tuple[list[str], list[str]]:
    """The models in the grids, and a sentence where some are left out."""
    rsms = len(result.models) * max(len(result.layers(model)) for model in result.models)
    kinds = result.cka.sizes["rsm_a"] / rsms
    share = min(1.0, (_MOST_VALUES / (rsms**2 * kinds)) ** 0.5)
    models = thinned(result.models, max(1, int(share * len(result.models))))
    if len(models) == len(result.models):
        return models, []
    return models, [f"CKA grids show {len(models)} of {len(result.models)} models; result.zarr has all."]


def changes_section(shown: Shown) -> Section:
    """Pairs of images whose rank differs between the two RSMs of a layer."""
    ordered = sorted(shown.changes, key=lambda one: one.identity - one.semantic)
    parts: list[Part] = []
    if shown.thumbnails:
        parts += _rises_and_falls("", ordered, shown, named=True)
        for model, of_model in groupby(shown.changes, key=lambda one: one.model):
            groups: list[Part] = []
            for layer, of_layer in groupby(of_model, key=lambda one: one.layer):
                groups.append(Group(layer, _rises_and_falls(f" {model} {layer}", list(of_layer), shown)))
            parts.append(Group(f"{model}, layer by layer", groups))
    headings = [
        "model",
        "layer",
        "image",
        "label",
        "other image",
        "other label",
        "semantic",
        "spatio-semantic",
        "change",
    ]
    rows = [
        [one.model, one.layer, *(text for k in one.images for text in (shown.ids[k], shown.labels[k])),
         one.semantic, one.identity, one.semantic - one.identity]
        for one in ordered
    ]  # fmt: skip
    if shown.pictures:
        headings = [*headings, f"same {shown.picture}"]
        rows = [
            [*row, "yes" if shown.same_picture(*one.images) else "no"] for row, one in zip(rows, ordered, strict=True)
        ]
    caption = "Ranks of pairs of images in both RSMs of a layer; the largest rise comes first."
    parts.append(Group("Table of all pairs", [Table("rank-changes", headings, rows, caption)]))
    text = (
        "The rank of a pair of images is the share of all pairs that are less similar: 0% for the least similar pair, "
        "100% for the most similar one. It is taken in the spatio-semantic RSM of a layer and in its semantic RSM "
        f"({shown.semantic} matching, {kernel_name(shown.kernel)}). Ranks are those among these images; they have no "
        "interval."
    )
    rise, fall = (
        f"{_pair(one, shown)}, in {one.layer} of {one.model}: from {one.identity:.1%} to {one.semantic:.1%}"
        for one in (ordered[0], ordered[-1])
    )
    text += (
        f"\n\nThe largest rise is that of {rise}. The largest fall is that of {fall}. These are extremes among all "
        "pairs and layers, and such images need not show the same things: vectors may agree in colour or texture alone."
    )
    return Section("What each kind of similarity sees and the other misses", text, parts)


def _rises_and_falls(name: str, changes: Sequence[RankChange], shown: Shown, named: bool = False) -> list[Part]:
    """The pairs that rise most and those that fall most.

    Args:
        name: ends the names of the downloads.
        changes: pairs of one layer or of all.
        shown: the images.
        named: whether to name layers, and to show only the first pairs of all layers.
    """
    ordered = sorted(changes, key=lambda one: one.identity - one.semantic)
    up, down = ([one for one in order if sign * (one.semantic - one.identity) > 0]
                for sign, order in ((1, ordered), (-1, ordered[::-1])))  # fmt: skip
    most = _TOP if named else len(ordered)
    where = " in any layer" if named else ""
    lines = "Lines join some matched locations: those that agree most."
    rises = (
        "The semantic RSM finds them far more similar than the spatio-semantic RSM does: what agrees lies at different "
        "locations."
    )
    falls = (
        "The spatio-semantic RSM finds them far more similar than the semantic RSM does: equal locations agree, but "
        "once locations are matched, other pairs agree better."
    )
    texts = (("rank-rises", "rises", up, rises), ("rank-falls", "falls", down, falls))
    return [
        replace(
            _pair_pictures(f"{key}{name}", f"{text} {lines}", _distinct(pairs, most), shown, named),
            title=f"Pairs whose rank {verb} most{where}",
        )
        for key, verb, pairs, text in texts
        if pairs
    ]


def _pair(one: RankChange, shown: Shown) -> str:
    """The names and labels of two images."""
    return " and ".join(shown.named(k) for k in one.images)


def _distinct(changes: Sequence[RankChange], count: int) -> list[RankChange]:
    """The first changes of different pairs of images."""
    first: dict[tuple[int, int], RankChange] = {}
    for one in changes:
        first.setdefault(one.images, one)
    return list(first.values())[:count]


def _pair_pictures(
    name: str, caption: str, changes: Sequence[RankChange], shown: Shown, named: bool = False
) -> Pictures:
    pictures = [
        Picture(
            [shown.thumbnails[k] for k in one.images],
            f"{_pair(one, shown)}: spatio-semantic rank {one.identity:.0%}, semantic rank {one.semantic:.0%}"
            + (f", in {one.layer} of {one.model}" if named else "")
            + (f"; both from the same {shown.picture}" if shown.same_picture(*one.images) else ""),
            one.lines,
        )
        for one in changes
    ]
    return Pictures(name, pictures, caption)


def neighbours_section(shown: Shown) -> Section:
    """Nearest images of a few images, under both kinds."""
    parts: list[Part] = []
    for model, of_model in groupby(shown.neighbours, key=lambda one: one.model):
        groups: list[Part] = []
        for layer, of_layer in groupby(of_model, key=lambda one: one.layer):
            near = list(of_layer)
            table = _near_table(model, layer, near, shown)
            content = _near_pictures(model, layer, near, shown, table) if shown.thumbnails else table
            groups.append(Group(layer, [content], unfolded=not parts and not groups))
        parts.append(Group(model, groups, unfolded=not parts))
    text = (
        f"The images that each layer finds most similar to a few images, nearest first, as in Figure 4 of Wald et al. "
        f"2024 ({kernel_name(shown.kernel)}). There are no intervals."
    )
    if shown.pictures:
        text += f" Neighbours from the same {shown.picture} are counted below each row."
    return Section("Nearest neighbours", text, parts)


def _near_pictures(model: str, layer: str, near: Sequence[Neighbours], shown: Shown, table: Table) -> Pictures:
    pictures = []
    for one in near:
        for kind, images in (("semantic", one.semantic), ("spatio-semantic", one.identity)):
            row: list[Thumbnail] = [shown.thumbnails[k] for k in (one.query, *images)]
            labels = ", ".join(shown.labels[k] for k in images)
            said = f": {labels}" if labels.strip(", ") else ""
            shared = sum(shown.same_picture(one.query, k) for k in images)
            said += f" ({shared} of {len(images)} from the same {shown.picture})" if shown.pictures else ""
            pictures.append(Picture(row, f"{shown.named(one.query)} and its nearest by the {kind} RSM{said}"))
    return Pictures(f"neighbours {model} {layer}", pictures, "", table, width=72)


def _near_table(model: str, layer: str, near: Sequence[Neighbours], shown: Shown) -> Table:
    rows = [
        [shown.ids[one.query], shown.labels[one.query], kind,
         *(shown.named(k) + (f", same {shown.picture}" if shown.same_picture(one.query, k) else "") for k in images)]
        for one in near
        for kind, images in (("semantic", one.semantic), ("spatio-semantic", one.identity))
    ]  # fmt: skip
    nearest = [str(k + 1) for k in range(len(rows[0]) - 3)]
    return Table(f"neighbours {model} {layer}", ["image", "label", "RSM", *nearest], rows)


def _model_table(result: SweepResult) -> Table:
    step_of = {model: (network, step) for network, steps in result.networks.items() for step, model in steps.items()}
    rows = []
    for model in result.models:
        layers = result.layers(model)
        steps = step_of.get(model, ("", "")) if step_of else ()
        rows.append([model, *steps, len(layers), layers[0], layers[-1]])
    steps = ("network", "step") if step_of else ()
    return Table("models", ["model", *steps, "layers", "first layer", "last layer"], rows)


def write_result_report(folder: Path, file: Path | None = None) -> Path:
    """Write the page of a sweep that Python called with `out=`, and that has no configuration.

    Args:
        folder: the folder of the sweep.
        file: the page; by default `report.html` in the folder.

    Returns:
        The file.

    Raises:
        StorageError: there is no sweep, or the page cannot be written.
    """
    result, command = SweepResult.open(folder / RESULT), f"rsm_probe.sweep(..., out={folder.as_posix()!r})"
    page = sweep_page(result, Shown.of(folder, result), title(result, folder), command)
    return write_page(page, folder / REPORT if file is None else file)
