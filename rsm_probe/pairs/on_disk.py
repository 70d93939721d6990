"""All pairs of captured images: in tiles, on any executor, continued after interruptions, in bounded memory."""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.checks import brief, require_number, require_whole
from rsm_probe.errors import CostError, RepresentationError, StorageError
from rsm_probe.execution.amounts import format_bytes, format_seconds, parse_bytes
from rsm_probe.execution.devices import find_device
from rsm_probe.execution.executors import device_workers, finished, one_thread, threads
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.matcher import available_cores
from rsm_probe.pairs.products import permutation_dtype
from rsm_probe.pairs.settings import about, own_tile, settings_of
from rsm_probe.pairs.tile_plan import Plan
from rsm_probe.pairs.tiles import (
    KIND,
    Job,
    LayerAddress,
    array_names,
    compute,
    create_arrays,
    forget_tokens,
    holds_all,
)
from rsm_probe.pairs.timing import seconds_per_pair
from rsm_probe.pairs.token_sets import centred_tokens, warn_of_other_layer
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.disk_space import require_space
from rsm_probe.storage.files import open_dataset
from rsm_probe.storage.paths import absolute, path_or_url

if TYPE_CHECKING:
    import xarray as xr


def all_pairs(
    x: CapturedLayer,
    y: CapturedLayer | None = None,
    out: str | Path | None = None,
    matching: str | Matching = "optimal",
    centering: Centering | None = None,
    *,
    memory: str | int = "2GB",
    workers: int | None = None,
    executor: Executor | None = None,
    tile: int | None = None,
    permutations: bool = False,
    device: str | None = "auto",
    max_hours: float | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Matched inner products of all pairs of captured images, tile by tile, onto disk.

    A tile that is on disk is never computed again: interrupted, the same call continues, and a tile that was torn or
    damaged is found by its checksum and made again. Whatever executes the tiles, the arrays are the same to the last
    bit for a given tile size on processors of one kind; on devices, up to the gap that is certified.

    Args:
        x: the images in the rows, a layer of a `Capture`.
        y: the images in the columns; None for those of x, each pair of which is matched once.
        out: a folder, or a URL of a file system that fsspec knows; None for a temporary one, whose content is then
            returned in memory.
        matching: a name or a method object.
        centering: see `rsm_probe.rsm`; the mean is that of y where y is given.
        memory: what the workers of this machine may use together, as bytes or text such as "2GB".
        workers: how many tiles are computed at a time on one machine; None for one per core. Where devices match, there
            is one for each of them.
        executor: where they are computed; None for threads of this process. Workers of other processes and machines
            must see captures and `out` under the same paths or URLs.
        tile: images on each side of a tile; by default from the size of the representations and `memory`. A result
            that was begun keeps its own.
        permutations: also keep how locations were paired, (N, M, S).
        device: where affinities are computed, and matched where it has a kernel: "auto" for a GPU where there is one,
            or "cpu", "cuda", "cuda:1", "mps". "cuda" is every GPU of this machine, with one worker each; for workers of
            an executor it is their current one, and "auto" the CPU.
        max_hours: refuse if the estimated time, with threads of this process, is longer; an executor's is not known.
        progress: show what is needed, and a bar.

    Returns:
        A dataset whose arrays are read when they are used: `product`, `bound` (what no matching exceeds, up to the
        rounding of affinities, some 1e-7 of |x| |y| in float32; infinity where the method proves nothing)
        (image_a, image_b), `norm_a`, `norm_b` (squared), `permutation` where it is kept.

    Raises:
        RepresentationError: the layers differ in their channels.
        MatchingError: unknown matching, or permutations of a score.
        CostError: one affinity alone, or a tile, exceeds the memory; the estimate is above `max_hours`; the device is
            not there; a worker process died.
        StorageError: `out` holds another result (the message says what differs), is being written by another process,
            or cannot be written; the disk is too small; a capture cannot be read.
    """
    label, method = get_matching(matching)
    centering = check_centering(centering)
    wanted = None if out is None else path_or_url(out)
    if not isinstance(x, CapturedLayer) or not isinstance(y, CapturedLayer | None):
        raise RepresentationError(
            "all_pairs takes layers of captures; rsm_probe.capture makes them, and rsm_probe.rsm also takes tokens"
        )
    if not isinstance(executor, Executor | None):
        raise CostError(f"executor must be a concurrent.futures.Executor, found {brief(executor)}")
    if not isinstance(permutations, bool):
        raise RepresentationError(f"permutations must be True or False, found {brief(permutations)}")
    if max_hours is not None:
        require_number(max_hours, "max_hours", CostError, least=0)
    where = _device(device, executor)
    workers = available_cores() if workers is None else workers
    require_whole(workers, "workers", 1, CostError)
    if tile is not None:
        require_whole(tile, "tile", 1, CostError)
    if y is not None and y.shape[2] != x.shape[2]:
        raise RepresentationError(f"{x!r} and {y!r} differ in their channels: not one layer's")
    if y is not None:
        warn_of_other_layer(x, y)
    workload = Workload.of(x.shape, None if y is None else y.shape)
    stays = workload.on_device(method, where, torch.float32)
    workers = min(workers, device_workers(where)) if stays else workers
    plan = Plan.of(x, x if y is None else y, method, parse_bytes(memory), workers, permutations, stays)
    settings = settings_of(x, y, label, method, centering, permutations)
    if wanted is None and executor is not None:
        raise StorageError("an executor writes to disk: give out=, a folder that all workers see")
    with TemporaryDirectory(prefix="rsm-probe-") if wanted is None else nullcontext() as temporary:
        folder = f"{temporary}/pairs.zarr" if wanted is None else absolute(wanted)

        def run_on(store: ChunkStore) -> _Run:
            side = own_tile(store, settings, tile or plan.tile, x, y)
            plan.require_memory(side)
            addresses = LayerAddress.of(x), None if y is None else LayerAddress.of(y)
            job = Job(*addresses, folder, method, centering, str(where), permutations, side, workload)
            return _Run(store, job, x, x if y is None else y, plan, settings, progress)

        # What is there is refused, or read, without a lock and without writing.
        found = ChunkStore.existing(folder, KIND)
        if found is not None and run_on(found).is_whole():
            return open_pairs(folder)
        with ChunkStore.writing(folder, KIND) as store:
            run = run_on(store)
            run.find_left()
            if run.left:
                run.begin(max_hours if executor is None else None)
                try:
                    slots = plan.workers(run.job.tile)
                    with nullcontext(executor) if executor is not None else threads(slots, where) as pool:
                        run.compute(pool)
                finally:
                    forget_tokens()
            store.finish({}, array_names(run.job))
        dataset = open_pairs(folder)
        return dataset.load() if wanted is None else dataset


def open_pairs(where: str | Path) -> xr.Dataset:
    """Open what `all_pairs` wrote; arrays are read when they are used.

    Raises:
        StorageError: there is no finished result; a file of it is missing or damaged (the message names it).
    """
    store = ChunkStore.open(where, KIND)
    if not store.finished:
        raise StorageError(f"{where} is not finished; run the same work on it again, it continues")
    return open_dataset(where)


class _Run:
    """One go at a result."""

    def __init__(
        self,
        store: ChunkStore,
        job: Job,
        x: CapturedLayer,
        y: CapturedLayer,
        plan: Plan,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        self.store, self.job, self.x, self.y, self.plan, self.settings = store, job, x, y, plan, settings
        self.progress = progress
        self.tasks = list(job.tasks(len(x), len(y)))
        self.left = self.tasks

    def find_left(self) -> None:
        """Read what is there; tiles that are missing or damaged are left to do.

        Raises:
            StorageError: an array lost its metadata.
        """
        if "product" in self.store:
            create_arrays(self.store, self.job, self.x, self.y)  # names may have been lost
            bar = tqdm(self.tasks, "checking tiles", unit="tile", disable=not self.progress, leave=False)
            self.left = [task for task in bar if not task.is_there(self.store)]

    def is_whole(self) -> bool:
        """Whether all tiles are there, and the result says so; all of them are read.

        Raises:
            StorageError: an array lost its metadata.
        """
        if not self.store.finished or not holds_all(self.store, self.job, self.x, self.y):
            return False
        bar = tqdm(self.tasks, "checking tiles", unit="tile", disable=not self.progress, leave=False)
        return all(task.is_there(self.store) for task in bar)

    def begin(self, max_hours: float | None) -> None:
        """Say what the rest of the work needs, refuse what does not fit, and make the arrays.

        Raises:
            CostError: it would take longer than `max_hours`.
            StorageError: the disk is too small.
        """
        pairs = sum(task.pairs for task in self.left)
        size = len(self.x) * len(self.y) * 16
        if self.job.permutations:
            size += len(self.x) * len(self.y) * self.x.shape[1] * permutation_dtype(self.y.shape[1]).itemsize
        share = pairs / max(1, sum(task.pairs for task in self.tasks))
        disk = require_space(self.job.out, size * share)
        workers = self.plan.workers(self.job.tile)
        # Pairs are only timed for those who are told.
        asked = self.progress or max_hours is not None
        seconds = self._seconds_per_pair() * pairs / workers if asked else 0.0
        if max_hours is not None and seconds > max_hours * 3600:
            raise CostError(
                f"{pairs:,} pairs would take about {format_seconds(seconds)}, above max_hours={max_hours:g}; take "
                f"fewer images, a layer of fewer than {self.x.shape[1]} locations, or more workers"
            )
        if self.progress:
            memory = workers * self.plan.tile_bytes(self.job.tile)
            tqdm.write(
                f"all pairs of {self.x.name}: {pairs:,} pairs in {len(self.left)} tiles of {self.job.tile} x "
                f"{self.job.tile}; about {format_seconds(seconds)} with {workers} workers, {format_bytes(memory)} of "
                f"memory, {disk}",
                file=sys.stderr,
            )
        self.store.set({"settings": self.settings, "tile": self.job.tile, **about(self.job, self.settings)})
        self.store.claimed = True
        create_arrays(self.store, self.job, self.x, self.y)

    def compute(self, executor: Executor) -> None:
        """Compute the tiles that are left."""
        total, left = (sum(task.pairs for task in tasks) for tasks in (self.tasks, self.left))
        with tqdm(
            desc="pairs", total=total, initial=total - left, unit="pair", unit_scale=True, disable=not self.progress
        ) as bar:
            if len(self.left) < len(self.tasks):
                bar.set_postfix_str(f"{len(self.tasks) - len(self.left)} tiles restored")
            for _, pairs in finished(executor, compute, self.left):
                bar.update(pairs)

    def _seconds_per_pair(self) -> float:
        """Of two or three images: on one core, or on one device that matches."""
        few = slice(0, min(3, len(self.y)))
        with one_thread(), torch.no_grad():
            tokens = centred_tokens(self.y, few, self.y, self.job.centering)
            if len(tokens) < 2:
                return 0.0
            if self.job.device != "cpu":
                tokens = tokens.to(self.job.device)
            return seconds_per_pair(tokens, self.job.method, at_once=self.job.workload.pairs)


def _device(device: Any, executor: Executor | None) -> torch.device:
    """Where this process computes; which devices the workers of an executor have is not known here.

    Raises:
        CostError: not the name of a device, or one that is not there.
    """
    if executor is None:
        return find_device(device)
    try:
        return torch.device("cpu" if device in ("auto", None) else device)
    except (RuntimeError, TypeError, ValueError):
        raise CostError(f"device must be 'auto', 'cpu', 'cuda' or the like, found {brief(device)}") from None
