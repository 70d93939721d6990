"""The page of all pairs: CKA by layer, neighbours of some images, and the pairs that matching moves most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.figures import thinned
from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_parts import counted
from rsm_probe.paper.page_words import rule_titles, rule_words
from rsm_probe.paper.shown import Shown
from rsm_probe.report.page import Chart, Group, Page, Part, Picture, Pictures, Section, Table, Thumbnail
from rsm_probe.runs.tables import Row, kernel_title
from rsm_probe.similarity.rsm import RSM

# What is shown of a model: images with their neighbours, layers, pairs that move in each direction, and models.
IMAGES, NEIGHBOURS, LAYERS, MOVED, MODELS = 4, 4, 4, 3, 4


def chosen_images(labels: Sequence[str], most: int = IMAGES) -> list[int]:
    """Choose images before anything is known about them: the first of each label, or some that are evenly spread."""
    first = {label: number for number, label in reversed(list(enumerate(labels)))}
    if len(first) > 1:
        return sorted(first.values())[:most]
    return thinned(range(len(labels)), most)


def nearest_of(values: np.ndarray, image: int, same: bool, count: int = NEIGHBOURS) -> list[tuple[int, float]]:
    """The images that are most similar to one, with their similarities.

    Args:
        values: the RSM, (N, M).
        image: a row.
        same: whether the columns are the images of the rows, so that the image itself is not among its neighbours.
        count: number of neighbours.
    """
    row = values[image].copy()
    if same:
        row[image] = -np.inf
    order = np.argsort(-row, kind="stable")[: min(count, len(row) - same)]
    return [(int(number), float(row[number])) for number in order]


def moved_pairs(aligned: np.ndarray, semantic: np.ndarray, count: int = MOVED) -> list[tuple[int, int, float, float]]:
    """The pairs of images whose rank among all pairs rises and falls most from one RSM to another.

    Args:
        aligned: an RSM, (N, N).
        semantic: another RSM of the same images, (N, N).
        count: pairs in each direction.

    Returns:
        (image, image, share of pairs that are less similar in the first RSM, the same in the second): first those that
        rise most, then those that fall most.
    """
    rows, columns = np.triu_indices(len(aligned), 1)
    ranks = [_ranks(values[rows, columns]) for values in (aligned, semantic)]
    change = ranks[1] - ranks[0]
    order = np.argsort(-change, kind="stable")
    rising = [k for k in order[:count] if change[k] > 0]
    falling = [k for k in order[::-1][:count] if change[k] < 0]
    return [(int(rows[k]), int(columns[k]), float(ranks[0][k]), float(ranks[1][k])) for k in (*rising, *falling)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """The share of values below each; equal values have the mean of their ranks."""
    unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return (below + (counts - 1) / 2)[inverse.reshape(-1)] / max(1, len(values) - 1)


def shown_layer(layer: str, rsms: Mapping[str, RSM], same: bool) -> dict[str, Any]:
    """What is shown of a layer, without pictures.

    Args:
        layer: its name.
        rsms: matching -> RSM; the identity comes first.
        same: whether rows and columns are the same images.
    """
    first = next(iter(rsms.values()))
    labels = [str(label) for label in first.dataset["label_a"].values]
    neighbours = [
        {"image": image, "matching": name, "nearest": nearest_of(rsm.values, image, same)}
        for image in chosen_images(labels)
        for name, rsm in rsms.items()
    ]
    moved: list[dict[str, Any]] = []
    semantic = next((name for name in rsms if name != "identity"), None)
    if same and "identity" in rsms and semantic is not None:
        pairs = moved_pairs(rsms["identity"].values, rsms[semantic].values)
        moved = [
            {"pair": [i, j], "matching": semantic, "below": [before, after],
             "similarities": [float(rsms[name].values[i, j]) for name in ("identity", semantic)]}
            for i, j, before, after in pairs
        ]  # fmt: skip
    return {"layer": layer, "neighbours": neighbours, "moved": moved}


def images_of(layers: Sequence[Mapping[str, Any]], same: bool) -> list[tuple[str, int]]:
    """The images that pictures of layers need: side ("x" in the rows, "y" in the columns) and number."""
    columns = "x" if same else "y"
    wanted: dict[tuple[str, int], None] = {}
    for layer in layers:
        for one in layer["neighbours"]:
            wanted["x", one["image"]] = None
            wanted.update(dict.fromkeys((columns, number) for number, _ in one["nearest"]))
        for one in layer["moved"]:
            wanted.update(dict.fromkeys(("x", number) for number in one["pair"]))
    return list(wanted)


def pairs_page(table: Sequence[Row], settings: Mapping[str, Any], shown: Mapping[str, Shown], why_not: str) -> Page:
    """Lay out the page of a finished run.

    Args:
        table: rows of the result.
        settings: settings of the study.
        shown: model -> what the run stored of it.
        why_not: why some pictures are missing; "" if none is.
    """
    same, kernels = settings["database"] is None, settings["kernels"]
    count = f"{table[0]['images_a']:,} images of the set {settings['images']['source']}"
    if not same:
        count += f" with {table[0]['images_b']:,} images of the set {settings['database']['source']}"
    rules = [rule_words(name) for name in distinct(table, "matching")]
    columns = [key for key in table[0] if key != "path"]
    sections = [_cka(table, kernels)] if any(f"cka_{kernel}" in table[0] for kernel in kernels) else []
    if moved := [part for title, one in shown.items() for part in _moved(title, one)]:
        sections.append(
            Section(
                "What semantic similarity sees that the aligned one misses",
                "The pairs of images whose rank among all pairs changes most between the spatio-semantic RSM (equal "
                "locations) and the semantic one: first those that rise, then those that fall. Lines join the "
                "strongest matched locations. These are extremes, not typical pairs.",
                moved,
            )
        )
    if found := [part for title, one in shown.items() for part in _neighbours(title, one, same)]:
        sections.append(
            Section(
                "Nearest images",
                "Images that were chosen by their labels or numbers, before anything was computed, each beside its "
                "most similar images under every matching, by similarity.",
                found,
            )
        )
    sections.append(
        Section(
            "All layers",
            "largest_gap: the largest possible distance of a product from the optimum, as a share of |x| |y|; none "
            "where nothing is proven.",
            [Table("pairs", columns, [[_shown(key, row[key]) for key in columns] for row in table], digits=4)],
        )
    )
    return Page(
        "All pairs of images",
        "Which images does each layer of a model consider similar, and what changes when locations are matched?",
        f"All pairs of {count}; {counted(distinct(table, 'model'), 'model')}; "
        f"{counted(distinct(table, 'layer'), 'layer')}; {counted(rules, 'matching')}; "
        f"{counted([kernel_title(kernel) for kernel in kernels], 'kernel')}.",
        _answer(table, kernels),
        sections,
        command="",
        notes=[note for note in (why_not,) if note],
    )


def certificate_of(table: Sequence[Row]) -> dict[str, str]:
    """What is proven about the products, under "Certificate"; {} if nothing is."""
    gaps: dict[str, list[float]] = {}
    for row in table:
        gaps.setdefault(row["matching"], []).append(row["largest_gap"])
    proven = {name: max(values) for name, values in gaps.items() if not any(map(math.isnan, values))}
    if not proven:
        return {}
    listed = ", ".join(f"{rule_words(name)} {gap:.1e}" for name, gap in proven.items())
    return {"Certificate": f"largest possible distance of a product from the optimum, as a share of |x| |y|: {listed}"}


def _answer(table: Sequence[Row], kernels: Sequence[str]) -> str:
    """The lowest and the highest CKA between semantic and spatio-semantic RSMs, and what is proven."""
    values = [
        (
            row[f"cka_{kernel}"],
            f"{row['layer']} of {row['model']}, {rule_words(row['matching'])}, {kernel_title(kernel)}",
        )
        for row in table
        for kernel in kernels
        if row["matching"] != "identity" and not math.isnan(row.get(f"cka_{kernel}", math.nan))
    ]
    proven = certificate_of(table).get("Certificate", "")
    second = (
        f"Proven about the matchings: {proven}." if proven else "Nothing is proven about the optimum of the matchings."
    )
    if not values:
        return f"The similarities of all pairs are stored, and no two RSMs of one set were compared. {second}"
    (low, where), (high, elsewhere) = min(values), max(values)
    return (
        "The CKA of the RSM with matched locations and the spatio-semantic RSM of the same layer is lowest, "
        f"{low:.3f}, in {where}, and highest, {high:.3f}, in {elsewhere}; these are values of this set of images, "
        f"without intervals. {second}"
    )


def _cka(table: Sequence[Row], kernels: Sequence[str]) -> Section:
    rows = [
        {**row, "kernel": kernel_title(kernel), "cka": row[f"cka_{kernel}"], "none": math.nan}
        for kernel in kernels
        for row in table
        if row["matching"] != "identity" and not math.isnan(row[f"cka_{kernel}"])
    ]
    if not rows:
        return Section("CKA by layer", "No matching is compared with equal locations.")
    chart = interval_chart(
        rows, "layer", ("cka", "none", "none"), "CKA with the spatio-semantic RSM", rule_titles(rows),
        menus={"model": "model ", "kernel": "kernel "}, hover={"locations": "locations", "channels": "channels"},
    )  # fmt: skip
    keys = ("model", "layer", "locations", "channels", "matching", "kernel", "cka")
    listed = Table("cka", keys, [[row[key] for key in keys] for row in rows])
    return Section(
        "CKA by layer",
        "How similar the RSM with matched locations is to the spatio-semantic RSM (equal locations) of the same "
        "layer; 1 is identical. All images of the run count, so there is no interval over mini-batches.",
        [Chart("cka", chart, "Unbiased CKA by layer. Choose with the menus; click on the legend to single out a rule.",
               listed)],
    )  # fmt: skip


def _moved(title: str, shown: Shown) -> list[Part]:
    """Pairs that rise and fall, layer by layer."""
    parts: list[Part] = []
    for layer in shown.facts["layers"]:
        pictures, lines = [], []
        for one in layer["moved"]:
            pair = [shown.images[f"x{number}"] for number in one["pair"]]
            before, after = (f"{share:.1%}" for share in one["below"])
            verb = "rises" if one["below"][1] > one["below"][0] else "falls"
            caption = f"{_named(pair[0])} and {_named(pair[1])}: above {before} of all pairs, {verb} to above {after}"
            pictures.append(Picture(pair, caption, [tuple(ends) for ends in one.get("lines", ())]))
            lines.append(
                [pair[0].name, pair[0].label, pair[1].name, pair[1].label, *one["below"], *one["similarities"]]
            )
        if pictures:
            columns = ["image", "label", "other image", "its label", "share of pairs below, aligned",
                       "share of pairs below, semantic", "similarity, aligned", "similarity, semantic"]  # fmt: skip
            name = f"moved-{title}-{layer['layer']}"
            kernel = kernel_title(shown.facts["kernel"])
            text = f"{rule_words(layer['moved'][0]['matching'])} against equal locations, {kernel}"
            parts.append(
                Group(f"{title}, {layer['layer']}", [Pictures(name, pictures, text, Table(name, columns, lines), 110)],
                      unfolded=not parts)
            )  # fmt: skip
    return parts


def _neighbours(title: str, shown: Shown, same: bool) -> list[Part]:
    """Chosen images with their nearest images, layer by layer."""
    parts: list[Part] = []
    for layer in shown.facts["layers"]:
        pictures, lines = [], []
        for one in layer["neighbours"]:
            image = shown.images[f"x{one['image']}"]
            found = [(shown.images[f"{'x' if same else 'y'}{number}"], value) for number, value in one["nearest"]]
            said = ", ".join(f"{_named(other)} {value:.3g}" for other, value in found)
            pictures.append(Picture([image, *(other for other, _ in found)], f"{rule_words(one['matching'])}: {said}"))
            lines += [
                [image.name, image.label, rule_words(one["matching"]), rank, other.name, other.label, value]
                for rank, (other, value) in enumerate(found, start=1)
            ]
        columns = ["image", "label", "compared by", "rank", "neighbour", "its label", "similarity"]
        name = f"nearest-{title}-{layer['layer']}"
        table = Table(name, columns, lines)
        text = f"The image on the left, and its nearest images; {kernel_title(shown.facts['kernel'])}."
        parts.append(Group(f"{title}, {layer['layer']}", [Pictures(name, pictures, text, table)], unfolded=not parts))
    return parts


def _named(image: Thumbnail) -> str:
    return image.label or image.name


def _shown(key: str, value: Any) -> Any:
    if key == "matching":
        return rule_words(value)
    return f"{value:.1e}" if key == "largest_gap" and not math.isnan(value) else value
