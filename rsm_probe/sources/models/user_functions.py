"""Run functions of the user that build a module, or return images."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from torch import nn

from rsm_probe.errors import ImageError, ModelError, RsmProbeError, did_you_mean


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
    """

    function: Callable[..., Any]
    name: str

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
    return _file_function(path, name, hashlib.sha256(path.read_bytes()).hexdigest() if isfile(path) else "")


@functools.cache  # the user's file runs once, until it changes
def _file_function(file: Path, name: str, content: str) -> FileFunction:
    return FileFunction(function_in(file, name), f"{file.name}:{name} {content[:16]}")


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
