"""`rsm()`: the similarity of every image with every image, of tokens in memory or of captures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import ComparisonError, RepresentationError
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.pairs.on_disk import match_on_disk
from rsm_probe.pairs.pair_loop import affinity_bytes, require_machine
from rsm_probe.pairs.products import permutation_dtype
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.timing import announce, expected_seconds
from rsm_probe.pairs.token_sets import Tokens
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering, check_centering, subtract_mean, token_mean
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.similarity.labelled import dataset_of, described
from rsm_probe.similarity.rsm import RSM


def rsm(
    z: Tensor | np.ndarray | Representation | CapturedLayer,
    other: Tensor | np.ndarray | Representation | CapturedLayer | None = None,
    matching: str | Matching = "optimal",
    kernel: str | Kernel = "cosine",
    centering: Centering | None = None,
    *,
    grid: tuple[int, ...] | None = None,
    ids: Sequence[str] | None = None,
    other_ids: Sequence[str] | None = None,
    permutations: bool = False,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    memory: str | int = "2GB",
    max_hours: float | None = 12.0,
    executor: Executor | None = None,
    progress: bool = False,
) -> RSM:
    """The similarity of every image with every image (paper, algorithm 1).

    Args:
        z: tokens (N, S, C); a `Representation`, such as `probe.representations["layer1.0"]`, which knows its grid; or a
            layer of a `Capture`, whose images need not fit into memory.
        other: a database in the same form, with M images of T locations; None to compare the images of z with each
            other. Where S differs from T, surplus locations stay unmatched; norms always cover whole images.
        matching: "identity" for spatio-semantic RSMs, "optimal" for semantic ones, or a method object.
        kernel: "linear", "cosine", "rbf", or a kernel object with its options.
        centering: None; "location-mean", subtracting the mean over images at each location, as the paper does; or
            "channel-mean", over images and locations, which keeps the invariance to permutations. The mean is the
            database's where `other` is given.
        grid: (H, W) of the locations of plain tokens, which `matching="translation"` requires; it is never guessed.
        ids: names of the images of z.
        other_ids: names of the images of `other`.
        permutations: also keep the matched locations, as `permutation` in the RSM's dataset.
        out: for captured layers, a folder for the tiles, in which an interrupted call continues; see `all_pairs`.
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB", for affinities that wait to be matched; for
            captured layers, for everything.
        max_hours: refuse work whose estimated time is longer; None for no limit. Only captured layers are estimated.
        executor: where tiles of pairs are computed; None for threads of this process. Only for captured layers; see
            `all_pairs`.
        progress: show the estimated cost and progress bars; bars only for captured layers.

    Returns:
        An `RSM` whose `values` are (N, M) float64. Its dataset also holds the matched `product` of every pair and its
        upper `bound`, infinity where the matching proves nothing.

    Example:
        >>> import torch, rsm_probe
        >>> z = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))    # images, locations, channels
        >>> semantic = rsm_probe.rsm(z, matching="optimal", ids=["cat", "dog", "car"])
        >>> aligned = rsm_probe.rsm(z, matching="identity", ids=["cat", "dog", "car"])
        >>> semantic.values.shape
        (3, 3)
        >>> bool((semantic.values >= aligned.values - 1e-9).all())    # the best pairing is never worse than that one
        True

    Raises:
        RepresentationError: wrong shapes, NaN or infinity (the message names the image), unknown centring.
        MatchingError: unknown matching, or permutations of a score.
        ComparisonError: unknown kernel, one that does not apply to a score, wrong number of ids.
        CostError: one affinity alone exceeds the memory budget, or a pair what this machine has free (the message names
            a matching that fits); see `all_pairs` for captured layers.
        StorageError: a capture cannot be read, or `out` cannot be written or holds another result.

    Warns:
        UserWarning: without `progress`, that the work takes more than a minute or some GB of memory, before it starts.
    """
    label, method = get_matching(matching)
    kernel = get_kernel(kernel)
    check_kernel(kernel, label, method.one_to_one)
    centering = check_centering(centering)
    execution = Execution(device, workers, memory, max_hours, executor, progress)
    if not isinstance(permutations, bool):
        raise RepresentationError(f"permutations must be True or False, found {brief(permutations)}")
    if isinstance(z, CapturedLayer) or isinstance(other, CapturedLayer):
        if not (isinstance(z, CapturedLayer) and isinstance(other, CapturedLayer | None)):
            raise RepresentationError("z and other are both tokens, or both layers of captures")
        if grid is not None or ids is not None or other_ids is not None:
            raise RepresentationError("captured layers know their own grid and the names of their images")
        pairs = match_on_disk(z, other, out, method, centering, None, permutations, execution)
        return RSM.from_pairs(pairs, kernel)
    if out is not None or executor is not None:
        raise RepresentationError("out= and executor= are for layers of captures; rsm_probe.capture makes them")
    if other is None and other_ids is not None:
        raise ComparisonError("other_ids was given without other")
    _require_grid(grid)
    rows = Tokens(z, "z", ids, grid)
    x = rows.tokens()
    x = x.to(execution.device_or(x.device))
    columns = None if other is None else Tokens(other, "other", other_ids, grid)
    y = None if columns is None else columns.tokens()
    if y is not None:
        if y.shape[2] != x.shape[2]:
            raise RepresentationError(
                f"z has {x.shape[2]} channels and other has {y.shape[2]}: both must come from the same layer"
            )
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(x.device, dtype)
    if centering is not None:
        mean = token_mean(x if y is None else y, centering)
        x, y = subtract_mean(x, mean), None if y is None else subtract_mean(y, mean)
    shapes = tuple(x.shape), tuple((x if y is None else y).shape)
    size, count = x.element_size(), Workload.of(x.shape, None if y is None else y.shape).pairs
    affinity = affinity_bytes(method, shapes[0][1], shapes[1][1], execution.memory_bytes, size)
    require_machine(method, *shapes, size, x.device)
    scratch = execution.worker_count * method.scratch_bytes(shapes[0][1], shapes[1][1], size) if affinity else 0
    announce(
        execution,
        f"rsm: {count:,} pairs of {shapes[0][1]} x {shapes[1][1]} locations by {label!r}",
        expected_seconds(x, x if y is None else y, method, count, execution),
        min(execution.memory_bytes, count * affinity) + scratch + 32 * shapes[0][0] * shapes[1][0],
    )
    sides = Side.of(x, rows.grid), None if y is None or columns is None else Side.of(y, columns.grid)
    with PairMatcher(execution) as matcher:
        known = matcher.submit(*sides, {label: method}, bounds=True, permutations=permutations).matched()[label]
    axes, attributes = ("image_a", "image_b"), {"matching": label, "one_to_one": int(method.one_to_one)}
    values = kernel(known.products, known.norms_x, known.norms_y, same=y is None)
    dataset = dataset_of(values, rows.ids, None if columns is None else columns.ids).assign(
        product=(axes, known.products),
        bound=(axes, known.bounds),
        norm_a=("image_a", known.norms_x),
        norm_b=("image_b", known.norms_y),
    )
    if known.permutations is not None:
        permuted = known.permutations.astype(permutation_dtype((x if y is None else y).shape[1]))
        dataset = dataset.assign(permutation=((*axes, "location"), permuted))
    return RSM(described(dataset.assign_attrs(attributes, centering=str(centering)), kernel))


def _require_grid(grid: Any) -> None:
    """Refuse anything but None, or the sides of a grid.

    Raises:
        RepresentationError: not a sequence of whole numbers above 0.
    """
    if grid is None:
        return
    if isinstance(grid, str | bytes) or not isinstance(grid, Sequence | np.ndarray) or not np.ndim(grid):
        raise RepresentationError(f"grid must be the sides (H, W) of the locations, found {brief(grid)}")
    for side in grid:
        require_whole(side, "each side of grid", 1, RepresentationError)
