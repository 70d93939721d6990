"""Brains as a study: RSMs of all layers against RDMs of subjects, with intervals, tests and the noise ceiling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field, model_validator

from rsm_probe.brains import evaluate, unrelated_subjects
from rsm_probe.checks import listed
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.comparison.measures import get_measure
from rsm_probe.errors import ComparisonError, ConfigError, CostError, StorageError
from rsm_probe.execution.amounts import format_bytes, physical_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.paper.page_parts import models_text
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page
from rsm_probe.runs.fields import Count, Draws, FolderOrUrl, Hours, Level, Seed
from rsm_probe.runs.images_config import number_of
from rsm_probe.runs.plan import ModelPlan, StudyPlan
from rsm_probe.runs.study import Runner, TimedStudy
from rsm_probe.similarity.rsm import RSM
from rsm_probe.similarity.rsms import RSMs
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.streaming.cost import LayerCost
from rsm_probe.studies.brain.figures import brain_figures
from rsm_probe.studies.brain.page import brain_page
from rsm_probe.studies.brain.result import BrainResult
from rsm_probe.studies.brain.subjects import JoinedImages, SubjectsConfig, joined, of_images
from rsm_probe.studies.pairs import PairsConfig, PairsResult, PairsRunner, require_applicable

if TYPE_CHECKING:
    import xarray as xr

# Keys that may change in a run: they decide what is compared, and pairs that are on disk are not matched again.
_GROWING = frozenset(
    {"models", "matchings", "kernels", "subjects", "measure", "draw", "repeats", "level", "correction", "seed"}
)


def _measure(name: str) -> str:
    try:
        measure = get_measure(name)
    except ComparisonError as error:
        raise ValueError(str(error)) from None
    if measure.properties.kind == "distance":  # tables, figures and page call the largest mean the best
        raise ValueError(f"{name} is larger the less alike RSMs are; take CKA or a correlation (cka, rsa-...)")
    return measure.name


class BrainConfig(TimedStudy):
    """Models, images and the RDMs of subjects: which layer and which notion of similarity explains them best."""

    study: Literal["brain"] = "brain"
    subjects: SubjectsConfig = Field(description="RDMs of subjects over these images, or a simulation")
    measure: Annotated[str, AfterValidator(_measure)] = Field(
        default="rsa-spearman",
        description="how an RSM is compared with the RDM of a subject, such as rsa-spearman, rsa-pearson or cka",
    )
    draw: Literal["both", "images", "subjects"] = Field(
        default="both", description="what the bootstrap draws again for the intervals: images, subjects or both"
    )
    repeats: Draws = Field(default=1000, description="bootstrap draws, and random orders of the permutation test")
    level: Level = Field(default=0.95, description="level of the intervals; p values up to 1 - level count")
    correction: Literal["fdr", "holm"] | None = Field(
        default="fdr",
        description="of p values of differences and of the noise ceiling, for their number: fdr, holm or null",
    )
    seed: Seed = Field(default=0, description="seed of the draws")
    # As in a study of pairs, of which this one begins with a run.
    max_hours: Hours | None = Field(default=None, description="limit for the pairs of one layer and matching")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="type of tokens on disk")
    tile: Count | None = Field(default=None, description="images per side of a tile")
    store: FolderOrUrl | None = Field(
        default=None,
        description="folder or URL for captures and pairs that all workers can access; by default the run folder",
    )

    on_cluster: ClassVar[bool] = True

    @model_validator(mode="after")
    def _fitting(self) -> BrainConfig:
        require_applicable(self.matchings, self.kernels)
        measure, truth = get_measure(self.measure), self.subjects.simulate
        if not measure.weighted and self.draw != "subjects":
            raise ValueError(
                f"measure: {self.measure} cannot count an image more than once, as draw: {self.draw} does; write "
                "draw: subjects, or take CKA or another correlation"
            )
        holds_distances = truth is not None or self.subjects.kind == "distance"
        if holds_distances and not {"shift", "additive"} & set(measure.properties.invariances):
            raise ValueError(
                f"measure: {self.measure} depends on where 0 is, and RSMs of models hold similarities, but these "
                "subjects hold distances; take CKA or another correlation (where the RDMs hold similarities, write "
                "subjects.kind: similarity)"
            )
        if truth is not None and truth.model is not None:
            require_applicable([truth.matching], [truth.kernel])
            titles = [title for entry in self.models for title in entry.titles()]
            for key, value, known in (("model", truth.model, titles), ("matching", truth.matching, self.matchings)):
                if value not in known:
                    raise ValueError(
                        f"subjects.simulate.{key}: the study has no {key} {value!r}; it has {', '.join(known)}"
                    )
        return self

    def all_pairs(self) -> PairsConfig:
        """The study of pairs that computes the RSMs."""
        shared = {name: getattr(self, name) for name in PairsConfig.model_fields if hasattr(self, name)}
        # Everything was validated here, some of it by the folder of the configuration.
        return PairsConfig.model_construct(**{**shared, "study": "pairs"})

    def runner(self, out: Path, execution: Execution | None = None) -> BrainRunner:
        """See `ModelStudy.runner`."""
        return BrainRunner(self, out, execution)

    def has_begun(self, out: Path) -> bool:
        """See `Study.has_begun`."""
        return self.all_pairs().has_begun(out)

    def free_keys(self, out: Path) -> frozenset[str]:
        """See `Study.free_keys`; captures and pairs know to which models they belong."""
        return self.execution_keys | _GROWING


class BrainRunner(Runner[BrainConfig]):
    """Match all pairs of images as a study of pairs does, then compare the RSMs with those of subjects.

    Afterwards the folder holds `captures/` and `pairs/` (unless `store` is given), `brain.csv`, `differences.csv`,
    `evaluation.zarr`, `config.yaml` and `provenance.json`.
    """

    def __init__(self, study: BrainConfig, out: Path, execution: Execution | None = None) -> None:
        super().__init__(study, out, execution)
        self.pairs = PairsRunner(study.all_pairs(), self.folder, self.execution)
        self._finished: BrainResult | None = None

    def load_images(self) -> None:
        """Load the images and the RDMs, and take the images that both have."""
        study = self.study
        every = study.images.load(self.execution.progress)
        self.subjects: RSMs | None = None
        self.joined = JoinedImages(list(range(len(every))), list(every.ids), len(every), len(every))
        self.images: ImageSet = every
        if study.subjects.simulate is None:
            rsms = study.subjects.read()
            self.joined = joined(every.ids, rsms.ids)
            if len(self.joined.indices) < len(every):
                self.images = every.subset(self.joined.indices)
            self.subjects = of_images(rsms, self.images, self.joined)
            _require_enough(study, len(self.subjects))
        self._try_out()
        self.pairs.take(self.images)

    def _try_out(self) -> None:
        """Compare a random RSM with the subjects, so that measure, draws and RDMs are refused before hours of work."""
        ids, values = self.images.ids, np.random.default_rng(0).normal(size=(len(self.images), len(self.images)))
        subjects = unrelated_subjects(ids, 2) if self.subjects is None else self.subjects
        self._evaluated({"a model": RSM.from_array(values + values.T, ids, kind="similarity")}, subjects, repeats=2)

    def _evaluated(self, rsms: Mapping[Any, RSM], subjects: RSMs, repeats: int) -> xr.Dataset:
        study = self.study
        with self.execution.bar("draws", repeats, "draw", leave=False) as bar:
            return evaluate(
                rsms, subjects, study.measure, draw=study.draw, repeats=repeats, level=study.level,
                correction=study.correction, seed=study.seed, workers=self.execution.worker_count,
                skip_missing=study.subjects.allow_missing, on_repeat=bar.update,
            )  # fmt: skip

    def images_of(self, entry: Any) -> dict[str, ImageSet]:
        """See `Runner.images_of`."""
        return {"images": self.images}

    def with_left(self, models: Mapping[str, LoadedModel], plans: list[ModelPlan]) -> list[ModelPlan]:
        """See `Runner.with_left`."""
        truth = self.study.subjects.simulate
        for plan in plans:
            if truth is not None and plan.title == truth.model:
                known = [layer.removeprefix(f"{plan.title}/") for layer in plan.matched]
                if truth.layer not in known:
                    raise ConfigError(
                        f"subjects.simulate.layer: {truth.model} is not probed at {truth.layer!r}, but at "
                        f"{listed(known, 8)}"
                    )
        self._finished = self._finished_result(models)
        return self.pairs.with_left(models, plans)

    def disk_seconds(self, layer: LayerCost) -> float:
        """See `Runner.disk_seconds`."""
        return self.pairs.disk_seconds(layer)

    def sizes(self, models: Sequence[ModelPlan]) -> tuple[float, float]:
        """See `Runner.sizes`; in the end, all RSMs are in memory."""
        memory, disk = self.pairs.sizes(models)
        return max(memory, self._rsm_bytes(sum(len(model.layers) for model in models))), disk

    def _rsm_bytes(self, layers: int) -> float:
        """Bytes that comparing all RSMs takes: as measured, 5.0 to 5.7 times their own (copies, squares, ranks)."""
        rsms = layers * len(self.study.matchings) * len(self.study.kernels)
        return 6 * 8 * rsms * number_of(self.images) ** 2

    def _require_memory(self, layers: int) -> None:
        needed, there = self._rsm_bytes(layers), physical_bytes()
        if there is not None and needed > there:
            raise CostError(
                f"the RSMs of {layers} layers over {number_of(self.images):,} images take about "
                f"{format_bytes(needed)} of memory, and this machine has {format_bytes(there)}; take fewer images "
                f"(images.count), layers, matchings or kernels"
            )

    def require_cost(self, models: Sequence[ModelPlan], workers: int) -> None:
        """See `Runner.require_cost`."""
        self._require_memory(sum(len(model.layers) for model in models))
        self.pairs.require_cost(models, workers)

    def plan(self) -> StudyPlan:
        """See `Runner.plan`."""
        plan = super().plan()
        simulate = self.study.subjects.simulate
        if simulate is not None:
            of_subjects = str(simulate)
        else:
            assert self.subjects is not None
            of_subjects = f"RDMs of {len(self.subjects)} {self.subjects.dimension}s; {self.joined}"
        return replace(plan, finished=self._finished is not None, reuse=[f"  {of_subjects}"])

    def compute(
        self, models: dict[str, LoadedModel], accuracies: dict[str, float], require_there: Callable[[], None]
    ) -> BrainResult:
        """Match all pairs of images, and compare all RSMs with those of the subjects."""
        require_there()
        if (finished := self._finished_result(models)) is not None:
            if not finished.has_tables:
                finished.save_tables()
            return finished
        matched = self.pairs.match(models, require_there)
        layers = list(dict.fromkeys((row["model"], row["layer"]) for row in matched.table))
        self._require_memory(len(layers))
        subjects = self._subjects(matched)
        rsms = self._rsms(matched, layers)
        study = self.study
        require_there()
        evaluation = self._evaluated(rsms, subjects, study.repeats)
        simulate = study.subjects.simulate
        facts = {
            "subjects": "" if simulate is None else str(simulate),
            "dimension": subjects.dimension,
            "dissimilarity": subjects.dissimilarity or subjects.kind,
            "names": list(subjects.names),
            "joined": str(self.joined),
            "settings": self._settings(models),
        }
        require_there()
        result = BrainResult.of(evaluation, facts, self.folder)
        result.save()
        return result

    def _rsms(self, matched: PairsResult, layers: Sequence[tuple[str, str]]) -> dict[RsmKey, RSM]:
        """All RSMs, without the products that they were made from."""
        depths: dict[str, list[str]] = {}
        for model, layer in layers:
            depths.setdefault(model, []).append(layer)
        rsms = {}
        for row in matched.table:
            for kernel in self.study.kernels:
                model, layer, matching = row["model"], row["layer"], row["matching"]
                rsm = matched.rsm(model, layer, matching, kernel)
                key = RsmKey(model, layer, depths[model].index(layer), matching, kernel)
                rsms[key] = RSM.from_array(rsm.values, rsm.ids, kind="similarity")
        return rsms

    def _subjects(self, matched: PairsResult) -> RSMs:
        """The RSMs of the subjects; simulated ones need the RSMs of models."""
        simulate = self.study.subjects.simulate
        if simulate is None:
            assert self.subjects is not None
            return self.subjects
        if simulate.unrelated:
            return simulate.made(None, self.images.ids)
        assert simulate.model is not None
        assert simulate.layer is not None
        try:
            truth = matched.rsm(simulate.model, simulate.layer, simulate.matching, simulate.kernel)
        except ComparisonError as error:
            raise ComparisonError(f"subjects.simulate: {error}") from None
        return simulate.made(truth, self.images.ids)

    def _settings(self, models: Mapping[str, LoadedModel]) -> str:
        """Hash of what the result depends on."""
        study = self.study
        settings = study.model_dump_json(exclude={*study.execution_keys, "store", "tile", "batch_size"})
        contents = {name: model.fingerprint for name, model in models.items()}
        digest = hashlib.sha256(json.dumps([settings, contents, self.images.fingerprint()]).encode())
        if self.subjects is not None:
            digest.update("\n".join([*self.subjects.names, *self.subjects.ids]).encode())
            digest.update(self.subjects.similarities.tobytes())
        return digest.hexdigest()

    def _finished_result(self, models: Mapping[str, LoadedModel]) -> BrainResult | None:
        """The result in the folder, if it is that of these settings."""
        try:
            result = BrainResult.open(self.folder)
        except StorageError:  # it is made again
            return None
        return result if result.facts["settings"] == self._settings(models) else None

    def provenance(self) -> dict[str, Any]:
        """The seeds, the number of images, and the images that were left out."""
        study = self.study
        seeds: dict[str, Any] = {"draws": study.seed, "images": study.images.seed}
        if study.subjects.simulate is not None:
            seeds["subjects"] = study.subjects.simulate.seed
        seeds["models"] = {entry.name or "model": list(entry.seeds) for entry in study.models}
        statistics = {key: getattr(study, key) for key in ("measure", "draw", "repeats", "level", "correction")}
        return {
            "seeds": seeds,
            "statistics": statistics,
            "images": len(self.images),
            "skipped": dict(self.images.skipped),
        }

    def open(self) -> BrainResult:
        """See `Study.open`."""
        return BrainResult.open(self.folder)

    def figures(self) -> dict[str, Figure]:
        """See `Study.figures`."""
        return brain_figures(self.open())

    def page(self) -> Page:
        """See `Study.page`."""
        page = brain_page(self.open(), self.study.model_dump())
        facts = {"Models": models_text(self.study.models), **page.provenance, **facts_of(self.folder)}
        return replace(page, command=command_of(self.folder), provenance=facts)


def _require_enough(study: BrainConfig, count: int) -> None:
    """Refuse a single subject where subjects are drawn, before hours are spent on RSMs."""
    if count < 2 and study.draw != "images":
        raise ConfigError(
            f"draw: {study.draw} draws subjects, and there is one; write draw: images, which gives intervals over "
            "images and no noise ceiling"
        )
