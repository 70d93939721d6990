"""Studies that consist of several studies, run one after another in subfolders of one run folder."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch

from rsm_probe.runs.plan import TO_CONTINUE
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.study import Study
from rsm_probe.storage.files import save_text


class Results(dict[str, Any]):
    """The results of several studies by name."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {result}" for name, result in self.items())


class Plans(dict[str, Any]):
    """The plans of several studies by name; `str` gives them one after another."""

    @property
    def state(self) -> str:
        """Whether the run is to begin, to continue, or finished."""
        states = {plan.state for plan in self.values()}
        return states.pop() if len(states) == 1 else TO_CONTINUE

    @property
    def refusal(self) -> str | None:
        """The first error with which `run` would refuse an estimate; None if it would not."""
        return next((plan.refusal for plan in self.values() if plan.refusal is not None), None)

    def __str__(self) -> str:
        return "\n".join(f"{name}: \n{plan}" for name, plan in self.items())


class SeveralStudies(Study):
    """Studies by name, each in a folder of that name."""

    @abstractmethod
    def parts(self, out: Path) -> Mapping[str, Study]:
        """The studies by name; `out` is the run folder, which may hold files they share."""

    @abstractmethod
    def summary(self, results: Results) -> tuple[str, str]:
        """The name and the text of a file that summarises all studies."""

    def check_together(self, progress: bool) -> None:
        """Reject studies that do not fit together, before hours are spent on one of them."""

    def plan(self, out: Path) -> Plans:
        """See `Study.plan`."""
        out = run_folder(out)
        self.require_free(out)
        self.check_together(progress=False)
        return Plans({name: part.plan(out / name) for name, part in self.parts(out).items()})

    def run(self, out: Path, *, executor: Executor | None = None, progress: bool = False) -> Results:
        """Run or continue the studies, and write the summary; see `Study.run`."""
        out = run_folder(out)
        self.require_free(out)
        parts = self.parts(out)
        for name, part in parts.items():
            part.require_free(out / name)
        self.check_together(progress)
        results = Results()
        with self.claimed(out) as require_there:
            for name, part in parts.items():
                if executor is not None and not part.on_cluster:
                    warnings.warn(f"{name}: study: {part.study} runs in this process only", stacklevel=2)
                shared = executor if part.on_cluster else None
                results[name] = part.run(out / name, executor=shared, progress=progress)
                require_there()
            file, text = self.summary(results)
            save_text(out / file, text)
        return results

    def gpus_of_workers(self, out: Path) -> torch.device | None:
        """See `Study.gpus_of_workers`."""
        return next((gpus for part in self.parts(out).values() if (gpus := part.gpus_of_workers(out))), None)

    def open(self, out: Path) -> Results:
        """The results of finished studies; see `Study.open`."""
        return Results({name: part.open(out / name) for name, part in self.parts(out).items()})
