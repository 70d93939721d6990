"""Run functions of the user that build a module, or return images."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from torch import nn

from rsm_probe.errors import ImageError, ModelError, RsmProbeError, did_you_mean
from rsm_probe.sources.images.origins import Origin, absolute_path


def function_in(file: Path, name: str) -> Callable[[], Any]:
    """Run a Python file of the user and return one of its functions.

    Raises:
        ModelError: the file or function does not exist, or the file fails to run.
    """
    if not isfile(file):
        raise ModelError(f"no file at {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file} cannot be imported: {_reason(error)}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in functions:
        raise ModelError(f"{file} has no function {name!r}{did_you_mean(name, functions)}")
    function: Callable[[], Any] = getattr(module, name)
    return function


@dataclass(frozen=True)
class FileFunction:
    """A function of a Python file, which stored results know by its name and the content of the file.

    Attributes:
        function: the function.
        name: file.py:function, and a hash of the file.
        path: the file.
    """

    function: Callable[..., Any]
    name: str
    path: Path = Path()

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def function_of(text: str, argument: str) -> FileFunction:
    """Import the function that a text names as file.py:function.

    Args:
        text: the text.
        argument: where it was written, for messages.

    Raises:
        ModelError: it does not name a function, or the file cannot be imported.
    """
    file, _, name = text.rpartition(":")
    if Path(file).suffix != ".py" or not name:
        raise ModelError(f"{argument} takes file.py:function, found {text!r}")
    path = Path(file)
    return _file_function(path, name, stored_name(path, name))


@functools.cache  # the user's file runs once, until it changes
def _file_function(file: Path, function: str, name: str) -> FileFunction:
    return FileFunction(function_in(file, function), name, file)


def stored_name(file: Path, function: str) -> str:
    """The name of a function of a file in stored results, which changes with the file."""
    content = hashlib.sha256(file.read_bytes()).hexdigest() if isfile(file) else ""
    return f"{file.name}:{function} {content[:16]}"


def importable_name(function: Callable[..., Any]) -> str | None:
    """The name by which another process can import a function, such as `module:function`; None if there is none."""
    if isinstance(function, FileFunction):
        return function.name
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name:
        return None
    try:
        return f"{module}:{name}" if imported(f"{module}:{name}") is function else None
    except ModelError:
        return None


def imported(name: str) -> Any:
    """Import what `importable_name` named as module:function.

    Raises:
        ModelError: there is no such module or function.
    """
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot import {name}: {error}") from error
    return value


def function_origin(function: Callable[..., Any]) -> Origin | None:
    """How another process gets a function: by its file or module; None if it has no name there."""
    name = importable_name(function)
    if name is None:
        return None
    if isinstance(function, FileFunction):
        title = name.rpartition(" ")[0].rpartition(":")[2]
        return Origin.of(_same_function, file=absolute_path(function.path), function=title, name=name)
    return Origin.of(imported, name=name)


def file_origin(file: Path, function: str) -> Origin:
    """How another process gets a function of a Python file, as long as the file does not change."""
    return Origin.of(_same_function, file=absolute_path(file), function=function, name=stored_name(file, function))


def _same_function(file: str, function: str, name: str) -> FileFunction:
    same = _file_function(Path(file), function, stored_name(Path(file), function))
    if same.name != name:
        raise ModelError(f"{file} has changed since this run began; run it again")
    return same


def built(factory: Callable[[], nn.Module], where: str) -> nn.Module:
    """Call a function that builds a module, and put the module into evaluation mode.

    Args:
        factory: the function; it takes no arguments.
        where: the name of the function, and of its file if there is one, for error messages.

    Raises:
        ModelError: the function fails or does not return a module; the message names it.
    """
    try:
        module = factory()
    except RsmProbeError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{where} failed to build a model: {_reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{where} must return a torch.nn.Module, got {type(module).__name__}")
    return module.eval()


def returned_images(file: str, name: str) -> Any:
    """Call a function of a Python file that returns images.

    Args:
        file: the file.
        name: the function; it takes no arguments.

    Raises:
        ImageError: the file or function does not exist, or fails.
    """
    try:
        function = function_in(Path(file), name)
    except ModelError as error:
        raise ImageError(str(error)) from error
    try:
        return function()
    except RsmProbeError:
        raise
    except (Exception, SystemExit) as error:
        raise ImageError(f"{file}:{name} failed to return images: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ended the program (sys.exit({error.code!r}))"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
