"""Faces: the names that a folder exports, each loaded on first use (PEP 562), and former names that still work."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_face(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Give a package the names in its `if TYPE_CHECKING:` block without importing their modules.

    The block is the only list: type checkers and editors read it directly, and this function parses it from the source.
    Names missing from `__all__` are deprecated aliases; using one warns and names its replacement. Submodules load on
    first use, too, so that `import rsm_probe` suffices for `rsm_probe.matching.Rewindowed`.

    Args:
        package: `__name__` of the package.

    Returns:
        `__getattr__` and `__dir__` of the package.
    """
    face = sys.modules[package]
    assert face.__spec__ is not None
    source: str = face.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    module_of = {
        alias.asname or alias.name: statement.module
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }

    def load(name: str) -> Any:
        if name in module_of:
            value = getattr(import_module(module_of[name]), name)
            if name in face.__all__:
                setattr(face, name, value)
            else:
                new = f"{module_of[name]}.{name}"
                warnings.warn(
                    f"{package}.{name} is deprecated and will be removed in the next minor version; use {new}",
                    DeprecationWarning,
                    stacklevel=2,
                )
            return value
        submodule = f"{package}.{name}"
        if not name.startswith("_") and find_spec(submodule):
            return import_module(submodule)
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=face)

    return load, lambda: sorted({*vars(face), *face.__all__})


class FormerName:
    """A former name of an attribute, which works and warns until the next minor version.

    Args:
        now: its name now.
    """

    def __init__(self, now: str) -> None:
        self.now = now

    def __set_name__(self, owner: type, name: str) -> None:
        self.before = f"{owner.__module__}.{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:  # tools that list a class use nothing of it
            return self
        self._warn()
        return getattr(instance, self.now)

    def __set__(self, instance: Any, value: Any) -> None:
        self._warn()
        setattr(instance, self.now, value)

    def _warn(self) -> None:
        warnings.warn(
            f"{self.before} is deprecated and will be removed in the next minor version; use {self.now}",
            DeprecationWarning,
            stacklevel=3,
        )
