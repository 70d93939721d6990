"""Blocks of queries as tasks: workers of an executor search the whole database for some queries each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import finished, one_thread, threads
from rsm_probe.matching.matching import Matching
from rsm_probe.neighbours.bounded_search import Groups, Search
from rsm_probe.neighbours.candidates import Best
from rsm_probe.pairs.tiles import LayerAddress
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import Kernel

# Each task reads the database and summarises it: few of them, with many queries each.
_TASKS, _FEWEST_QUERIES = 32, 32


@dataclass(frozen=True)
class SearchJob:
    """What the tasks of a search share.

    Attributes:
        queries: the layer of the queries.
        database: the layer of the database.
        k: neighbours per query.
        method: the matching.
        kernel: orders candidates.
        centering: which mean of the database is subtracted.
        own: groups of queries and images; images of a query's own group are not candidates.
        device: where affinities are computed.
        memory: memory budget of a worker in bytes.
    """

    queries: LayerAddress
    database: LayerAddress
    k: int
    method: Matching
    kernel: Kernel
    centering: Centering | None
    own: Groups | None
    device: str
    memory: int

    def best(self, count: int, executor: Executor, on_done: Callable[[int], object]) -> Best:
        """The best images of all queries, in their order.

        Args:
            count: number of queries.
            executor: where they are searched.
            on_done: called with the number of queries whenever some are done.

        Raises:
            CostError: a worker process died.
            StorageError: a capture cannot be read.
        """
        parts = dict[int, Best]()
        for task, best in finished(executor, search, self._tasks(count)):
            parts[task.start] = best
            on_done(task.stop - task.start)
        return Best.joined([parts[start] for start in sorted(parts)])

    def _tasks(self, count: int) -> Iterator[SearchTask]:
        size = max(_FEWEST_QUERIES, -(-count // _TASKS))
        for start in range(0, count, size):
            yield SearchTask(self, start, min(start + size, count))


@dataclass(frozen=True)
class SearchTask:
    """Queries `start` to `stop` of a search."""

    job: SearchJob
    start: int
    stop: int


def search(task: SearchTask) -> Best:
    """Find the best images of some queries in one thread.

    Raises:
        StorageError: a capture cannot be read.
    """
    job = task.job
    execution = Execution(job.device, 1, job.memory)
    with threads(1) as pool, one_thread(), torch.no_grad():
        # The shapes of the whole work decide what a device solves: products do not depend on the tasks.
        all_queries, images = job.queries.open(), job.database.open()
        whole = Search(all_queries, images, job.method, job.kernel, job.centering, execution, pool)
        return whole.best(np.arange(task.start, task.stop), job.k, job.own)
