"""The layer sweep as a study, with the figures of the paper's appendix G."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field

from rsm_probe.errors import StorageError
from rsm_probe.execution.amounts import physical_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.registry import matching_label
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page
from rsm_probe.runs.fields import AtLeastTwo, Distinct, Estimators, Kernels, Seed
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.runs.plan import ModelLeft, ModelPlan, StudyPlan
from rsm_probe.runs.study import Runner, TimedStudy
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.streaming.cka_sums import rsms_per_block
from rsm_probe.streaming.cost import Cost
from rsm_probe.streaming.kept_rsms import KeptLayers
from rsm_probe.streaming.layer_sweep import sweep_layers, sweep_request
from rsm_probe.streaming.mini_batches import batch_source
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.stored_sweep import StoredSweep, pairs_within
from rsm_probe.streaming.sweep_request import RESULT, STORE, finished_result
from rsm_probe.studies.dynamics_figures import dynamics_figures
from rsm_probe.studies.sweep_figures import Architecture, sweep_figures
from rsm_probe.studies.sweep_left import left_by_model, planned_sweep, rsm_bytes
from rsm_probe.studies.sweep_report.page import sweep_page
from rsm_probe.studies.sweep_report.recording import record_shown
from rsm_probe.studies.sweep_report.shown import Shown
from rsm_probe.studies.sweep_report.summary import title

# Keys that may change in a run: its store computes what is missing, and the result leaves out what is gone.
_GROWING = frozenset(
    {
        "models", "images", "layers", "tokens", "layouts", "method", "forward", "inputs", "matchings", "kernels",
        "estimators", "keep",
    }
)  # fmt: skip


class SweepConfig(TimedStudy):
    """A layer sweep: models, images, and how their RSMs are computed and compared."""

    study: Literal["sweep"] = "sweep"
    on_cluster: ClassVar[bool] = True
    kernels: Kernels = Field(default=("linear",), min_length=1)
    estimators: Estimators = Field(default=("unbiased", "biased"), min_length=1)
    batch_size: AtLeastTwo = 250
    seed: Seed = 0
    keep: Annotated[tuple[str, ...], Distinct] = Field(
        default=(), description="layers whose mini-batch RSMs are kept in the result"
    )

    def runner(self, out: Path, execution: Execution | None = None) -> SweepRunner:
        """See `ModelStudy.runner`."""
        return SweepRunner(self, out, execution)

    def has_begun(self, out: Path) -> bool:
        """See `Study.has_begun`."""
        return any((out / name).exists() for name in (f"{STORE}/products", RESULT, "checkpoint"))

    def free_keys(self, out: Path) -> frozenset[str]:
        """See `Study.free_keys`; a sweep whose RSMs are kept may grow."""
        return self.execution_keys | (_GROWING if (out / STORE).exists() else frozenset())

    def why_no_figures(self, out: Path) -> str:
        """See `Study.why_no_figures`."""
        return (
            f"figures compare identity with a second matching, and this run has matchings: {', '.join(self.matchings)}"
            " and kept no RSMs (keep:); result.zarr holds the CKA of all layers"
        )

    @property
    def architectures(self) -> list[Architecture] | None:
        """Models grouped by architecture; None if a name is unknown until its model is loaded."""
        if not all((entry.name or entry.recipe) and entry.dilated == (0,) for entry in self.models):
            return None
        return [
            Architecture(
                entry.name or "resnet",
                # Of a training, the network that it ended with, and the one before the first step.
                [(entry.step_titles(seed) or [entry.titled(seed)])[-1] for seed in entry.seeds],
                _control(entry),
            )
            for entry in self.models
        ]


def _control(entry: ModelConfig) -> str | None:
    """The title of the untrained model of an entry, if it has one: its control, or its first seed before training."""
    if entry.control:
        return next(iter(entry.controls))
    return entry.step_titles(entry.seeds[0])[0] if entry.steps[:1] == [0] else None


def _layer_names(plan: ModelPlan) -> list[str]:
    """The layers of a model, without its title."""
    return [layer.name.removeprefix(f"{plan.title}/") for layer in plan.layers]


def _nothing_left(plan: ModelPlan) -> ModelLeft:
    """A model of a finished run."""
    return ModelLeft({layer.name: dict.fromkeys(layer.pair_seconds, 0) for layer in plan.layers}, 0, "complete")


class SweepRunner(Runner[SweepConfig]):
    """Run a sweep; afterwards the folder holds `models/`, `result.zarr`, `config.yaml` and `provenance.json`."""

    def load_images(self) -> None:
        """Load the images, and reject too few of them."""
        study = self.study
        self.images = study.images.load_source(self.execution.progress)
        self.batch_sizes = list(batch_source(self.images, study.batch_size, study.seed, study.estimators).sizes)
        self.work: StoredSweep | None = None
        self.finished = False

    def images_of(self, entry: Any) -> dict[str, ImageSet | ImageLoader]:
        """See `Runner.images_of`."""
        return {"images": self.images}

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """The number of pairs within mini-batches."""
        return sum(size * (size - 1) // 2 for size in self.batch_sizes)

    @property
    def passes(self) -> int:
        """Two where means are subtracted."""
        return 1 if self.study.centering is None else 2

    @property
    def images_together(self) -> int:
        """Those of a mini-batch."""
        return max(self.batch_sizes)

    def with_left(self, models: Mapping[str, LoadedModel], plans: list[ModelPlan]) -> list[ModelPlan]:
        """See `Runner.with_left`; the store knows which RSMs are left."""
        study, names = self.study, {plan.title: _layer_names(plan) for plan in plans}
        request, source = sweep_request(**self._arguments(models))
        source.repeat(f"a sweep in {self.folder}", needed=study.centering is not None)
        self.work = work = planned_sweep(request, source, self.folder, names, self.execution)
        if not any(entry.missing_networks(self.networks) for entry in study.models):
            result = finished_result(self.folder, request.all_settings(source), source)
            self.finished = result is not None and (work is None or work.has_made(result))
        if self.finished:
            return [replace(plan, left=_nothing_left(plan)) for plan in plans]
        if work is None:
            return plans
        self.batch_sizes = list(map(len, work.batches))
        left, within = left_by_model(work), sum(map(pairs_within, work.batches))
        return [replace(plan, pairs=within, left=left[plan.title]) for plan in plans]

    def plan(self) -> StudyPlan:
        """See `Runner.plan`."""
        plan, work = super().plan(), self.work
        plan = replace(plan, finished=self.finished, pairs=0 if self.finished else None)
        return plan if work is None else replace(plan, reuse=[*work.division.notes, str(work)], pairs=work.pairs_left)

    def sizes(self, models: Sequence[ModelPlan]) -> tuple[float, float]:
        """See `Runner.sizes`; on disk are the RSMs that are missing, and the result."""
        study, methods = self.study, {matching_label(method): method for method in self.study.matching_methods()}
        cost, names = self._cost(models, self.execution.worker_count), [n for one in models for n in _layer_names(one)]
        if self.finished:
            return 0, 0
        rsms, of_keep = len(names) * len(methods) * len(study.kernels), sum(name in self._keep for name in names)
        entries = of_keep * len(methods) * len(study.kernels) * len(self.batch_sizes) * max(self.batch_sizes) ** 2
        result = 8 * (len(study.estimators) * rsms**2 + entries)
        if self.work is not None:
            stored = self.work.disk_bytes
        else:
            stored = sum(rsm_bytes(_layer_names(one), methods, self.batch_sizes) for one in models)
        if cost is None:  # the RSMs are compared
            size = max(self.batch_sizes)
            return 4 * 8 * size**2 * min(rsms, 2 * rsms_per_block(size)), result
        return cost.bytes, stored + result

    def require_cost(self, models: Sequence[ModelPlan], workers: int) -> None:
        """See `Runner.require_cost`; the limit is that of all work that is left."""
        if (cost := self._cost(models, workers)) is not None:
            cost.require(self.execution, physical_bytes())

    @property
    def _keep(self) -> KeptLayers:
        return KeptLayers(self.study.keep)

    def _cost(self, models: Sequence[ModelPlan], workers: int) -> Cost | None:
        """The cost of what is left to match, from the plans of the models; None if nothing is."""
        study, keep, work, sizes, passes = self.study, self._keep, self.work, self.batch_sizes, self.passes
        keep.require_among([name for model in models for name in _layer_names(model)])
        if work is not None:
            sizes = [len(batch) for batch, works in zip(work.batches, work.work, strict=True) if works]
            passes = 2 if work.lacking_means() else 1
        missing = [
            (name, replace(layer, pair_seconds=seconds))
            for model in models
            for name, layer in zip(_layer_names(model), model.layers, strict=True)
            if (seconds := {m: s for m, s in layer.pair_seconds.items() if model.pairs_left(layer, m)})
        ]
        if not missing:
            return None
        return Cost(
            [layer for _, layer in missing],
            sum(model.image_seconds for model in models if model.left is None or model.left.images),
            sum(sizes),
            sizes,
            workers,
            passes,
            len(study.kernels),
            sum(len(layer.pair_seconds) for name, layer in missing if name in keep) * len(study.kernels),
            rsms_at_once=2 * rsms_per_block(max(sizes)),
        )

    def compute(
        self, models: dict[str, LoadedModel], accuracies: dict[str, float], require_there: Callable[[], None]
    ) -> SweepResult:
        """Sweep the layers of all models, and store what the report page shows."""
        require_there()
        started = time.perf_counter()
        arguments = self._arguments(models)
        result = sweep_layers(**arguments, out=self.folder, execution=self.execution)
        request, source = sweep_request(**arguments)
        seconds = time.perf_counter() - started
        record_shown(request, source, self.folder, result, self.execution.device, seconds)
        return result

    def _arguments(self, models: Mapping[str, LoadedModel]) -> dict[str, Any]:
        """The arguments of `sweep_request`, which `sweep_layers` takes, too."""
        study = self.study
        return {
            "models": models, "images": self.images, "layers": {title: self.layers(title) for title in models},
            "matchings": study.matchings, "kernels": study.kernels, "batch_size": study.batch_size, "seed": study.seed,
            "centering": study.centering, "estimators": study.estimators, "keep": study.keep,
            "reading": study.reading(),
        }  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """The seeds, the number of images, and the images that were left out."""
        seeds = {entry.name or "model": list(entry.seeds) for entry in self.study.models}
        return {
            "seeds": {"images": self.study.seed, "models": seeds},
            "images": int(self.open().dataset.attrs["images"]),  # a loader may not know it before
            "skipped": dict(self.images.skipped) if isinstance(self.images, ImageSet) else {},
        }

    def open(self) -> SweepResult:
        """See `Study.open`."""
        if not (self.folder / RESULT).is_dir():
            raise StorageError(f"{self.folder} has no finished run; run it again to continue")
        return SweepResult.open(self.folder / RESULT)

    def figures(self) -> dict[str, Figure]:
        """See `Study.figures`."""
        result, rows = self.open(), self.study.architectures
        return {**sweep_figures(result, rows), **dynamics_figures(result, rows)}

    def page(self) -> Page:
        """See `Study.page`."""
        result, folder = self.open(), self.folder
        shown = Shown.of(folder, result)
        return sweep_page(result, shown, title(result, folder), command_of(folder), facts_of(folder))
