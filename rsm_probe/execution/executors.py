"""Run tasks on any `concurrent.futures.Executor`: threads of this process, a pool of processes, a Dask cluster.

Workers receive only names of stores and indices of images; they read tokens and write results themselves.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch

from rsm_probe.errors import CostError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
# Tasks submitted at a time: enough to occupy any cluster, and few enough for the memory of its scheduler.
_SUBMITTED = 1000


@contextmanager
def threads(count: int, device: torch.device | None = None) -> Iterator[Executor]:
    """Make an executor of threads; on exit, running tasks finish and pending tasks are cancelled.

    Args:
        count: number of threads.
        device: "cuda" without a number distributes the threads over all GPUs: each gets one as its current device.
    """
    numbers = itertools.count()

    def bind() -> None:
        if device is not None and device.type == "cuda" and device.index is None:
            torch.cuda.set_device(next(numbers) % torch.cuda.device_count())

    pool = ThreadPoolExecutor(count, thread_name_prefix="rsm-probe", initializer=bind)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_workers(device: torch.device) -> int:
    """Number of threads for GPUs that match: one per GPU, or a single one for a specific device."""
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1


@contextmanager
def cluster(address: str, patience: float = 30.0) -> Iterator[Executor]:
    """Connect to a Dask cluster, whose workers must see the stores under the same paths or URLs.

    Args:
        address: address of its scheduler, such as "tcp://10.0.0.1:8786".
        patience: seconds to wait for a response.

    Raises:
        CostError: Dask is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise CostError("Dask is not installed; pip install 'rsm-probe[dask]'") from error
    try:
        client = Client(address, timeout=patience)
    except (OSError, ValueError, TimeoutError) as error:
        raise CostError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        # Tasks write to fixed destinations, so running one twice is harmless.
        yield client.get_executor(pure=False, retries=2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run matrix products in the calling thread only: the workers of the executor already occupy the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        # PyTorch uses the last number set as the default of threads that start later.
        torch.set_num_threads(before)


def finished(
    executor: Executor, function: Callable[[_Task], _Result], tasks: Iterable[_Task]
) -> Iterator[tuple[_Task, _Result]]:
    """Run tasks and yield each with its result once it is done, in any order.

    Raises:
        CostError: a worker process died.
        Exception: a task failed; pending tasks are cancelled.
    """
    left = iter(tasks)
    running: dict[Future[_Result], _Task] = {}

    def submit(count: int) -> None:
        for task in itertools.islice(left, count):
            running[executor.submit(function, task)] = task

    try:
        submit(_SUBMITTED)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            submit(len(done))
    except BrokenProcessPool as error:
        raise CostError(
            f"a worker process died, perhaps because it ran out of memory ({error}); finished work is kept"
        ) from error
    finally:
        for future in running:
            future.cancel()
