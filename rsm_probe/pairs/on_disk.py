"""All pairs of captured images: in tiles, on any executor, continued after interruptions, in bounded memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import CostError, RepresentationError, StorageError
from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import finished, one_thread
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.demand import remark
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.products import permutation_dtype
from rsm_probe.pairs.settings import attributes_of, own_tile, settings_of
from rsm_probe.pairs.tile_plan import TILE_SECONDS, Plan
from rsm_probe.pairs.tiles import (
    KIND,
    Job,
    LayerAddress,
    Task,
    array_names,
    compute,
    create_arrays,
    forget_tokens,
    holds_all,
)
from rsm_probe.pairs.timing import core_seconds_per_pair, seconds_per_pair, timing_matcher
from rsm_probe.pairs.token_sets import centred_tokens, warn_of_other_layer
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.disk_space import require_space
from rsm_probe.storage.files import open_dataset
from rsm_probe.storage.paths import absolute, path_or_url

if TYPE_CHECKING:
    import xarray as xr

# Images whose pairs are timed, and numbers in their tokens, of which there may be fewer images, but at least 3.
_SAMPLED, _SAMPLED_NUMBERS = 11, 1 << 24


def all_pairs(
    x: CapturedLayer,
    y: CapturedLayer | None = None,
    out: str | Path | None = None,
    matching: str | Matching = "optimal",
    centering: Centering | None = None,
    *,
    tile: int | None = None,
    permutations: bool = False,
    device: str | torch.device | None = None,
    workers: int | None = None,
    memory: str | int = "2GB",
    max_hours: float | None = 12.0,
    executor: Executor | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Matched inner products of all pairs of captured images, tile by tile, onto disk.

    Finished tiles are never computed again: the same call resumes after an interruption. Checksums reveal torn or
    damaged tiles, which are recomputed. For a given tile size, arrays are bit-identical whatever executes the tiles on
    processors of one kind; devices agree within the certified gap.

    Args:
        x: the images in the rows, a layer of a `Capture`.
        y: the images in the columns; None for those of x, each pair of which is matched once.
        out: a folder, or a URL of a file system that fsspec knows; None to return the result in memory.
        matching: a name or a method object.
        centering: see `rsm_probe.rsm`; the mean is that of y where y is given.
        tile: images on each side of a tile; by default derived from the size of the representations and `memory`. A
            result that was begun keeps its own.
        permutations: also keep the matched locations, (N, M, S).
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one. "cuda" is every GPU of this
            machine, with one worker each; for workers of an executor it is their current one, and "auto" and None the
            CPU.
        workers: CPU threads that match; None for all cores. Results do not depend on it. Each computes a tile at a
            time; where devices match, there is one worker for each of them.
        memory: memory budget, as bytes or text such as "2GB", shared by all workers of this machine.
        max_hours: refuse work whose estimated time is longer; None for no limit. The time of an executor is not known.
        executor: where tiles of pairs are computed; None for threads of this process. Workers of other processes and
            machines must see captures and `out` under the same paths or URLs.
        progress: show the estimated cost and progress bars.

    Returns:
        A dataset whose arrays are read on use: `product` and `bound` (image_a, image_b), squared norms `norm_a` and
        `norm_b`, and `permutation` where asked for. No matching exceeds its bound, up to the rounding of affinities,
        some 1e-7 of |x| |y| in float32; the bound is infinite where the method proves nothing.

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
        >>> capture = rsm_probe.capture(model, torch.rand(6, 3, 8, 8), ["0"], "capture.zarr")
        >>> pairs = rsm_probe.all_pairs(capture["0"], out="pairs.zarr")
        >>> pairs["product"].shape
        (6, 6)
        >>> rsm_probe.RSM.from_pairs(pairs, "cosine").values.shape    # any kernel, without matching again
        (6, 6)

    Raises:
        RepresentationError: the layers differ in their channels.
        MatchingError: unknown matching, or permutations of a score.
        CostError: one affinity alone, or a tile, exceeds the memory; the estimate is above `max_hours`; the device is
            not there; a worker process died.
        StorageError: `out` holds another result (the message says what differs), is being written by another process,
            or cannot be written; the disk is too small; a capture cannot be read.
    """
    execution = Execution(device, workers, memory, max_hours, executor, progress)
    return match_on_disk(x, y, out, matching, centering, tile, permutations, execution)


def match_on_disk(
    x: CapturedLayer,
    y: CapturedLayer | None,
    out: str | Path | None,
    matching: str | Matching,
    centering: Centering | None,
    tile: int | None,
    permutations: bool,
    execution: Execution,
) -> xr.Dataset:
    """See `all_pairs`."""
    wanted = None if out is None else path_or_url(out)
    run_on = _planned(x, y, matching, centering, tile, permutations, execution)
    if wanted is None and execution.executor is not None:
        raise StorageError("an executor writes to disk: give out=, a folder that all workers see")
    with TemporaryDirectory(prefix="rsm-probe-") if wanted is None else nullcontext() as temporary:
        folder = f"{temporary}/pairs.zarr" if wanted is None else absolute(wanted)
        # Refuse or read an existing result without a lock and without writing.
        existing = ChunkStore.existing(folder, KIND)
        if existing is not None and run_on(existing, folder).is_whole():
            return open_pairs(folder)
        with ChunkStore.writing(folder, KIND) as store:
            run = run_on(store, folder)
            run.find_left()
            if run.left:
                run.begin()
                try:
                    with execution.pool(run.plan.workers(run.job.tile), execution.worker_device()) as pool:
                        run.compute(pool)
                finally:
                    forget_tokens()
            store.finish({}, array_names(run.job))
        dataset = open_pairs(folder)
        return dataset.load() if wanted is None else dataset


def pairs_left(
    x: CapturedLayer,
    y: CapturedLayer | None,
    out: str,
    matching: str | Matching,
    centering: Centering | None,
    tile: int | None,
    permutations: bool,
    execution: Execution,
) -> int:
    """Number of pairs that `all_pairs` would match in a folder, or at a URL, as it is now; nothing is written.

    Raises:
        RsmProbeError: `all_pairs` would refuse it.
    """
    existing = ChunkStore.existing(out, KIND)
    if existing is None:
        return Workload.of(x.shape, None if y is None else y.shape).pairs
    return _planned(x, y, matching, centering, tile, permutations, execution)(existing, out).pairs_left()


def _planned(
    x: CapturedLayer,
    y: CapturedLayer | None,
    matching: str | Matching,
    centering: Centering | None,
    tile: int | None,
    permutations: bool,
    execution: Execution,
) -> Callable[[ChunkStore, str], _Run]:
    """Check the arguments of `all_pairs`; return what begins or continues the work in a store and its folder."""
    label, method = get_matching(matching)
    centering = check_centering(centering)
    if not isinstance(x, CapturedLayer) or not isinstance(y, CapturedLayer | None):
        raise RepresentationError(
            "all_pairs takes layers of captures; rsm_probe.capture makes them, and rsm_probe.rsm also takes tokens"
        )
    if not isinstance(permutations, bool):
        raise RepresentationError(f"permutations must be True or False, found {brief(permutations)}")
    device = execution.worker_device()
    if tile is not None:
        require_whole(tile, "tile", 1, CostError)
    if y is not None and y.shape[2] != x.shape[2]:
        raise RepresentationError(f"{x!r} and {y!r} differ in their channels: both must come from the same layer")
    if y is not None:
        warn_of_other_layer(x, y)
    workload = Workload.of(x.shape, None if y is None else y.shape)
    solver = device if workload.on_device(method, device, torch.float32) else None
    plan = Plan.of(x, x if y is None else y, method, permutations, execution, solver)
    settings = settings_of(x, y, label, method, centering, permutations)

    def run_on(store: ChunkStore, folder: str) -> _Run:
        side = own_tile(store, settings, tile or plan.tile, x, y)
        plan.require_memory(side)
        addresses = LayerAddress.of(x), None if y is None else LayerAddress.of(y)
        job = Job(*addresses, folder, method, centering, str(device), permutations, side, workload)
        return _Run(store, job, x, x if y is None else y, plan, settings, execution)

    return run_on


def require_pairs_time(execution: Execution, seconds: float, pairs: int, locations: int) -> None:
    """Refuse the pairs of a layer that would take too long.

    Raises:
        CostError: the estimate exceeds `max_hours`.
    """
    advice = f"take fewer images, a layer of fewer than {locations} locations, more workers"
    execution.require_time(seconds, f"{pairs:,} pairs", lambda _: advice)


def open_pairs(where: str | Path) -> xr.Dataset:
    """Open what `all_pairs` wrote; arrays are read on use.

    Raises:
        StorageError: the result is missing or unfinished, or one of its files is missing or damaged (the message names
            it).
    """
    store = ChunkStore.open(where, KIND)
    if not store.finished:
        raise StorageError(f"{where} is not finished; run the same work on it again, it continues")
    return open_dataset(where)


def largest_gap(pairs: xr.Dataset) -> float:
    """The largest possible distance of a product from the optimum, relative to the norms, computed by rows of tiles.

    NaN where nothing is proven.
    """
    if "bound" not in pairs:
        return float("nan")
    largest, step = 0.0, int(pairs.attrs.get("tile", pairs.sizes["image_a"]))
    for start in range(0, pairs.sizes["image_a"], step):
        part = pairs.isel(image_a=slice(start, start + step))
        scale = np.sqrt(np.outer(part["norm_a"].values, part["norm_b"].values))
        gaps = part["bound"].values - part["product"].values
        largest = max(largest, float(np.divide(gaps, scale, out=np.zeros_like(scale), where=scale > 0).max()))
    return largest if np.isfinite(largest) else float("nan")


class _Run:
    """One attempt to complete a result."""

    def __init__(
        self,
        store: ChunkStore,
        job: Job,
        x: CapturedLayer,
        y: CapturedLayer,
        plan: Plan,
        settings: dict[str, Any],
        execution: Execution,
    ) -> None:
        self.store, self.job, self.x, self.y, self.plan, self.settings = store, job, x, y, plan, settings
        self.execution = execution
        self.tasks = list(job.tasks(len(x), len(y)))
        self.left = self.tasks

    def find_left(self) -> None:
        """Read existing tiles; those that are missing or damaged are left to compute.

        Raises:
            StorageError: an array lost its metadata.
        """
        if "product" in self.store:
            create_arrays(self.store, self.job, self.x, self.y)  # names may have been lost
            self.left = [task for task in self._checked() if not task.is_there(self.store)]

    def pairs_left(self) -> int:
        """Number of pairs in tiles that are missing or damaged; reads every tile."""
        begun = all(name in self.store for name in array_names(self.job))
        return sum(task.pairs for task in self.tasks if not (begun and task.is_there(self.store)))

    def is_whole(self) -> bool:
        """Whether the result is marked as finished and all its tiles are intact; reads every tile.

        Raises:
            StorageError: an array lost its metadata.
        """
        if not self.store.finished or not holds_all(self.store, self.job, self.x, self.y):
            return False
        return all(task.is_there(self.store) for task in self._checked())

    def _checked(self) -> Iterable[Task]:
        return self.execution.bar("checking tiles", len(self.tasks), "tile", items=self.tasks, leave=False)

    def begin(self) -> None:
        """Report the cost of the remaining work, refuse what does not fit, and create the arrays.

        Raises:
            CostError: it would take longer than the limit.
            StorageError: the disk is too small.
        """
        pairs = sum(task.pairs for task in self.left)
        size = len(self.x) * len(self.y) * 16
        if self.job.permutations:
            size += len(self.x) * len(self.y) * self.x.shape[1] * permutation_dtype(self.y.shape[1]).itemsize
        share = pairs / max(1, sum(task.pairs for task in self.tasks))
        disk = require_space(self.job.out, size * share)
        workers = self.plan.workers(self.job.tile)
        # Time pairs only where the estimate is shown or checked.
        asked = self.execution.progress or self.execution.limits_time
        seconds = self._seconds(pairs, workers) if asked else 0.0
        require_pairs_time(self.execution, seconds, pairs, self.x.shape[1])
        memory = workers * self.plan.tile_bytes(self.job.tile)
        work = (
            f"all pairs of {self.x.name}: {pairs:,} pairs in {len(self.left)} tiles of {self.job.tile} x "
            f"{self.job.tile}"
        )
        self.execution.say(
            f"{work}; about {format_seconds(seconds)} with {workers} workers, {format_bytes(memory)} of memory, {disk}"
        )
        if not self.execution.progress and (text := remark(work, seconds, memory)) is not None:
            warnings.warn(text, stacklevel=5)
        self.store.set({"settings": self.settings, "tile": self.job.tile, **attributes_of(self.job, self.settings)})
        self.store.claimed = True
        create_arrays(self.store, self.job, self.x, self.y)

    def compute(self, executor: Executor) -> None:
        """Compute the tiles that are left."""
        total, left = (sum(task.pairs for task in tasks) for tasks in (self.tasks, self.left))
        with self.execution.bar("pairs", total, "pair", done=total - left) as bar:
            if len(self.left) < len(self.tasks):
                bar.set_postfix_str(f"{len(self.tasks) - len(self.left)} tiles restored")
            for _, pairs in finished(executor, compute, self.left):
                bar.update(pairs)

    def _seconds(self, pairs: int, workers: int) -> float:
        """Estimated seconds of the tiles that are left: a few images are read, and a few of their pairs timed."""
        # Lazy, as importing this package stays light; here, so that this second is not part of the time that is left.
        import xarray  # noqa: F401

        y = (self.job.y or self.job.x).open()  # as workers do: a capture that is gone is named
        with one_thread(), torch.no_grad():
            _, locations, channels = y.shape
            few = max(3, min(_SAMPLED, _SAMPLED_NUMBERS // (locations * channels)))
            reading = np.inf
            for _ in range(2):  # the first opens files
                start = time.perf_counter()
                tokens = centred_tokens(y, slice(0, min(few, len(y))), y, self.job.centering)
                reading = min(reading, (time.perf_counter() - start) * max(1.0, self.job.tile / few))
            if len(tokens) < 2:
                return 0.0
            tiles = len(self.left) * (TILE_SECONDS + 2 * reading / workers)
            if self.job.device != "cpu":
                tokens = tokens.to(self.job.device)
            method, workload = self.job.method, self.job.workload
            if workload.on_device(method, tokens.device, tokens.dtype):
                return tiles + seconds_per_pair(tokens, method, at_once=workload.pairs) * pairs / workers
            images, tokens = max(2, self.job.tile), tokens.cpu()
            with timing_matcher(replace(self.execution, workers=workers)) as matcher:
                seconds = core_seconds_per_pair(tokens, method, matcher, images, pairs, grid=y.grid)
                return tiles + seconds * pairs / matcher.threads
