"""Exact nearest neighbours: only pairs whose upper bound puts them among the best are matched."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.checks import brief, require_texts, require_whole
from rsm_probe.errors import ComparisonError, RepresentationError
from rsm_probe.execution.amounts import format_seconds
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import threads
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.neighbours.bounded_search import AllProducts, Groups, Search
from rsm_probe.neighbours.candidates import Best, Counts
from rsm_probe.neighbours.query_blocks import SearchJob
from rsm_probe.neighbours.shortlist import pooled_candidates
from rsm_probe.pairs.pair_loop import affinity_bytes, require_machine
from rsm_probe.pairs.tiles import LayerAddress
from rsm_probe.pairs.timing import announce, expected_seconds
from rsm_probe.pairs.token_sets import TokenSet, as_set, warn_of_other_layer
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import RBF, Kernel, check_kernel, get_kernel

if TYPE_CHECKING:
    import xarray as xr

# Queries whose neighbours are also searched beyond the shortlist, to measure its recall.
_CHECKED = 16
# Images of each side whose pairs are timed.
_TIMED = 11


def nearest(
    query: Tensor | np.ndarray | Representation | CapturedLayer,
    database: Tensor | np.ndarray | Representation | CapturedLayer,
    k: int = 5,
    matching: str | Matching = "optimal",
    kernel: str | Kernel = "cosine",
    centering: Centering | None = None,
    *,
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
    shortlist: int | None = None,
    query_ids: Sequence[str] | None = None,
    database_ids: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    memory: str | int = "2GB",
    progress: bool = False,
) -> xr.Dataset:
    """The k most similar images of a database for every query, exactly as if all pairs were matched.

    Pairs are matched in descending order of an upper bound of their similarity, until no bound exceeds the k-th best
    similarity. The first bound is an inner product of short summaries of the images (see `matching.bounds.Summaries`).
    Pairs that pass it face a second one, the sum of each location's best affinity, before they are matched.

    Args:
        query: tokens (N, S, C), a `Representation`, or a layer of a `Capture`.
        database: in the same form, with M images of T locations.
        k: neighbours per query, at most the number of images in the database.
        matching: a name or a method object that pairs all locations of the smaller image. Scores have no bound and are
            computed for all pairs.
        kernel: "linear", "cosine", "rbf", or a kernel object. The width of "rbf" is the median distance of all pairs,
            as in `rsm(query, database)`, including those that groups and shortlists leave out: all pairs are matched
            for it, with a warning. The order does not depend on the width: `RBF(sigma2=...)` finds the same neighbours
            and matches few pairs.
        centering: see `rsm_probe.rsm`; the mean is the database's.
        groups: one name per query, and one per image of the database; images of the query's own group, such as frames
            of one video, are not candidates.
        shortlist: number of candidates to match per query: those whose means over locations are most similar
            (cosine), found by FAISS. The result is then exact among these, and its `recall` is the share of true
            neighbours on the shortlist.
        query_ids: names of the queries; captures hold theirs.
        database_ids: names of the images of the database.
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one. Queries follow the database.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB".
        progress: show the estimated cost and progress bars, and how much work was saved.

    Returns:
        A dataset (query, rank) with `neighbour` (names), `index` (in the database), `similarity` and `product`. Where
        candidates run out, these are "", -1 and NaN. Ties keep the order of the database. Attributes: `pairs`
        (candidates), the numbers of computed `affinities` and `matchings`, `seconds` in total, `seconds_bounds`,
        `seconds_of_all_pairs` (a sample of pairs, matched as a whole tile, scaled to all pairs and workers), the shares
        `saved_matchings` and `saved_time` (0 where nothing was saved), `sigma2` of an RBF kernel, and the `recall` of a
        shortlist.

    Example:
        >>> import torch, rsm_probe
        >>> database = torch.randn(20, 9, 8, generator=torch.Generator().manual_seed(0))    # 20 images of 9 locations
        >>> queries = database[:2].flip(1)    # two of them, locations in another order
        >>> neighbours = rsm_probe.nearest(queries, database, k=3)
        >>> neighbours["index"][:, 0].values.tolist()    # the images themselves
        [0, 1]

    Raises:
        RepresentationError: wrong shapes, different numbers of channels, NaN or infinity.
        MatchingError: unknown matching.
        ComparisonError: unknown kernel, or one that does not apply; wrong k, ids or groups; FAISS is not installed.
        CostError: one affinity alone, or the distances whose median is the width, exceed the memory; the device is not
            available.
        StorageError: a capture cannot be read.
    """
    return find_nearest(
        query, database, k, matching, kernel, centering, groups, shortlist, query_ids, database_ids,
        Execution(device, workers, memory, progress=progress),
    )  # fmt: skip


def find_nearest(
    query: Tensor | np.ndarray | Representation | CapturedLayer,
    database: Tensor | np.ndarray | Representation | CapturedLayer,
    k: int,
    matching: str | Matching,
    kernel: str | Kernel,
    centering: Centering | None,
    groups: tuple[Sequence[str], Sequence[str]] | None,
    shortlist: int | None,
    query_ids: Sequence[str] | None,
    database_ids: Sequence[str] | None,
    execution: Execution,
) -> xr.Dataset:
    """See `nearest`."""
    label, method = get_matching(matching)
    kernel = get_kernel(kernel)
    check_kernel(kernel, label, method.one_to_one)
    queries, images = as_set(query, "query", query_ids), as_set(database, "database", database_ids)
    captured = isinstance(queries, CapturedLayer) or isinstance(images, CapturedLayer)
    workers_on = None if execution.executor is None else execution.worker_device()
    execution = replace(execution, device=execution.device_or("auto" if captured else images.tokens(slice(1)).device))
    if queries.shape[2] != images.shape[2]:
        raise RepresentationError(
            f"queries have {queries.shape[2]} channels and the database has {images.shape[2]}: both must come from the "
            "same layer"
        )
    if isinstance(queries, CapturedLayer) and isinstance(images, CapturedLayer):
        warn_of_other_layer(queries, images)
    require_whole(k, "k", 1, ComparisonError)
    if k > len(images):
        raise ComparisonError(
            f"k={k} neighbours were asked for, but the database has only {len(images)} images; use k={len(images)} or "
            f"less, or a larger database"
        )
    if shortlist is not None:
        require_whole(shortlist, "shortlist", k, ComparisonError)
        shortlist = int(shortlist)  # FAISS does not take NumPy's
    own = _own_groups(groups, len(queries), len(images))
    affinity_bytes(method, queries.shape[1], images.shape[1], execution.memory_bytes)
    require_machine(method, queries.shape, images.shape, 4, execution.device_or("cpu"))
    if kernel.needs_width and not method.at_once:
        warnings.warn(
            f"kernel='rbf' takes its width from the distances of all {len(queries)} x {len(images)} pairs, which are "
            f"all matched for it; give a width, as in RBF(sigma2=...), to find the same neighbours with few matchings",
            stacklevel=3,
        )
    started, everything = time.perf_counter(), np.arange(len(queries))
    seconds = 0.0
    with threads(execution.worker_count) as pool, torch.no_grad():
        search = Search(queries, images, method, kernel.ordering, check_centering(centering), execution, pool)
        _announce(search, label, all_matched=kernel.needs_width or not method.one_to_one)
        known = search.match_all() if kernel.needs_width else None
        with execution.bar("queries", len(queries), "query") as bar:
            if (
                execution.executor is not None
                and isinstance(queries, CapturedLayer)
                and isinstance(images, CapturedLayer)
                and known is None
                and shortlist is None
                and not method.at_once  # all pairs at once take less time than workers to read their tokens
            ):
                sides = LayerAddress.of(queries), LayerAddress.of(images)
                options = str(workers_on), execution.memory_bytes
                job = SearchJob(*sides, k, method, kernel.ordering, check_centering(centering), own, *options)
                best, recall = job.best(len(queries), execution.executor, bar.update), None
            elif shortlist is None:
                best, recall = search.best(everything, k, own, on_done=bar.update, known=known), None
            else:
                candidates = pooled_candidates(queries.pooled, images.pooled, shortlist, own, centering is not None)
                if known is None:
                    best = search.best_among(candidates, k, on_done=bar.update)
                else:
                    best = search.best(everything, k, None, dict(enumerate(candidates)), bar.update, known)
                seconds = time.perf_counter() - started  # measuring the recall does not count
                recall = _recall(search, best, k, own, known)
    counts = best.counts
    if known is not None:
        counts.add(known.counts)
        kernel = RBF(max(known.median_distance, float(np.finfo(np.float64).tiny)))
    result = _labelled(queries, images, best, kernel)
    counted = {key: value for key, value in asdict(counts).items() if not key.endswith("_seconds")}
    result.attrs.update(matching=label, kernel=kernel.name, centering=str(centering), **counted)
    seconds = seconds or time.perf_counter() - started
    pairs = len(queries) * len(images) - (0 if own is None else int((own[0][:, None] == own[1][None]).sum()))
    per_pair = search.seconds_per_pair(max(0.5, 0.05 * seconds)) / (1 if search.on_device else execution.worker_count)
    result.attrs.update(_savings(counts, pairs, seconds, per_pair))
    if known is not None:
        result.attrs["sigma2"] = known.median_distance
    if recall is not None:
        result.attrs.update(shortlist=shortlist, recall=recall)
    execution.say(_summary(result))
    return result


def _announce(search: Search, label: str, all_matched: bool) -> None:
    """Say what the search takes before it starts; how many pairs bounds rule out is only known afterwards."""
    queries, images, execution = search.queries, search.images, search.execution
    pairs = len(queries) * len(images)
    x, y = search.few(_TIMED)
    announce(
        execution,
        f"nearest: {pairs:,} pairs of {queries.shape[1]} x {images.shape[1]} locations by {label!r}",
        expected_seconds(x, y, search.method, pairs, execution),
        execution.memory_bytes,
        "about" if all_matched else "if no bound rules out any, about",
    )


def _own_groups(groups: tuple[Sequence[str], Sequence[str]] | None, queries: int, images: int) -> Groups | None:
    """Number the groups of queries and of images.

    Raises:
        ComparisonError: not a pair, names that are not text, or a wrong number of them.
    """
    if groups is None:
        return None
    if not isinstance(groups, tuple | list) or len(groups) != 2:
        raise ComparisonError(
            f"groups is a pair: a name for each query, and one for each image of the database; found {brief(groups)}"
        )
    names = [require_texts(part, f"groups[{side}]", ComparisonError) for side, part in enumerate(groups)]
    for what, part, count in (("queries", names[0], queries), ("database", names[1], images)):
        if len(part) != count:
            raise ComparisonError(f"groups holds {len(part)} names for {count} images of the {what}")
    numbers = np.unique(names[0] + names[1], return_inverse=True)[1]
    return numbers[:queries], numbers[queries:]


def _recall(search: Search, best: Best, count: int, own: Groups | None, known: AllProducts | None) -> float:
    """The share of true neighbours on a shortlist, for some evenly spaced queries."""
    checked = np.unique(np.linspace(0, len(best.index) - 1, _CHECKED).astype(int))
    true = search.best(checked, count, own, known=known).index
    held = [np.isin(row[row >= 0], best.index[query]) for query, row in zip(checked, true, strict=True)]
    return float(np.concatenate(held).mean()) if sum(map(len, held)) else float("nan")


def _labelled(queries: TokenSet, images: TokenSet, best: Best, kernel: Kernel) -> xr.Dataset:
    import xarray as xr

    names = np.array([*images.ids, ""])
    dimensions = ("query", "rank")
    return xr.Dataset(
        {
            "neighbour": (dimensions, names[best.index]),
            "index": (dimensions, best.index),
            "similarity": (dimensions, kernel.of_ordering(best.similarities)),
            "product": (dimensions, best.products),
        },
        coords={"query": queries.ids, "rank": np.arange(1, best.index.shape[1] + 1)},
    )


def _savings(counts: Counts, pairs: int, seconds: float, seconds_per_pair: float) -> dict[str, float]:
    all_pairs = seconds_per_pair * pairs
    return {
        "seconds": seconds,
        "seconds_bounds": counts.bound_seconds,
        "seconds_of_all_pairs": all_pairs,
        # The width of an RBF kernel may be the median of more pairs than are candidates.
        "saved_matchings": max(0.0, 1 - counts.matchings / max(pairs, 1)),
        # With few pairs, the bounds may cost more than the matchings that they save.
        "saved_time": max(0.0, 1 - seconds / all_pairs) if all_pairs else 0.0,
    }


def _summary(result: xr.Dataset) -> str:
    facts = result.attrs
    return (
        f"nearest: {facts['matchings']:,} of {facts['pairs']:,} pairs matched ({facts['saved_matchings']:.0%} saved) "
        f"in {format_seconds(facts['seconds'])}; all would take about {format_seconds(facts['seconds_of_all_pairs'])}"
        + (f"; recall of the shortlist {facts['recall']:.2f}" if "recall" in facts else "")
    )
