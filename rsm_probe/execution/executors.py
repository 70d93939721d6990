"""Work on any `concurrent.futures.Executor`: threads of this process, a pool of processes, a Dask cluster.

There is no scheduler here. What goes to a worker are names of stores and numbers of images; tokens are read, and
results written, by the workers.
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
# Tasks that an executor knows of at a time: more than any cluster works on, and few enough to hold in its scheduler.
_SUBMITTED = 1000


@contextmanager
def threads(count: int, device: torch.device | None = None) -> Iterator[Executor]:
    """Threads of this process; on the way out, those that run end their task, and no other begins.

    Args:
        count: how many.
        device: "cuda" without a number spreads them over all GPUs, of which each then has its own as current device.
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_workers(device: torch.device) -> int:
    """Threads for devices that match: one for each GPU, or for the one that is named."""
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1


@contextmanager
def cluster(address: str, patience: float = 30.0) -> Iterator[Executor]:
    """The workers of a Dask cluster, which must see the stores under the same paths or URLs.

    Args:
        address: of its scheduler, such as "tcp://10.0.0.1:8786".
        patience: seconds to wait for its answer.

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
        # Tasks write where they were told to, so that one that ran twice does no harm.
        yield client.get_executor(pure=False, retries=2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps matrix products in the thread that calls them: the executor's workers fill the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        # PyTorch takes the last number that was set as the default of threads that start later.
        torch.set_num_threads(before)


def finished(
    executor: Executor, function: Callable[[_Task], _Result], tasks: Iterable[_Task]
) -> Iterator[tuple[_Task, _Result]]:
    """Runs tasks and yields each with its result as soon as it is done, in any order.

    Raises:
        CostError: a worker process died.
        Exception: whatever a task raised; tasks that did not begin are cancelled.
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
            f"a worker process died, perhaps out of memory ({error}); what it had finished is kept"
        ) from error
    finally:
        for future in running:
            future.cancel()
