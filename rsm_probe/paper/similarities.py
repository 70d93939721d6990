"""Compute all similarities of captured images under a rule, and find the nearest images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import ComparisonError
from rsm_probe.execution.execution import Execution
from rsm_probe.pairs.compute import rsm
from rsm_probe.pairs.on_disk import match_on_disk
from rsm_probe.paper.similarity_rules import SimilarityRule, in_tiles
from rsm_probe.runs.pieces import once
from rsm_probe.similarity import RSM, Centering
from rsm_probe.storage.files import Arrays


def similarity_values(
    x: CapturedLayer,
    y: CapturedLayer | None,
    rule: SimilarityRule,
    store: Path,
    centering: Centering | None,
    tile: int | None,
    execution: Execution,
) -> np.ndarray:
    """Compute the similarities of all images of x with all images of y.

    Args:
        x: the images in the rows.
        y: the images in the columns; None to compare the images of x with each other.
        rule: how two images are compared.
        store: a folder for matched products, from which an interrupted call resumes; vectors are stored beside it.
        centering: see `rsm_probe.rsm`.
        tile: see `in_tiles`.
        execution: how pairs are matched.

    Returns:
        Similarities, (N, M) float64.

    Raises:
        ComparisonError: products are not finite.
    """
    if rule.vector:
        rows = vectors_of(x, rule, store.with_name(f"{store.stem}-x.npz"))
        columns = None if y is None else vectors_of(y, rule, store.with_name(f"{store.stem}-y.npz"))
        pairs = rsm(rows, columns, rule.matching, "linear", centering).dataset
    else:
        # Load everything at once, so that damaged or missing tiles are found before they are used.
        pairs = RSM.from_pairs(match_on_disk(x, y, store, rule.matching, centering, None, False, execution)).dataset
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    if not np.isfinite(pairs["product"].values).all():
        raise ComparisonError(f"layer {x.name}: products of some images are not finite: its values are too large")
    values = in_tiles(rule.kernel, pairs["product"].values, norms, y is None, tile)
    return values / x.shape[1] if rule.per_location else values


def vectors_of(layer: CapturedLayer, rule: SimilarityRule, file: Path) -> Tensor:
    """One vector per image as tokens of one location, (N, 1, C) float32; `file` keeps it for the other kernels."""
    if rule.vector == "mean":  # captures hold it
        return layer.pooled[:, None].float()

    def make() -> Arrays:
        return {"vectors": layer.vectors(rule.vector).float().numpy()}

    return torch.from_numpy(once(file, f"{rule.vector} of {layer.provenance}", make)["vectors"])[:, None]


def nearest_images(
    values: np.ndarray, top: int, groups: tuple[Sequence[str], Sequence[str]] | None = None
) -> np.ndarray:
    """Find the most similar images of each query.

    Args:
        values: similarities (N, M); among equal ones, the earlier image ranks first.
        top: number of images per query.
        groups: group names of the queries (N,) and of the images (at least M); images in the group of a query are not
            candidates for it.

    Returns:
        Indices of the images, nearest first, (N, top); -1 where candidates run out.
    """
    allowed = np.ones(values.shape, dtype=bool)
    if groups is not None:
        allowed = np.array(groups[0])[:, None] != np.array(groups[1])[None, : values.shape[1]]
    ranked = np.where(allowed, values, -np.inf)
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :top]
    return np.where(np.take_along_axis(allowed, order, axis=1), order, -1)
