"""What a configuration says of models and images, and how it becomes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rsm_probe.config import Config, read_yaml
from rsm_probe.errors import ImageError, repeated
from rsm_probe.sources.images.annotated import cityscapes, egoobjects
from rsm_probe.sources.images.published import cifar100, class_folders, resized
from rsm_probe.sources.images.embedded.registry import EMBEDDED
from rsm_probe.sources.images.folders import folder
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.training.train import TrainingConfig, load_trained, train_or_load
from rsm_probe.storage.places import file_name
from rsm_probe.runs.fields import Count, Distinct, Edge, Images, Layers, Seed

# Between what results call a network and how many of its stages are dilated.
DILATED = "-dilated"
# Half-trained networks lie beside the finished ones.
_PARTIAL = ".partial"
# Longer names fit in no figure.
_LONGEST_NAME = 500


class ModelConfig(Config):
    """A model by name, or a small network trained by a recipe, once for every seed."""

    name: str = Field(
        default="",
        max_length=_LONGEST_NAME,
        description="what results call it; with several seeds, the seed is appended",
    )
    source: str | None = Field(default=None, description="torchvision:NAME, timm:NAME, hf:NAME or a .safetensors file")
    weights: str | None = Field(
        default="default", description="default, a file with a state dict, or null for random weights"
    )
    part: str = Field(default="", description="submodule to use in place of the whole, such as an image tower")
    layers: Layers | None = Field(default=None, description="of this model; else those of the study")
    recipe: TrainingConfig | None = Field(default=None, description="train a small network instead of loading one")
    seeds: Annotated[tuple[Seed, ...], Distinct] = Field(
        default=(0,), min_length=1, description="of the recipe or of random weights; one model for each"
    )
    dilated: Annotated[tuple[Literal[0, 1, 2], ...], Distinct] = Field(
        default=(0,),
        min_length=1,
        description="of a recipe: take the network once for each number, with so many of its last stages dilated in "
        "place of strided, so that the same weights answer at more locations",
    )
    control: bool = Field(default=False, description="also take the model untrained, as NAME-untrained")

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        return read_yaml(data) if isinstance(data, str) else data

    @field_validator("source")
    @classmethod
    def _no_code(cls, source: str | None) -> str | None:
        if source is not None and Path(source.partition(":")[0]).suffix == ".py":
            raise ValueError("a configuration runs no code; give file.py:function in Python or on the command line")
        return source

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.source is None) == (self.recipe is None):
            raise ValueError("give either source: or recipe:")
        if self.source is not None and self.weights is not None and self.seeds != (0,):
            raise ValueError("seeds: only make a difference to a recipe or to random weights (weights: null)")
        if self.dilated != (0,) and self.recipe is None:
            raise ValueError("dilated: is for networks of a recipe")
        if self.control and not self.name:
            raise ValueError("control: needs a name:, by which results call the model and its control")
        title = self.titled(self.seeds[0])
        if base_title(title) != title:
            raise ValueError(f"name: only what dilated: makes ends in {DILATED}1 or {DILATED}2; choose another name")
        if self.recipe is not None and self.name.endswith(_PARTIAL):
            raise ValueError(f"name: networks that are half trained end in {_PARTIAL}; choose another")
        return self

    def titled(self, seed: int) -> str:
        """What results call the model of a seed; a source without a name is called as `load_model` calls it."""
        source = self.source or "resnet"
        library, _, title = source.partition(":")
        default = Path(source).stem if source.endswith(".safetensors") else (title or library).rstrip("/")
        name = self.name or default.rsplit("/", 1)[-1]
        return f"{name}-{seed}" if len(self.seeds) > 1 else name

    def titles(self) -> list[str]:
        """What results call all models of this entry, in the order in which they are loaded."""
        names = [self.titled(seed) for seed in self.seeds] + ([self.control_title] if self.control else [])
        return [f"{name}{DILATED}{dilated}" if dilated else name for name in names for dilated in self.dilated]

    @property
    def control_title(self) -> str:
        """What results call the untrained one."""
        return f"{self.name}-untrained"

    def load(
        self, networks: Path, device: str | None = None, progress: bool = False
    ) -> Iterator[tuple[str, LoadedModel, float | None]]:
        """Each model with what results call it and, where a recipe trains it here, its accuracy.

        Args:
            networks: the folder of trained networks; those that are not there are trained now.
            device: where to train.
            progress: show bars.

        Raises:
            ModelError: a model cannot be had.
            ImageError: the images of a recipe cannot be had.
            StorageError: the folder holds another network of that name, or cannot be written.
        """
        for seed in self.seeds:
            if self.source is not None:
                loaded = load_model(self.source, self.weights, self.name, seed, part=self.part)
                yield self.titled(seed), loaded, None
            else:
                assert self.recipe is not None
                yield from self._trained(self.recipe, seed, self.titled(seed), networks, device, progress)
        if self.control and self.source is not None:
            yield self.control_title, load_model(self.source, None, self.name, self.seeds[0], part=self.part), None
        elif self.control:
            assert self.recipe is not None
            untrained = self.recipe.model_copy(update={"steps": 0, "expected_accuracy": 0.0})
            yield from self._trained(untrained, self.seeds[0], self.control_title, networks, device, progress)

    def _trained(
        self, recipe: TrainingConfig, seed: int, title: str, networks: Path, device: str | None, progress: bool
    ) -> Iterator[tuple[str, LoadedModel, float | None]]:
        """The network of a seed, once for each dilation."""
        file = networks / f"{file_name(title)}.safetensors"
        loaded, accuracy = train_or_load(recipe, seed, file, device, progress)
        for dilated in self.dilated:
            if dilated:
                yield f"{title}{DILATED}{dilated}", load_trained(file, dilated=dilated), None
            else:
                yield title, loaded, accuracy


class ImagesConfig(Config):
    """Which images: an embedded set with its options, CIFAR-100, or a folder."""

    source: str = Field(
        min_length=1,
        description="digits, scenes, cluttered, photos, cifar100, egoobjects, cityscapes, or the path of a folder",
    )
    split: Literal["all", "train", "test"] = Field(
        default="all",
        description="of an embedded set, CIFAR-100, Cityscapes, EgoObjects, or a folder that holds train/ and test/ or "
        "val/",
    )
    root: str = Field(default="data", description="the folder that holds a published data set")
    annotations: str = Field(
        default="EgoObjectsV1_unified_eval.json", description="of egoobjects: the file of annotations within root:"
    )
    frames: Count = Field(default=1, description="of scenes: so many in a row show the same digits")
    size: Edge | None = Field(default=None, description="edge in pixels; a folder's images keep theirs without")
    count: Images | None = Field(default=None, description="how many images; of a folder or CIFAR-100, a random sample")
    seed: Seed = Field(default=0, description="of drawing and sampling")
    strict: bool = Field(default=False, description="a broken file is an error instead of being left out")

    @model_validator(mode="after")
    def _fitting(self) -> ImagesConfig:
        if self.source in EMBEDDED and self.strict:
            raise ValueError("strict: is for folders; an embedded set holds no broken files")
        if self.source in ("cifar100", "cityscapes") and self.split == "all":
            raise ValueError(f"split: of {self.source} is train or test")
        if self.frames > 1 and self.source != "scenes":
            raise ValueError("frames: is for scenes")
        return self

    def load(self, progress: bool = False) -> ImageSet:
        """The images.

        Raises:
            ImageError: missing or empty folder, broken files with `strict`, options that do not fit.
        """
        if self.source not in EMBEDDED:
            images = self._from_disk(progress)
            images = images if self.count is None else images.sample(self.count, self.seed)
            return images if self.size is None else resized(images, self.size)
        options = {"size": self.size, "count": self.count, "frames": self.frames if self.frames > 1 else None}
        return EMBEDDED[self.source](
            split=self.split,
            seed=self.seed,
            **{key: value for key, value in options.items() if value is not None},
        )

    def _from_disk(self, progress: bool) -> ImageSet:
        if self.source == "cifar100":
            return cifar100(self.root, self.split)
        if self.source == "cityscapes":
            return cityscapes(self.root, self.split, progress)
        if self.source == "egoobjects":
            return egoobjects(self.root, self.split, self.annotations)
        if self.split == "all":
            return folder(self.source, strict=self.strict, progress=progress)
        images = class_folders(self.source, self.split, progress=progress)
        if self.strict and images.skipped:
            name, reason = next(iter(images.skipped.items()))
            raise ImageError(f"{images.name}: {len(images.skipped)} files cannot be read, first {name}: {reason}")
        return images


def base_title(title: str) -> str:
    """What results call a network without dilated stages."""
    return re.sub(f"{DILATED}[12]$", "", title)


def _told_apart(models: Sequence[ModelConfig]) -> Sequence[ModelConfig]:
    if (twice := repeated(title for model in models for title in model.titles())) is not None:
        raise ValueError(f"two models are called {twice!r}; give each a name: of its own")
    return models


# Of a study: results tell its models apart by what they are called.
ToldApart = AfterValidator(_told_apart)


class SubjectConfig(ModelConfig):
    """A model of an experiment, which may see images of its own."""

    images: ImagesConfig | None = Field(default=None, description="what this model sees; else those of the study")
