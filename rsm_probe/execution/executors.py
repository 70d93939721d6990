"""Run tasks on any `concurrent.futures.Executor`: threads of this process, a pool of processes, a Dask cluster.

Workers receive only names of stores and indices of images; they read tokens and write results themselves.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from rsm_probe.checks import require_whole
from rsm_probe.errors import CostError
from rsm_probe.execution.devices import find_device

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
# Tasks submitted at a time: enough to occupy any cluster, and few enough for the memory of its scheduler.
_SUBMITTED = 1000
# Deaths of processes in a row, without a finished task between them, after which the work ends.
_DEATHS = 3


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


class LocalProcesses(Executor):
    """Processes of this machine, which begin again after one of them has died.

    Args:
        count: number of processes.
        device: see `processes`.
        threads: see `processes`.
    """

    def __init__(self, count: int, device: torch.device | None = None, threads: int = 1) -> None:
        require_whole(count, "processes", 1, CostError)
        require_whole(threads, "threads", 1, CostError)
        self._count, self._threads = int(count), int(threads)
        self._gpus: list[str] = []
        if device is not None and device.type == "cuda" and device.index is None:
            find_device(device, CostError)
            self._gpus = visible_gpus(os.environ, torch.cuda.device_count())
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor:
        # Forked processes cannot use CUDA, and may inherit locks that nobody releases.
        spawn = multiprocessing.get_context("spawn")
        arguments = spawn.Value("i", 0), self._gpus, self._threads
        return ProcessPoolExecutor(self._count, spawn, _begin_worker, arguments)

    def submit(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> Future[_Result]:
        """See `concurrent.futures.Executor.submit`."""
        return self._pool.submit(function, *args, **kwargs)

    def restart(self) -> None:
        """Replace the processes, after one of them has died and taken the others with it."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._started()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


@contextmanager
def processes(count: int, device: torch.device | None = None, threads: int = 1) -> Iterator[LocalProcesses]:
    """Start processes that run tasks; on exit, running tasks finish and pending tasks are cancelled.

    If one of them dies, `finished` starts them again and repeats the tasks that were lost. A script that calls this
    needs `if __name__ == "__main__":` around its work, because new processes import it.

    Args:
        count: number of processes.
        device: "cuda" without a number gives each process one GPU, in turn, and hides the others from it.
        threads: CPU threads of each process within a matrix product.

    Raises:
        CostError: `count` or `threads` is not a whole number of at least 1, or no GPU is available.
    """
    pool = LocalProcesses(count, device, threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """The names of GPUs as CUDA_VISIBLE_DEVICES takes them: those that it lists now, or else numbers.

    Args:
        environment: the environment variables.
        count: number of GPUs that this process sees.
    """
    listed = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return listed[:count] if listed else [str(number) for number in range(count)]


def _begin_worker(numbers: Any, gpus: Sequence[str], threads: int) -> None:
    """Prepare a process before its first task.

    Args:
        numbers: a shared integer, from which each process takes its number.
        gpus: names of the GPUs to distribute.
        threads: CPU threads within a matrix product.
    """
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    if gpus:
        # Hidden rather than not current: threads that a task starts would begin with the first GPU again. CUDA reads
        # this when it is first used, which is later.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    # An interruption reaches all processes of the terminal: the first one decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it was killed: nothing would read its results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


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

    Tasks of `processes` that are lost because a process died run again, so they must be repeatable.

    Raises:
        CostError: a worker process died; of `processes`, several in a row without finishing any task.
        Exception: a task failed; pending tasks are cancelled.
    """
    left = iter(tasks)
    running: dict[Future[_Result], _Task] = {}
    lost, death, deaths = list[_Task](), None, 0
    try:
        while True:
            # Once a process has died, the pool takes no more tasks, and all that it has end in the same error.
            for task in itertools.islice(left, _SUBMITTED - len(running)) if death is None else ():
                try:
                    running[executor.submit(function, task)] = task
                except BrokenProcessPool as error:
                    death = error
                    lost.append(task)
                    break
            if not running and death is None:
                return
            if not running:
                deaths += 1
                if not isinstance(executor, LocalProcesses) or deaths > _DEATHS:
                    raise _died(death) from death
                executor.restart()
                left, lost, death = itertools.chain(lost, left), [], None
                continue
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    death = error
                    lost.append(task)
                    continue
                except _killed_workers() as error:
                    raise _died(error) from error
                deaths = 0
                yield task, result
    finally:
        for future in running:
            future.cancel()


def _killed_workers() -> tuple[type[Exception], ...]:
    """The error by which Dask reports a task whose workers died several times, if Dask is in use."""
    distributed = sys.modules.get("distributed")
    return () if distributed is None else (distributed.KilledWorker,)


def _died(error: Exception | None) -> CostError:
    return CostError(
        f"a worker process died, perhaps because it ran out of memory, or because a script starts processes without "
        f"`if __name__ == '__main__':` ({error}); finished work is kept"
    )
