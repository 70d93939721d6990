"""Everything that a study reads and this machine lacks, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rsm_probe.checks import listed
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.missing.architectures import parameter_bytes
from rsm_probe.runs.missing.data import required_file, required_for_training, required_images
from rsm_probe.runs.missing.requirement import Requirement, table
from rsm_probe.runs.missing.weights import required_weights
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.runs.several import SeveralStudies
from rsm_probe.runs.study import Study

# Matching or solver -> the package that it needs, and what installs it.
_PACKAGES = {
    "ortools": ("ortools", "pip install 'rsm-probe[ortools]'"),
    "lap": ("lap", "pip install lap"),
    "soft": ("ot", "pip install 'rsm-probe[soft]'"),
}


@dataclass(frozen=True)
class Missing:
    """What a study reads: `str` lists what is missing as lines of text, with where to get it.

    Attributes:
        requirements: everything that it reads, each once.
    """

    requirements: tuple[Requirement, ...]

    @property
    def absent(self) -> list[Requirement]:
        """What is not on this machine."""
        return [one for one in self.requirements if not one.there]

    @property
    def downloads(self) -> bool:
        """Whether anything is missing that libraries download themselves."""
        return any(one.of_library for one in self.absent)

    def __bool__(self) -> bool:
        return bool(self.absent)

    def __str__(self) -> str:
        absent, present = self.absent, [one.what for one in self.requirements if one.there]
        if not absent:
            return f"all {len(present)} files and packages that this study reads are here"
        rows = [("missing", "size", "where to get it")]
        rows += [(one.what, "-" if one.size == 0 else one.size_text, one.way) for one in absent]
        lines, sizes = table(rows), {one.get: one.size for one in absent if one.size != 0}  # one archive counts once
        if known := sum(size for size in sizes.values() if size is not None):
            unknown = sum(size is None for size in sizes.values())
            more = f", and {unknown} of unknown size" if unknown else ""
            lines.append(f"to download: {format_bytes(known)}{more}")
        if present:
            lines.append(f"here: {listed(present)}")
        return "\n".join(lines)


def missing_of(study: Study, out: Path, recipes: Path | None = None) -> Missing:
    """List what a study reads from disk, and what of it is missing.

    Args:
        study: the study.
        out: its run folder, which may hold networks that it has trained.
        recipes: the folder of its configuration, where recipes of trained networks may lie.

    Raises:
        ModelError: a library has no model of a name.
    """
    return Missing(tuple({one.what: one for one in _required(study, out, recipes)}.values()))


def _required(study: Study, out: Path, recipes: Path | None) -> Iterator[Requirement]:
    if isinstance(study, SeveralStudies):
        for name, part in study.parts(out).items():
            yield from _required(part, out / name, recipes)
        return
    networks = Path(getattr(study, "networks", None) or out / "models")
    for config in _parts(study):
        if isinstance(config, ImagesConfig):
            yield from required_images(config)
        elif isinstance(config, ModelConfig):
            yield from _required_by_model(config, networks, recipes)
    names = [name for key in ("matchings", "solvers") for name in getattr(study, key, ())]
    yield from _required_packages(name for name in names if isinstance(name, str))


def _parts(value: Any) -> Iterator[BaseModel]:
    """All configurations within one, such as those of models and images."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _parts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)


def _required_by_model(model: ModelConfig, networks: Path, recipes: Path | None) -> Iterator[Requirement]:
    source, weights = model.source, model.weights
    if model.recipe is not None and model.missing_networks(networks):
        yield from required_for_training(model.recipe)
    if source is not None and source.endswith(".safetensors"):
        yield required_file(source, recipes)
    elif weights not in (None, "default"):
        yield required_file(str(weights), recipes)
    elif source is not None and weights == "default" and not model.checkpoint_files:
        needed = required_weights(source)
        if needed is not None and not needed.there and needed.size is None:
            needed = replace(needed, size=parameter_bytes(source))
        yield from [] if needed is None else [needed]
    for file in model.checkpoint_files.values():
        yield required_file(file, recipes)


def _required_packages(names: Iterable[str]) -> Iterator[Requirement]:
    for name in names:
        if name in _PACKAGES:
            package, command = _PACKAGES[name]
            yield Requirement(f"package {package} for {name}", find_spec(package) is not None, command)
