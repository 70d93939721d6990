"""`Execution`: all choices of how work runs, in one object."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from rsm_probe.checks import brief, require_flag, require_number, require_whole
from rsm_probe.errors import CostError, RsmProbeError
from rsm_probe.execution.amounts import format_seconds, parse_bytes
from rsm_probe.execution.devices import find_device
from rsm_probe.execution.executors import available_cores, threads


@dataclass(frozen=True)
class Execution:
    """How work runs: on which device, with how many workers, within which limits. It never decides what is computed.

    Public functions take these values as keywords, always last and in this order; functions inside the package take
    an `Execution`. All values are checked here except the device, which is checked when it is needed.

    Attributes:
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB".
        max_hours: refuse work whose estimated time is longer; None for no limit.
        executor: where tiles of pairs are computed; None for threads of this process.
        progress: show the estimated cost and progress bars.

    Raises:
        CostError: a value has the wrong type or is out of range.
    """

    device: str | torch.device | None = None
    workers: int | None = None
    memory: str | int = "2GB"
    max_hours: float | None = 12.0
    executor: Executor | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            require_whole(self.workers, "workers", 1, CostError)
        parse_bytes(self.memory)
        if self.max_hours is not None:
            require_number(self.max_hours, "max_hours (None for no limit)", CostError, above=0)
        if not isinstance(self.executor, Executor | None):
            raise CostError(f"executor must be a concurrent.futures.Executor, found {brief(self.executor)}")
        require_flag(self.progress, "progress", CostError)

    @property
    def worker_count(self) -> int:
        """Number of CPU threads that match."""
        return available_cores() if self.workers is None else self.workers

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_bytes(self.memory)

    @property
    def limits_time(self) -> bool:
        """Whether estimated times are checked; the speed of an executor is unknown."""
        return self.max_hours is not None and self.executor is None

    def device_or(self, default: str | torch.device, error: type[RsmProbeError] = CostError) -> torch.device:
        """The device, or the default if it is None.

        Raises:
            RsmProbeError: the device is not available, or its name is unknown; of the class `error`.
        """
        return find_device(default if self.device is None else self.device, error)

    def worker_device(self) -> torch.device:
        """The device that computes tiles; for workers of an executor, it is not checked here.

        Raises:
            CostError: the device is not available, or its name is unknown.
        """
        if self.executor is None:
            return self.device_or("auto")
        try:
            return torch.device("cpu" if self.device in ("auto", None) else self.device)
        except (RuntimeError, TypeError, ValueError):
            raise CostError(
                f"device must be a name such as 'auto', 'cpu' or 'cuda', found {brief(self.device)}"
            ) from None

    def pool(self, count: int, device: torch.device) -> AbstractContextManager[Executor]:
        """The executor, or threads of this process; see `threads`."""
        return threads(count, device) if self.executor is None else nullcontext(self.executor)

    def require_time(self, seconds: float, work: str, advice: Callable[[float], str]) -> None:
        """Refuse work that would take too long.

        Args:
            seconds: the estimated time.
            work: the work, for the message.
            advice: takes the limit in seconds and returns the advice, for the message.

        Raises:
            CostError: the estimate exceeds `max_hours`.
        """
        if self.executor is not None or self.max_hours is None or seconds <= (limit := self.max_hours * 3600):
            return
        raise CostError(
            f"{work} would take about {format_seconds(seconds)}, above max_hours={self.max_hours:g}; {advice(limit)}, "
            "or raise max_hours (None for no limit)"
        )

    def bar(
        self,
        description: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        items: Iterable[Any] | None = None,
        position: int | None = None,
        leave: bool = True,
    ) -> Any:
        """Make a progress bar, hidden unless `progress` is set.

        Args:
            description: text before the bar.
            total: number of units; None if it is unknown.
            unit: name of a unit.
            done: number of units already done.
            items: iterable to wrap; without it, call `update`.
            position: row of the bar if there are several.
            leave: whether the bar stays on the screen at the end.
        """
        return tqdm(
            items, description, total, leave, initial=done, unit=unit, unit_scale=unit == "pair", position=position,
            disable=not self.progress,
        )  # fmt: skip

    def report(self, text: str) -> None:
        """Show a line of text if `progress` is set, and else pass it to the logger `rsm_probe`, at level INFO."""
        if self.progress:
            self.say(text)
        else:
            logging.getLogger("rsm_probe").info(text)

    def say(self, text: str) -> None:
        """Show a line of text if `progress` is set."""
        if self.progress:
            tqdm.write(text, file=sys.stderr)
