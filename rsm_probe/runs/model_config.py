"""The models of a configuration, loaded or trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from rsm_probe.config import NO_CODE, Config, ConfigFolder, config_path, read_nested
from rsm_probe.errors import LayerError, ModelError, repeated
from rsm_probe.execution.execution import Execution
from rsm_probe.probe.probe import Probe
from rsm_probe.runs.fields import (
    IN_PYTHON,
    Distinct,
    Edge,
    Forward,
    Inputs,
    Layers,
    Layouts,
    Method,
    Preprocessing,
    Seed,
    Tokens,
)
from rsm_probe.runs.untrained import as_twin, twin_titles
from rsm_probe.sources import TrainingConfig, build_network, train_or_load
from rsm_probe.sources.checkpoint_sequences import checkpoint_files, checkpoint_title, default_name, load_sequence
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing_words import PREPROCESSING
from rsm_probe.sources.models.reading import Reading
from rsm_probe.sources.models.user_functions import FileFunction, function_of
from rsm_probe.sources.training.train import checkpoint_file
from rsm_probe.sources.training.trained_network import load_trained, load_with_accuracy
from rsm_probe.storage.paths import file_name

# Precedes the number of dilated stages in the title of a network.
DILATED = "-dilated"
# Ends the names of partly trained networks, which lie beside the finished ones.
_PARTIAL = ".partial"
# Longer names do not fit in a figure.
_LONGEST_NAME = 500
# Libraries whose models may be local folders.
_LOCAL_FOLDERS = ("hf", "hf-classifier")


class ModelConfig(Config):
    """A model by name, or a small network trained by a recipe, once per seed."""

    name: str = Field(
        default="",
        max_length=_LONGEST_NAME,
        description="name in results; with several seeds, the seed is appended",
    )
    source: str | None = Field(
        default=None,
        description="torchvision:NAME, timm:NAME, hf:NAME, open_clip:ARCH/TAG, pretrained:efficientnet_lite0 (ImageNet "
        "weights of rsm-probe[pretrained], without a download) or a .safetensors file; timm and pretrained with "
        "?output_stride=16 or 8 for more locations at the same depth; file.py:function and torch.hub:REPO:ENTRY run "
        "code and need `rsm-probe run CONFIG --allow-code`",
    )
    weights: str | None = Field(default="default", description="default, a checkpoint, or null for random weights")
    checkpoints: dict[Seed, str] | tuple[str, ...] | str | None = Field(
        default=None,
        description="checkpoints of one training, as a pattern such as runs/net/*.safetensors or out/checkpoint-*, a "
        "list, or step -> file; one model per checkpoint, NAME@STEP, whose step is a number in its name; with source: "
        "they are its weights, without it files of `rsm-probe train`",
    )
    key: str = Field(default="", description="key of the weights in a checkpoint, such as teacher; by default any")
    prefix: str = Field(default="", description="what precedes the names of weights in a checkpoint; by default any")
    strict: bool = Field(
        default=True, description="with false, weights that do not fit are left out, and layers that need them refused"
    )
    num_classes: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="classes of the head, for torchvision, timm, hf-classifier and pretrained"
    )
    preprocess: Preprocessing = None
    size: Edge | tuple[Edge, Edge] | None = Field(
        default=None, description="pixels of both sides, or height and width, for preprocess:; by default 224"
    )
    part: str = Field(default="", description="submodule to use instead of the whole model, such as an image tower")
    layers: Layers | None = Field(default=None, description="layers of this model; by default those of the study")
    tokens: Tokens = None
    layouts: Layouts = None
    method: Method = None
    forward: Forward = None
    inputs: Inputs = None
    recipe: TrainingConfig | None = Field(default=None, description="train a small network instead of loading one")
    seeds: Annotated[tuple[Seed, ...], Distinct] = Field(
        default=(0,), min_length=1, description="seeds of the recipe or of random weights; one model per seed"
    )
    dilated: Annotated[tuple[Literal[0, 1, 2], ...], Distinct] = Field(
        default=(0,),
        min_length=1,
        description="for a recipe: use the network once per number, with this many of its last stages dilated instead "
        "of strided, so that the same weights give more locations",
    )
    control: bool | Annotated[tuple[Seed, ...], Distinct] = Field(
        default=False,
        description="also use the untrained model, as NAME-untrained; a list of seeds for several of them, as "
        "NAME-untrained-SEED",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _from_file(cls, data: Any, handler: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, str):
            return handler(data)
        content, home = read_nested(data, info)
        return cls.parse(content, data, home)

    @field_validator("source", "weights")
    @classmethod
    def _beside_the_configuration(cls, written: str | None, info: ValidationInfo) -> str | None:
        if written is None or written == "default":
            return written
        library, colon, title = written.partition(":")
        if colon and library in _LOCAL_FOLDERS:
            return f"{library}:{config_path(title, info)}"
        if colon and library == "torch.hub":
            repository, colon, entry = title.rpartition(":")
            return f"{library}:{config_path(repository, info)}{colon}{entry}"
        if colon and Path(library).suffix == ".py":
            return f"{config_path(library, info)}:{title}"
        return written if colon and info.field_name == "source" else config_path(written, info)

    @field_validator("checkpoints")
    @classmethod
    def _matched(cls, written: Any, info: ValidationInfo) -> dict[int, str] | None:
        # A stored configuration names the files, whatever a pattern would match later.
        return None if written is None else checkpoint_files(written, lambda path: config_path(path, info))

    @field_validator("source")
    @classmethod
    def _no_code(cls, source: str | None, info: ValidationInfo) -> str | None:
        allowed = isinstance(info.context, ConfigFolder) and info.context.allow_code
        if _runs_code(source) and not allowed:
            raise ValueError(NO_CODE)
        return source

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        given = self.source is not None or self.checkpoints is not None
        if given == (self.recipe is not None):
            raise ValueError("give either source: or recipe:; checkpoints: of a recipe are among its keys")
        if self.checkpoints is not None and self.weights != "default":
            raise ValueError("weights: and checkpoints: are both weights of the source; give one of them")
        if self.recipe is None and self.weights is not None and self.seeds != (0,):
            raise ValueError("seeds: applies only to a recipe or to random weights (weights: null)")
        for key in ("key", "prefix", "strict", "num_classes", "preprocess", "size"):
            if self.recipe is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: applies only to a source, not to a recipe")
        if (self.key or self.prefix) and self.weights in (None, "default") and self.checkpoints is None:
            raise ValueError("key: and prefix: choose weights within a checkpoint; give it as weights:")
        if self.size is not None and self.preprocess is None:
            raise ValueError(f"size: needs preprocess: to be one of {', '.join(PREPROCESSING)}")
        if self.dilated != (0,) and self.recipe is None:
            raise ValueError("dilated: applies only to networks of a recipe")
        if self.control and not self.name:
            raise ValueError("control: needs a name:, which names the model and its control in results")
        title = self.titled(self.seeds[0])
        if base_title(title) != title:
            raise ValueError(
                f"name: the endings {DILATED}1 and {DILATED}2 are reserved for dilated:; choose a different name"
            )
        if self.recipe is not None and self.name.endswith(_PARTIAL):
            raise ValueError(
                f"name: the ending {_PARTIAL} is reserved for partly trained networks; choose a different name"
            )
        return self

    def titled(self, seed: int) -> str:
        """The title of the network with a seed; one without `name` is named as by `load_model`."""
        return f"{self.network}-{seed}" if len(self.seeds) > 1 else self.network

    def titles(self) -> list[str]:
        """The titles of all models of this entry, in loading order."""
        names = [title for seed in self.seeds for title in self.step_titles(seed) or [self.titled(seed)]]
        names += self.controls
        return [f"{name}{DILATED}{dilated}" if dilated else name for name in names for dilated in self.dilated]

    @property
    def checkpoint_files(self) -> dict[int, str]:
        """Step -> file of the checkpoints of a source; empty without `checkpoints`."""
        return self.checkpoints if isinstance(self.checkpoints, dict) else {}

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, of a source or of a recipe, in order; empty without `checkpoints`."""
        return list(self.checkpoint_files if self.recipe is None else self.recipe.checkpoint_steps)

    def step_titles(self, seed: int) -> list[str]:
        """The titles of the checkpoints with a seed, in the order of their steps."""
        return [checkpoint_title(self.titled(seed), step) for step in self.steps]

    def missing_networks(self, networks: Path) -> list[str]:
        """The titles of the networks that are still to be trained.

        Args:
            networks: the folder of trained networks.
        """
        missing = []
        for title, _, recipe in self._networks():
            file = _network_file(networks, title)
            steps = () if recipe is None else recipe.checkpoint_steps
            if recipe is not None and not all(f.exists() for f in (file, *(checkpoint_file(file, k) for k in steps))):
                missing.append(title)
        return missing

    def _networks(self) -> list[tuple[str, int, TrainingConfig | None]]:
        """Title, seed and recipe of each network, the control last."""
        changes: dict[str, Any] = {"steps": 0, "expected_accuracy": 0.0, "checkpoints": None}
        untrained = self.recipe and self.recipe.model_copy(update=changes)
        networks = [(self.titled(seed), seed, self.recipe) for seed in self.seeds]
        return networks + [(title, seed, untrained) for title, seed in self.controls.items()]

    @property
    def controls(self) -> dict[str, int]:
        """Title -> seed of the untrained models, dilated ones apart."""
        given = self.control if isinstance(self.control, tuple) else self.seeds[:1] if self.control else ()
        return dict(zip(twin_titles(self.name, given), given, strict=True))

    @property
    def network(self) -> str:
        """The name that all models of this entry share."""
        return self.name or ("resnet" if self.recipe is not None else default_name(self.source, self.checkpoint_files))

    def is_untrained(self, title: str) -> bool:
        """Whether the model of a title is a control, has random weights, or is a network before its first step."""
        title = base_title(title)
        if title in self.controls or self.recipe is None:
            return title in self.controls or (self.weights is None and self.checkpoints is None)
        at_start = {names[0] for seed in self.seeds if (names := self.step_titles(seed)) and self.steps[0] == 0}
        return self.recipe.steps == 0 or title in at_start

    def layers_or(self, layers: str | Sequence[str]) -> str | list[str]:
        """The layers of this model, by default those of the study."""
        own = layers if self.layers is None else self.layers
        return own if isinstance(own, str) else list(own)

    @property
    def reading(self) -> Reading:
        """How the models are called and their layers are read, apart from their layers."""
        return Reading(None, self.layouts, self.method, named_function(self.forward), self.inputs, self.tokens)

    def load(
        self, networks: Path, execution: Execution | None = None, train: bool = True
    ) -> Iterator[tuple[str, LoadedModel, float | None]]:
        """Load or train the models.

        Args:
            networks: the folder of trained networks.
            execution: where to train, and whether to show progress bars; None for the CPU.
            train: whether to train missing networks, instead of leaving them out.

        Yields:
            Title, model, and the accuracy of a network trained by a recipe (else None).

        Raises:
            ModelError: a model cannot be loaded or trained.
            ImageError: the images of a recipe cannot be loaded.
            StorageError: the folder holds a different network with that name, or cannot be written.
        """
        execution, absent = execution or Execution(), [] if train else self.missing_networks(networks)
        trained: LoadedModel | None = None
        for title, seed, recipe in self._networks():
            if recipe is None:
                for name, model in self._of_source(title, seed).items():
                    if not self.is_untrained(title):
                        trained = model
                    elif trained is not None:
                        model = as_twin(model, trained, self.source or "its checkpoint")
                    yield name, model, None
                continue
            if title in absent:
                continue
            file = _network_file(networks, title)
            loaded, accuracy = train_or_load(recipe, seed, file, execution.device, execution.progress)
            if not recipe.checkpoint_steps:
                yield from self._dilations(title, file, loaded, accuracy)
            for step in recipe.checkpoint_steps:
                of_step = checkpoint_file(file, step)
                yield from self._dilations(title, of_step, *load_with_accuracy(of_step))

    def _of_source(self, title: str, seed: int) -> dict[str, LoadedModel]:
        """The model of a source, or one per checkpoint."""
        files = self.checkpoint_files

        def load(file: str) -> LoadedModel:
            if self.source is not None:
                return self.load_source(file)
            return self.model_copy(update={"source": file, "checkpoints": None}).load_source(self.weights)

        with self.naming_paths(self.source, self.weights, *files.values()):
            if title in self.controls:
                return {title: self.load_source(None, seed)}
            if files:
                return load_sequence(title, files, load, self.source is not None)
            return {title: self.load_source(self.weights, seed)}

    def _dilations(
        self, title: str, file: Path, loaded: LoadedModel, accuracy: float
    ) -> Iterator[tuple[str, LoadedModel, float | None]]:
        """A trained network or one of its checkpoints, once for each of `dilated`."""
        for dilated in self.dilated:
            network = f"{title}{DILATED}{dilated}" if dilated else title
            model = load_trained(file, dilated=dilated) if dilated else loaded
            model = replace(model, reading=self.reading)
            name = title
            if loaded.step is not None:
                model, name = replace(model, network=network), checkpoint_title(title, loaded.step)
            yield (f"{name}{DILATED}{dilated}", model, None) if dilated else (name, model, accuracy)

    def load_source(
        self, weights: str | None, seed: int = 0, *, allow_pickle: bool = False, trust_remote_code: bool = False
    ) -> LoadedModel:
        """Load the model of a source.

        Args:
            weights: as in `load_model`.
            seed: of random weights.
            allow_pickle: as in `load_model`.
            trust_remote_code: as in `load_model`; code that the user has allowed runs in any case.

        Raises:
            ModelError: it cannot be loaded.
        """
        if (self.source or "").partition(":")[0] == IN_PYTHON:
            raise ModelError(
                f"model {self.name!r} was given in Python, and its configuration knows only its fingerprint; give it "
                f"again: read_study(CONFIG).run(out, models={{{self.name!r}: module}}, images=images)"
            )
        # The user has allowed it, or this entry would not be valid.
        trust_remote_code = trust_remote_code or _runs_code(self.source)
        from_file = weights not in (None, "default")
        # Checkpoints without a source know their architecture themselves.
        source = self.source or next(iter(self.checkpoint_files.values()), "")
        return load_model(
            source, weights, self.name, seed, part=self.part, key=self.key if from_file else "",
            prefix=self.prefix if from_file else "", strict=self.strict, num_classes=self.num_classes,
            preprocess=self.preprocess, size=self.size, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
            layouts=self.layouts, method=self.method, forward=named_function(self.forward), inputs=self.inputs,
            tokens=self.tokens,
        )  # fmt: skip


def _network_file(networks: Path, title: str) -> Path:
    return networks / f"{file_name(title)}.safetensors"


def named_function(forward: str | None) -> FileFunction | None:
    """The function that `forward:` names; None without a name.

    Raises:
        ModelError: there is no such function, or its file cannot be imported.
    """
    return None if forward is None else function_of(forward, "forward:")


def _runs_code(source: str | None) -> bool:
    library = (source or "").partition(":")[0]
    return Path(library).suffix == ".py" or library == "torch.hub"


def base_title(title: str) -> str:
    """The title of the same network without dilated stages."""
    return re.sub(f"{DILATED}[12]$", "", title)


def _told_apart(models: Sequence[ModelConfig]) -> Sequence[ModelConfig]:
    if (twice := repeated(title for model in models for title in model.titles())) is not None:
        raise ValueError(f"two models are called {twice!r}; give them different names with name:")
    return models


# Results identify the models of a study by title.
ToldApart = AfterValidator(_told_apart)


def check_models(entries: Sequence[ModelConfig], layers: str | Sequence[str], networks: Path) -> dict[str, LoadedModel]:
    """Load the models that need no training, and look up the layers of all models, before training any network.

    Args:
        entries: the models of a study.
        layers: layers of models without layers of their own.
        networks: the folder of trained networks; it is not written.

    Returns:
        The loaded models by title.

    Raises:
        LayerError: a model does not have a layer.
        RsmProbeError: a model cannot be loaded.
    """
    loaded: dict[str, LoadedModel] = {}
    for entry in entries:
        if entry.recipe is None:
            models = {title: model for title, model, _ in entry.load(networks)}
            loaded |= models
            modules = {title: model.module for title, model in models.items()}
        else:
            with torch.random.fork_rng(devices=[]):
                modules = {entry.titles()[0]: build_network(entry.recipe.network, 2)}
        for title, module in modules.items():
            try:
                Probe(module, entry.layers_or(layers))
            except LayerError as error:
                raise LayerError(f"{title}: {error}") from None
    return loaded


def load_models(
    entries: Sequence[ModelConfig],
    networks: Path,
    execution: Execution,
    loaded: Mapping[str, LoadedModel],
) -> tuple[dict[str, LoadedModel], dict[str, float]]:
    """Load or train all models of a study.

    Args:
        entries: the models of the study.
        networks: the folder of trained networks; missing networks are trained.
        execution: where to train, and whether to show progress bars.
        loaded: the models that `check_models` loaded.

    Returns:
        Models by title, in the order of the study, and accuracies of networks trained by recipes.

    Raises:
        RsmProbeError: a network cannot be trained.
    """
    models: dict[str, LoadedModel] = {}
    accuracies: dict[str, float] = {}
    for entry in entries:
        if entry.recipe is None:
            models |= {title: loaded[title] for title in entry.titles()}
            continue
        for title, model, accuracy in entry.load(networks, execution):
            models[title] = model
            if accuracy is not None:
                accuracies[title] = accuracy
    return models, accuracies
