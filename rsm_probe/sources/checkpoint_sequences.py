"""The checkpoints of one training, in the order of their steps, as models of one network."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rsm_probe.checks import brief, listed, require_text, require_whole
from rsm_probe.errors import ModelError
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.fingerprints import without_addresses
from rsm_probe.sources.models.libraries import Preprocess, short_name
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Forward

# What is said to name a step that a file name does not give.
_MAPPING = "name the steps yourself, as in {0: FILE, 100: FILE}"
_NARROWER = f"leave it out by a narrower pattern, or {_MAPPING}"
# A whole number, in thousands or millions if a letter says so, and not a part of a decimal one.
_NUMBER = re.compile(r"(?<![\d])(?<!\d\.)(\d+)(?!\d|\.\d)([kKmM](?![A-Za-z]))?")
# Words before the number of a step, in order of preference.
_WORDS = (r"(?:global[-_ ]?)?steps?", r"iter(?:ation)?s?", r"(?:epochs?|ep)")
_FACTORS = {"": 1, "k": 1000, "m": 10**6}
# The folder of the checkpoints that a recipe names.
_FOLDER = "-steps"


def load_checkpoints(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[int, str | Path],
    source: str | Path | nn.Module | Callable[[], nn.Module] | None = None,
    name: str = "",
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
) -> dict[str, LoadedModel]:
    """Load the checkpoints of one training as models, which `sweep` takes and tells apart by their steps.

    The step of a checkpoint is a number in its name: the one after "step" or "iter", else after "epoch", else the only
    number that differs between the names. "10k" is 10 000.

    Args:
        checkpoints: a pattern such as "runs/net/*.pth" or "out/checkpoint-*", whose matches are files or folders; a
            list of such patterns and files; or a mapping of steps to files.
        source: the architecture, as in `load_model`, whose `weights` the checkpoints are; a module is copied for each.
            None for files that `rsm-probe train` wrote, or any other that is a source of `load_model` itself.
        name: the name that all models share; by default that of the source, or else of the folder.
        part: as in `load_model`, and so are the other arguments.
        key: as in `load_model`.
        prefix: as in `load_model`.
        strict: as in `load_model`.
        num_classes: as in `load_model`.
        preprocess: as in `load_model`.
        size: as in `load_model`.
        allow_pickle: as in `load_model`.
        trust_remote_code: as in `load_model`.
        layers: as in `load_model`.
        layouts: as in `load_model`.
        forward: as in `load_model`.
        method: as in `load_model`.
        inputs: as in `load_model`.
        tokens: as in `load_model`.

    Returns:
        "NAME@STEP" -> model, in the order of the steps.

    Raises:
        ModelError: no file matches, a name gives no step, two files have the same step, or a checkpoint cannot be
            loaded or has another architecture than the others; the message names the file.
    """
    files = checkpoint_files(checkpoints)
    require_text(name, "name", ModelError)

    def load(file: str) -> LoadedModel:
        options: dict[str, Any] = {
            "part": part, "key": key, "prefix": prefix, "strict": strict, "num_classes": num_classes,
            "preprocess": preprocess, "size": size, "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code, "layers": layers, "layouts": layouts, "forward": forward,
            "method": method, "inputs": inputs, "tokens": tokens,
        }  # fmt: skip
        if source is None:
            return load_model(file, **options)
        return load_model(_own_copy(source), weights=file, **options)

    if not name:
        name = default_name(source if isinstance(source, str | Path) else None, files)
        if source is not None and not isinstance(source, str | Path):
            name = type(source).__name__ if isinstance(source, nn.Module) else getattr(source, "__name__", name)
    return load_sequence(name, files, load, source is not None)


def load_sequence(
    name: str, files: Mapping[int, str], load: Callable[[str], LoadedModel], as_weights: bool
) -> dict[str, LoadedModel]:
    """Load the checkpoints of one network.

    Args:
        name: name of the network.
        files: step -> file, as `checkpoint_files` gives them.
        load: loads a file.
        as_weights: whether it loads them as weights of a source.

    Returns:
        Title -> model, as `checkpoint_title` gives them, in the order of the steps.

    Raises:
        ModelError: a checkpoint cannot be loaded, or differs in its architecture from the others.
    """
    models: dict[str, LoadedModel] = {}
    for step, file in files.items():
        if not as_weights and os.path.isdir(file):
            raise ModelError(
                f"{file} is a folder, whose architecture is unknown: give source= (source:), such as "
                f"'hf-classifier:{file}' or 'timm:resnet50'"
            )
        try:
            model = load(file)
        except ModelError as error:
            where = "" if file in str(error) else f"{file}: "
            raise ModelError(f"checkpoint of step {step}: {where}{error}") from error
        title = checkpoint_title(name, step)
        models[title] = replace(model, name=title, network=name, step=step)
    _require_one_architecture(models, list(files.values()))
    return models


def checkpoint_title(name: str, step: int) -> str:
    """The name of a checkpoint in results."""
    return f"{name}@{step}"


def default_name(source: str | Path | None, files: Mapping[int, str]) -> str:
    """The name of a network without a name of its own: that of its source, or of the folder of its checkpoints."""
    if source is not None:
        return Path(source).stem if Path(source).suffix == ".safetensors" else short_name(str(source))
    return Path(os.path.abspath(next(iter(files.values())))).parent.name.removesuffix(_FOLDER) or "network"


def checkpoint_files(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[int, str | Path],
    resolve: Callable[[str], str] = lambda path: path,
) -> dict[int, str]:
    """Look up the files of a sequence of checkpoints, and the step of each; see `load_checkpoints`.

    Args:
        checkpoints: a pattern, a list of patterns and files, or a mapping of steps to files.
        resolve: turns a path, such as the part of a pattern before its first wildcard, into one that can be opened.

    Returns:
        Step -> file or folder, in the order of the steps.

    Raises:
        ModelError: no file matches, a name gives no step, or two files have the same step.
    """
    if isinstance(checkpoints, Mapping):
        if not checkpoints:
            raise ModelError("no checkpoints: the mapping of steps to files is empty")
        for step in checkpoints:
            require_whole(step, "the step of a checkpoint", 0, ModelError)
        return {int(step): resolve(os.fspath(file)) for step, file in sorted(checkpoints.items())}
    if not isinstance(checkpoints, str | Path | Sequence) or isinstance(checkpoints, bytes):
        raise ModelError(f"checkpoints must be a pattern, a list of files or a mapping, found {brief(checkpoints)}")
    patterns = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    named: dict[str, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str | Path) or not str(pattern):
            raise ModelError(f"a checkpoint must be the path of a file or a pattern, found {brief(pattern)}")
        named |= _matches(str(pattern), resolve)
    if not named:
        raise ModelError("no checkpoints: the list is empty")
    listed_files = [file for file, name in named.items() if name == file]
    if len(listed_files) > 1:
        home = os.path.commonpath([os.path.abspath(file) for file in listed_files])
        named |= {file: os.path.relpath(file, home) for file in listed_files}
    files: dict[int, str] = {}
    for file, step in _steps(named).items():
        if step in files:
            raise ModelError(f"two checkpoints are of step {step}: {files[step]} and {file}; {_MAPPING}")
        files[step] = file
    return dict(sorted(files.items()))


def _matches(pattern: str, resolve: Callable[[str], str]) -> dict[str, str]:
    """The files of a pattern, each with the part of its path that the pattern leaves open: the name of its step.

    A path without wildcards is its own name: what it shares with others is known only beside them.
    """
    if not glob.has_magic(pattern):
        file = resolve(pattern)
        if not os.path.exists(file):
            raise ModelError(f"no checkpoint at {file}")
        return {os.path.normpath(file): os.path.normpath(file)}
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    home = resolve(str(Path(*parts[:first])) if first else ".")
    matches = glob.glob(str(Path(*parts[first:])), root_dir=home, recursive=True)
    files = {os.path.normpath(os.path.join(home, match)): match for match in sorted(matches)}
    if not files:
        raise ModelError(f"no checkpoint matches {pattern!r} in {os.path.abspath(home)}")
    return files


def _steps(named: Mapping[str, str]) -> dict[str, int]:
    """The step of each file.

    Raises:
        ModelError: a name gives none, or it is unclear which of its numbers is the step.
    """
    stems = {file: _without_suffix(file, Path(name).name if name == file else name) for file, name in named.items()}
    for word in _WORDS:
        # As in "epoch=3-step=1200", "iter_0001000", "checkpoint_epoch5".
        labelled = re.compile(rf"(?<![A-Za-z]){word}[-_=. ]?{_NUMBER.pattern}", re.IGNORECASE)
        of_word = {file: _values(labelled.findall(stem)) for file, stem in stems.items()}
        if all(len(set(values)) == 1 for values in of_word.values()):
            return {file: values[0] for file, values in of_word.items()}
        if any(of_word.values()):
            file = next(file for file, values in of_word.items() if len(set(values)) != 1)
            example = next(file for file, values in of_word.items() if values)
            raise ModelError(f"{file} does not name its step as {example} does; {_NARROWER}")
    numbers = {file: _values(_NUMBER.findall(stem)) for file, stem in stems.items()}
    without = [file for file, values in numbers.items() if not values]
    if without:
        raise ModelError(f"{without[0]} has no number in its name that could be its step; {_NARROWER}")
    texts = {_NUMBER.sub("0", stem) for stem in stems.values()}
    # As in "step_10/net_10.pth", a number may be there twice.
    columns = set(zip(*numbers.values(), strict=True)) if len(texts) == 1 else set()
    differing = [column for column in columns if len(set(column)) > 1] or list(columns)
    if len(differing) != 1:
        file = next(iter(stems))
        raise ModelError(f"it is unclear which number of {file} is its step; {_MAPPING}")
    return dict(zip(numbers, differing[0], strict=True))


def _values(numbers: Sequence[tuple[str, str]]) -> list[int]:
    return [int(digits) * _FACTORS[letter.lower()] for digits, letter in numbers]


def _without_suffix(file: str, name: str) -> str:
    """A name without what ends the names of all files of a format, such as ".t7"."""
    return name if os.path.isdir(file) else re.sub(r"\.[A-Za-z]\w*$", "", name)


def _own_copy(source: Any) -> Any:
    """A module of its own for each checkpoint, whose weights replace those of the module."""
    if not isinstance(source, nn.Module):
        return source
    try:
        return copy.deepcopy(source)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(source).__name__} cannot be copied for each checkpoint ({error}); give a function that builds it"
        ) from error


def _require_one_architecture(models: Mapping[str, LoadedModel], files: Sequence[str]) -> None:
    """Require modules that differ only in the values of their weights.

    Raises:
        ModelError: one differs from the majority; the message names its file.
    """
    structures = [_structure(model.module) for model in models.values()]
    usual = max(structures, key=structures.count)
    for file, structure in zip(files, structures, strict=True):
        if structure != usual:
            same = files[structures.index(usual)]
            shapes, others = dict(structure[1]), dict(usual[1])
            differing = [name for name in others | shapes if shapes.get(name) != others.get(name)]
            detail = f" in {listed(differing)}" if differing else ""
            raise ModelError(
                f"{file} is a checkpoint of another architecture than {same}: they differ{detail}; leave it out, or "
                f"give the two as models of their own"
            )


def _structure(module: nn.Module) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    shapes = [(name, tuple(getattr(value, "shape", ()))) for name, value in module.state_dict().items()]
    return without_addresses(repr(module)), tuple(shapes)
