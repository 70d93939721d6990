"""How images and models were made, as plain data from which another process makes the same ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ends the refusals of what other processes cannot make, with the options that send work to other processes.
OR_STAY = "or leave out executor= (--processes, --cluster), and this process does all the work"


@dataclass(frozen=True)
class Origin:
    """The call that made images or a model. Pickles hold its function by name.

    It travels only from the process of the user to its workers, and is never stored: reading it calls a function.

    Attributes:
        function: a function that can be imported by name.
        arguments: the names and values of its arguments: numbers, texts, bytes, None, tuples of these, and origins.
    """

    function: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(function: Callable[..., Any], /, **arguments: Any) -> Origin:
        """Describe a call by the function and its arguments."""
        return Origin(function, tuple(arguments.items()))

    def make(self) -> Any:
        """Make the arguments that are origins themselves, and call the function."""
        made = {name: value.make() if isinstance(value, Origin) else value for name, value in self.arguments}
        return self.function(**made)


def absolute_path(path: str | os.PathLike[str]) -> str:
    """A path that means the same file in a process that started in another folder."""
    return str(Path(path).absolute())
