"""Choose what the page of all pairs shows: some images of the RSMs, pairs that matching moves, nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ImageError
from rsm_probe.figures import thinned
from rsm_probe.matching.matches import match
from rsm_probe.pairs.token_sets import centred_tokens
from rsm_probe.paper.shown import seen_by
from rsm_probe.report.page import Thumbnail
from rsm_probe.report.thumbnails import joining_lines, thumbnail
from rsm_probe.runs.tables import Row
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.rsm import RSM
from rsm_probe.sources import ImageLoader, ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.studies.sweep_report.choosing import (
    changed_pairs,
    neighbours,
    query_images,
    rank_shares,
    sorted_by_label,
)
from rsm_probe.studies.sweep_report.shown import Neighbours, RankChange, Shown

# Entries of all RSMs on the page, and the images of one, at least and at most.
_MOST_ENTRIES, _FEWEST_IMAGES, _MOST_IMAGES = 400_000, 16, 64
# Models, and layers of a model, that the page shows.
_MOST_MODELS, _MOST_LAYERS = 4, 12
# Pairs of images per layer and direction; images whose neighbours are shown, and their number.
_PAIRS, _QUERIES, _NEIGHBOURS = 4, 3, 5
# Images whose pairs are ranked: all of them up to here, and the first of each label from here on.
_RANKED = 3000


def chosen_pairs(
    table: Sequence[Row],
    kernels: Sequence[str],
    rsm_of: Callable[[Row, str], RSM],
    layer_of: Callable[[Row], CapturedLayer],
    same: bool,
    centering: Centering | None,
    settings: str,
) -> Shown:
    """What the page shows, without thumbnails.

    Args:
        table: rows of the result; those of a layer come together, and its identity comes first.
        kernels: kernels of the study; pairs and neighbours are those of the first.
        rsm_of: a row and a kernel -> the RSM.
        layer_of: a row -> the captured images of its rows.
        same: whether rows and columns of RSMs are the same images; else the images in the columns follow those in the
            rows in all that is returned.
        centering: what was subtracted from tokens before they were matched.
        settings: hash of what the result depends on.
    """
    layers: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        layers.setdefault((row["model"], row["layer"]), []).append(row)
    depth_of: dict[str, list[str]] = {}
    for model, layer in layers:
        depth_of.setdefault(model, []).append(layer)
    models, notes = thinned(list(depth_of), _MOST_MODELS), list[str]()
    shown_layers = {model: thinned(depth_of[model], _MOST_LAYERS) for model in models}
    if len(models) < len(depth_of):
        notes.append(f"RSMs and pictures are those of {len(models)} of {len(depth_of)} models.")
    if any(len(shown_layers[model]) < len(depth_of[model]) for model in models):
        notes.append(f"RSMs and pictures are those of at most {_MOST_LAYERS} layers of a model, evenly chosen.")
    first = rsm_of(table[0], kernels[0])
    ids, labels = ([*map(str, first.dataset[f"{name}_a"].values)] for name in ("image", "label"))
    queries = query_images(labels, _QUERIES)
    taken = [key for key in layers if key[1] in shown_layers.get(key[0], ())]
    count = sum(len(layers[key]) for key in taken) * len(kernels)
    most = int(np.clip(np.sqrt(_MOST_ENTRIES / count), _FEWEST_IMAGES, _MOST_IMAGES)) if same else 0
    order = sorted_by_label(labels, most) if same else np.empty(0, np.int64)
    if same and len(order) < len(ids):
        notes.append(f"RSMs show {len(order)} of {len(ids)} images, evenly chosen from each label.")
    semantic = next((row["matching"] for row in table if row["matching"] != "identity"), "")
    keys, rsms, ranges = list[RsmKey](), list[np.ndarray](), list[tuple[float, float]]()
    ranks = list[np.ndarray]()
    changes, near = list[RankChange](), list[Neighbours]()
    for model, layer in taken:
        whole = {}
        for row in layers[model, layer]:
            for kernel in kernels:
                similar = rsm_of(row, kernel).values
                if kernel == kernels[0]:
                    whole[row["matching"]] = similar
                if same:
                    apart = similar[~np.eye(len(similar), dtype=bool)]
                    keys.append(RsmKey(model, layer, depth_of[model].index(layer), row["matching"], kernel))
                    rsms.append(similar[np.ix_(order, order)])
                    if len(ids) <= _RANKED:
                        ranks.append(rank_shares(similar)[np.ix_(order, order)])
                    ranges.append((float(apart.min()), float(apart.max())))
        near += [_near(model, layer, query, whole, semantic, same) for query in queries]
        if same and {"identity", semantic} <= whole.keys() and len(ids) <= _RANKED:
            captured = layer_of(layers[model, layer][0])
            ranked = _changed(model, layer, whole["identity"], whole[semantic])
            changes += [_with_lines(one, captured, semantic, centering) for one in ranked]
    if same and semantic and len(ids) > _RANKED:
        notes.append(f"Pairs whose rank changes are shown up to {_RANKED:,} images; this run has {len(ids):,}.")
    if not same:
        ids, labels = ([*own, *map(str, first.dataset[f"{name}_b"].values)]
                       for own, name in ((ids, "image"), (labels, "label")))  # fmt: skip
    values = np.array(rsms, np.float32).reshape(len(keys), len(order), len(order))
    limits = np.array(ranges, np.float64).reshape(len(keys), 2)
    return Shown(
        settings,
        ids,
        labels,
        semantic,
        kernels[0],
        order,
        keys,
        values,
        limits,
        {},
        changes,
        near,
        notes=notes,
        ranks=np.array(ranks, np.float32),
    )


def thumbnails_of(
    shown: Shown, sides: Sequence[ImageSet | ImageLoader], model: LoadedModel
) -> tuple[Mapping[int, Thumbnail], list[str]]:
    """The thumbnails that a page needs, as a model sees the images, and why there are none.

    Args:
        shown: what the page shows.
        sides: the images in the rows and, if these are others, those in the columns.
        model: the model.
    """
    wanted = {int(number) for number in shown.order} | {number for one in shown.changes for number in one.images}
    wanted |= {number for one in shown.neighbours for number in (one.query, *one.semantic, *one.identity)}
    if not all(isinstance(images, ImageSet) for images in sides):
        return {}, ["There are no thumbnails: the images come from a loader, which has passed."]
    thumbnails = {}
    try:
        for number in sorted(wanted):
            side, index = (0, number) if number < len(sides[0]) else (1, number - len(sides[0]))  # type: ignore[arg-type]
            image: Any = sides[side][index]  # type: ignore[index]
            thumbnails[number] = thumbnail(seen_by(model, image), shown.ids[number], shown.labels[number])
    except ImageError as error:
        return {}, [f"There are no thumbnails, because these images are not pictures: {error}."]
    return thumbnails, [f"Thumbnails show images as {model.name} sees them, after its preprocessing."]


def _near(model: str, layer: str, query: int, rsms: Mapping[str, np.ndarray], semantic: str, same: bool) -> Neighbours:
    nearest = {name: _nearest(values, query, same) for name, values in rsms.items()}
    return Neighbours(model, layer, query, nearest.get(semantic, []), nearest.get("identity", []))


def _nearest(values: np.ndarray, query: int, same: bool) -> list[int]:
    if same:
        return neighbours(values, query, _NEIGHBOURS)
    return [len(values) + int(number) for number in np.argsort(-values[query], kind="stable")[:_NEIGHBOURS]]


def _changed(model: str, layer: str, aligned: np.ndarray, semantic: np.ndarray) -> list[RankChange]:
    ranks = rank_shares(semantic), rank_shares(aligned)
    change = ranks[0] - ranks[1]
    pairs = changed_pairs(change, _PAIRS) + changed_pairs(-change, _PAIRS)
    return [RankChange(model, layer, pair, float(ranks[0][pair]), float(ranks[1][pair])) for pair in pairs]


def _with_lines(one: RankChange, layer: CapturedLayer, matching: str, centering: Centering | None) -> RankChange:
    """Match the locations of a pair."""
    tokens = [centred_tokens(layer, slice(k, k + 1), layer, centering)[0].float() for k in one.images]
    matched = match(tokens[0], tokens[1], matching, grid=layer.grid)
    if matched.permutation is None or matched.affinities is None:
        return one
    lines = joining_lines(matched.permutation, matched.affinities, (layer.grid, layer.grid))
    return RankChange(one.model, one.layer, one.images, one.semantic, one.identity, lines, len(matched.permutation))
