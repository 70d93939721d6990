"""The paper's experiments, factors and sweeps by one command, on the same models and the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from rsm_probe.config import ConfigPath
from rsm_probe.evidence.factors import FactorsConfig
from rsm_probe.evidence.report import evidence_report
from rsm_probe.execution.amounts import format_seconds
from rsm_probe.paper.experiment import ExperimentConfig
from rsm_probe.paper.registry import EXPERIMENTS
from rsm_probe.runs.model_config import ModelConfig, ToldApart
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.several import Plans, Results, SeveralStudies, read_parts
from rsm_probe.runs.study import ModelStudy, Study
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

# The image set of pictures that users bring.
COMPOSED = "composed"
# Keys of images that are composed, which all studies share.
_PICTURES = ("cutouts", "backgrounds", "include", "exclude")
# Keys of a study that hold images.
_IMAGES = ("images", "query_images", "database")
# Other entries of a run folder, whose names are taken.
_TAKEN = ("figures", "models", "config.yaml", "report.md")


def kinds() -> dict[str, type[Study]]:
    """The studies that may be parts, by name."""
    return {**EXPERIMENTS, "factors": FactorsConfig, "sweep": SweepConfig, "sweeps": SweepsConfig}


class EvidenceConfig(SeveralStudies):
    """Runs studies one after another, each in its own folder within the run folder, on shared models and pictures."""

    study: Literal["evidence"] = "evidence"
    cutouts: ConfigPath | None = Field(
        default=None, description="folder of cut-outs in class folders, for all images with source: composed"
    )
    backgrounds: ConfigPath | None = Field(
        default=None, description="folder of backgrounds, for all images with source: composed"
    )
    include: str | tuple[str, ...] | None = Field(
        default=None, description="globs of the classes of cut-outs to use, for all images with source: composed"
    )
    exclude: str | tuple[str, ...] | None = Field(
        default=None, description="globs of the classes of cut-outs to leave out, for all images with source: composed"
    )
    models: Annotated[tuple[ModelConfig, ...], ToldApart] = Field(
        default=(), description="models of the studies without models: of their own"
    )
    studies: dict[str, SerializeAsAny[Study]] = Field(
        min_length=1, description="name -> a study, or a file that holds one; the name becomes a folder"
    )

    on_cluster: ClassVar[bool] = True

    @field_validator("studies", mode="before")
    @classmethod
    def _read(cls, studies: Any, info: ValidationInfo) -> Any:
        entries = [model.model_dump(mode="json") for model in info.data.get("models", ())]
        pictures = {key: info.data[key] for key in _PICTURES if info.data.get(key) is not None}
        return read_parts(studies, kinds(), _TAKEN, info, lambda data: with_shared(data, entries, pictures))

    def parts(self, out: Path) -> dict[str, Study]:
        """The studies; they share trained networks in `models/` of the run folder."""
        shared = str(out / "models")
        return {name: _with_networks(part, shared) for name, part in self.studies.items()}

    def plan(self, out: Path) -> EvidencePlans:
        """See `Study.plan`."""
        return EvidencePlans(super().plan(out))

    def summary(self, results: Results) -> tuple[str, str]:
        """`report.md`: what all studies say of each baseline, and their reports."""
        kinds_of = {name: part.study for name, part in self.studies.items()}
        sources = {entry.titled(entry.seeds[0]): entry.source or "trained by a recipe" for entry in self.models}
        seeds = {title: both for name, part in self.studies.items() for title, both in _seeds(name, part)}
        return "report.md", evidence_report(results, kinds_of, sources, seeds, provenance())


class EvidencePlans(Plans):
    """The plans of all studies; `str` gives them one after another, and their sum."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of all studies, without training."""
        return sum(plan.seconds for plan in self.values())

    def __str__(self) -> str:
        lines = [f"  {name}: about {format_seconds(plan.seconds)}" for name, plan in self.items()]
        total = f"all studies: about {format_seconds(self.seconds)}"
        return "\n".join([super().__str__(), *lines, total])


def with_shared(data: dict[str, Any], models: list[Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a study with what all studies share, where it says nothing itself.

    Args:
        data: settings of a study.
        models: entries of models; none if each study has its own.
        pictures: keys of images with `source: composed`, such as `cutouts`.
    """
    if data.get("study") == "factors" and isinstance(data.get("base"), dict):
        return {**data, "base": with_shared(data["base"], models, pictures)}
    if data.get("study") == "sweeps" and isinstance(data.get("sweeps"), dict):
        return {**data, "sweeps": {name: with_shared(one, models, pictures) for name, one in data["sweeps"].items()}}
    shared = {"models": models, **data} if models else dict(data)
    entries = shared.get("models")
    if isinstance(entries, list):
        shared["models"] = [_with_pictures(e, pictures) if isinstance(e, dict) else e for e in entries]
    return _with_pictures(shared, pictures)


def _with_pictures(data: dict[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a study, or of a model of it, with the pictures of which images are composed.

    Raises:
        ValueError: nothing says where the pictures are.
    """
    changed = dict(data)
    for key in _IMAGES:
        images = data.get(key)
        if not isinstance(images, dict) or images.get("source") != COMPOSED:
            continue
        changed[key] = {**pictures, **images}
        needed = ["cutouts"] if images.get("background") == "grey" else ["cutouts", "backgrounds"]
        if missing := [name for name in needed if name not in changed[key]]:
            raise ValueError(
                f"{key}: images are composed of pictures that you bring; name their folders with "
                f"{' '.join(f'--set {name}=FOLDER' for name in missing)}, or in the configuration"
            )
    return changed


def _seeds(name: str, part: Study) -> list[tuple[str, tuple[int, int]]]:
    """The seeds of a study and of its images, by its name; those of each sweep of a study of several."""
    if isinstance(part, SweepsConfig):
        return [(f"{name}/{one}", (sweep.seed, sweep.images.seed)) for one, sweep in part.sweeps.items()]
    of = part.base if isinstance(part, FactorsConfig) else part
    return [(name, (of.seed, of.images.seed))] if isinstance(of, ExperimentConfig | SweepConfig) else []


def _with_networks(part: Study, networks: str) -> Study:
    """A study that looks for trained networks in a folder, unless it says where they are."""
    if isinstance(part, FactorsConfig):
        return part.in_folder(networks)
    if isinstance(part, SweepsConfig):
        return part.model_copy(update={"sweeps": {n: _with_networks(one, networks) for n, one in part.sweeps.items()}})
    if isinstance(part, ModelStudy):
        return part.model_copy(update={"networks": part.networks or networks})
    return part
