"""Load models of libraries with their preprocessing; libraries are imported on first use."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.checks import require_whole
from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.sources.images.pixels import to_rgb
from rsm_probe.sources.models.formats.output_strides import output_stride, with_strides
from rsm_probe.sources.models.formats.packaged import packaged_model
from rsm_probe.sources.models.hub_architectures import HUB_ARCHITECTURES, hub_config, hub_processor
from rsm_probe.sources.models.user_functions import built
from rsm_probe.sources.models.weights import fetched

Preprocess = Callable[[Image.Image], Tensor]


# The files of which one describes the preprocessing of a saved model.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Library(Protocol):
    """A function that loads the models of a library."""

    def __call__(self, title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, Preprocess | None]:
        """Load a model with pretrained or random weights; return it with its preprocessing, if it has one.

        A library whose models have a head for classes also takes `num_classes: int | None = None`, by keyword.
        """


def _torchvision(
    title: str, pretrained: bool, trust_remote_code: bool, *, num_classes: int | None = None
) -> tuple[nn.Module, Preprocess]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(title).DEFAULT
    except ValueError:
        names = torchvision.models.list_models()
        raise ModelError(f"torchvision has no model {title!r}{did_you_mean(title, names)}") from None
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    # By default, detectors and segmenters fetch a pretrained backbone.
    builder = inspect.signature(torchvision.models.get_model_builder(title))
    if not pretrained and "weights_backbone" in builder.parameters:
        options["weights_backbone"] = None
    if num_classes is not None:
        require_whole(num_classes, "num_classes", 1, ModelError)
        options["num_classes"] = num_classes
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    module = fetched(
        f"torchvision:{title}", lambda: torchvision.models.get_model(title, **options), f"{weights.url} into {cache}"
    )
    transform = weights.transforms()
    if title in torchvision.models.list_models(torchvision.models.video):
        # It takes clips (T, C, H, W) and returns (C, T, H, W), and treats every frame alike.
        def of_frame(image: Image.Image) -> Tensor:
            pixels = torchvision.transforms.functional.pil_to_tensor(to_rgb(image))
            return transform(pixels[None])[:, 0]

        return module, of_frame
    return module, lambda image: transform(to_rgb(image))


def _timm(
    title: str, pretrained: bool, trust_remote_code: bool, *, num_classes: int | None = None
) -> tuple[nn.Module, Preprocess]:
    import timm

    title, strides = output_stride(title)
    if not timm.is_model(title):
        raise ModelError(f"timm has no model {title!r}{did_you_mean(title, timm.list_models())}")
    known = timm.get_pretrained_cfg(title)
    repository = known.hf_hub_id if known is not None else None
    instructions = _hub_instructions(repository) if repository else ""
    options = {"pretrained": pretrained} | ({} if num_classes is None else {"num_classes": num_classes})

    def build() -> nn.Module:
        return with_strides(title, strides, lambda: timm.create_model(title, **options, **strides))

    module = fetched(f"timm:{title}", build, instructions, hub=pretrained)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    return module, lambda image: transform(to_rgb(image))


def _transformers(
    auto_class: str, title: str, pretrained: bool, trust_remote_code: bool, *, num_classes: int | None = None
) -> tuple[nn.Module, Preprocess | None]:
    """Load a model through one of the `Auto...` classes of transformers."""
    import transformers

    if num_classes is not None and auto_class == "AutoModel":
        raise ModelError(f"hf:{title} is built without a head; use hf-classifier:{title} with num_classes=")
    auto, local = getattr(transformers, auto_class), isdir(title)
    if not local and (title.startswith((".", "/", "~")) or title.count("/") > 1):
        raise ModelError(f"no folder at {title}; write a model of the hub as hf:organisation/name")

    def build() -> nn.Module:
        if pretrained:
            return auto.from_pretrained(title, trust_remote_code=trust_remote_code, use_safetensors=True)
        labels = {} if num_classes is None else {"num_labels": num_classes}
        try:
            config = transformers.AutoConfig.from_pretrained(title, trust_remote_code=trust_remote_code, **labels)
        except OSError:
            if title not in HUB_ARCHITECTURES:
                raise
            config = hub_config(title, **labels)
        return auto.from_config(config, trust_remote_code=trust_remote_code)

    def build_processor() -> Any:
        try:
            return transformers.AutoImageProcessor.from_pretrained(title, trust_remote_code=trust_remote_code)
        except OSError:
            if pretrained or title not in HUB_ARCHITECTURES:
                raise
            return hub_processor(title)

    instructions = "" if local else _hub_instructions(title)
    # Even random weights need the configuration and the preprocessing.
    module = fetched(
        f"hf:{title}",
        build,
        instructions,
        random_weights=pretrained and (local or title in HUB_ARCHITECTURES),
        local=local,
        hub=not local,
    )
    if local and not any((Path(title) / name).exists() for name in _PROCESSORS):
        return module, None  # `save_pretrained` of a model alone
    processor = fetched(
        f"hf:{title}",
        build_processor,
        instructions,
        random_weights=False,
        local=local,
        hub=not local,
    )

    if not trust_remote_code:
        _warn_of_other_code(title, auto_class, module.config, "model")
        _warn_of_other_code(title, "AutoImageProcessor", processor, "preprocessing")

    def preprocess(image: Image.Image) -> Tensor:
        return processor(images=to_rgb(image), return_tensors="pt")["pixel_values"][0]

    return module, preprocess


def _open_clip(title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, Preprocess]:
    """Load ARCH/TAG of OpenCLIP, or a model of the hub as hf-hub:organisation/name."""
    try:
        import open_clip
    except ImportError:
        raise ModelError(f"open_clip:{title} needs the package open_clip_torch: pip install open_clip_torch") from None

    hub = title.startswith(("hf-hub:", "local-dir:"))
    name, _, tag = (title, "", "") if hub else title.partition("/")
    if not hub:
        if name not in open_clip.list_models():
            raise ModelError(f"OpenCLIP has no model {name!r}{did_you_mean(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags and (tag or pretrained):
            known = f"it has {', '.join(tags)}" if tags else "it has none"
            problem = f"no weights {tag!r}{did_you_mean(tag, tags)}" if tag else "weights by tag, as open_clip:ARCH/TAG"
            raise ModelError(f"OpenCLIP has {problem} for {name}; {known}; weights=None gives random weights")
    module, _, transform = fetched(
        f"open_clip:{title}",
        lambda: open_clip.create_model_and_transforms(
            name, tag if pretrained and tag else None, load_weights=pretrained, pretrained_hf=False
        ),
        hub=pretrained or title.startswith("hf-hub:"),
    )
    return module, lambda image: transform(to_rgb(image))


def _torch_hub(title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, None]:
    """Load REPO:ENTRY, where REPO is owner/name[:branch] on GitHub or a local folder with a hubconf.py."""
    repository, _, entry = title.rpartition(":")
    if not repository or not entry:
        raise ModelError(f"write torch.hub:owner/name:entry or torch.hub:folder:entry, found 'torch.hub:{title}'")
    if not trust_remote_code:
        raise ModelError(
            f"torch.hub:{title} runs the Python code of that repository, which can do anything; if you trust it, set "
            f"trust_remote_code=True in load_model, or give --trust-remote-code to `rsm-probe layers` or --allow-code "
            f"to `rsm-probe run`"
        )
    local = isdir(repository)
    if not local and repository.startswith((".", "/", "~")):
        raise ModelError(f"no folder at {repository}")

    def load(**options: Any) -> Any:
        return torch.hub.load(
            repository, entry, source="local" if local else "github", trust_repo=True, verbose=False, **options
        )

    def factory() -> Any:
        try:
            return load(pretrained=pretrained)
        except TypeError as error:
            if "pretrained" not in str(error):
                raise
            return load()  # this entry decides on its weights itself

    return built(factory, f"torch.hub:{title}"), None


def _warn_of_other_code(title: str, key: str, holder: Any, what: str) -> None:
    """Warn if transformers uses its own code for a model that comes with code."""
    named = getattr(holder, "auto_map", None)
    if isinstance(named, dict) and key in named:
        warnings.warn(
            f"hf:{title} comes with its own Python code for its {what}, which is not run; the code of transformers for "
            f"this type of model is used instead; if you trust the model's code, set trust_remote_code=True",
            stacklevel=2,
        )


def _hub_instructions(repository: str) -> str:
    from huggingface_hub import constants

    return f"`hf download {repository}`, and put the files in {constants.HF_HUB_CACHE}"


LIBRARIES: dict[str, Library] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": partial(_transformers, "AutoModel"),
    "hf-classifier": partial(_transformers, "AutoModelForImageClassification"),  # with the classification head
    "open_clip": _open_clip,
    "torch.hub": _torch_hub,
    "pretrained": packaged_model,  # whose weights come as Python packages
}
# Whose models may be local folders.
OF_FOLDERS = frozenset({"hf", "hf-classifier", "open_clip", "torch.hub"})
# What is probed of models that also take text, unless a part or a method is named.
IMAGE_TOWERS = {"open_clip": "visual"}


def short_name(source: str) -> str:
    """The name of a model in results: the last part of its source, or the architecture of OpenCLIP."""
    library, _, title = source.partition(":")
    if library == "open_clip" and not title.startswith(("hf-hub:", "local-dir:")):
        return title.partition("/")[0]
    if library == "torch.hub":
        return title.rpartition(":")[2]
    return (title or library).rstrip("/").rsplit("/", 1)[-1]
