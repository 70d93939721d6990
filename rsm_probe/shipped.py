"""The configurations that come with the package, by name.

A name is the path of a file within `configs/` without its ending, such as `quickstart` or `models/resnet18`.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
_ENDING = ".yaml"
_STUDY = re.compile(r"^study:", re.MULTILINE)


@cache
def shipped_folder() -> Path:
    """The folder of these configurations: within an installed package, and beside the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


@cache
def shipped_files() -> dict[str, Path]:
    """Name -> file of every configuration that comes with the package; the quickstart first, then by folder."""
    folder = shipped_folder()
    named = {file.relative_to(folder).as_posix().removesuffix(_ENDING): file for file in folder.rglob(f"*{_ENDING}")}
    return {name: named[name] for name in sorted(named, key=lambda name: (name != "quickstart", name.count("/"), name))}


def configuration_file(written: str | Path) -> Path:
    """The file of a configuration: a path, or the name of a configuration that comes with the package.

    A file with exactly the path that is written is used first. A warning says so where the package has a configuration
    of that name, and also where the package's is used beside a file of that name with `.yaml`.

    Args:
        written: the path or name; whether a file is there is up to the reader.
    """
    path = Path(written)
    shipped = shipped_files().get(path.as_posix())
    if shipped is None:
        return path
    if os.path.isfile(path):
        warnings.warn(
            f"the file {str(path)!r} of the working directory is used, not the configuration of that name that comes "
            "with rsm_probe; rename the file to use the other",
            stacklevel=2,
        )
        return path
    if os.path.isfile(f"{path}{_ENDING}"):
        warnings.warn(
            f"{str(path)!r} is the configuration that comes with rsm_probe; for the file of the working directory, "
            f"write {f'{path}{_ENDING}'!r}",
            stacklevel=2,
        )
    return shipped


def configuration_name(file: Path) -> str:
    """The name of a configuration that comes with the package, and of any other file its name without the ending."""
    absolute, folder = Path(os.path.abspath(file)), shipped_folder()
    return absolute.relative_to(folder).with_suffix("").as_posix() if absolute.is_relative_to(folder) else file.stem


def is_shipped(file: str | Path) -> bool:
    """Whether a file is one of the configurations that come with the package."""
    return Path(os.path.abspath(file)).is_relative_to(shipped_folder())


def one_line(file: Path) -> str:
    """What a configuration says of itself: its first line, which is a comment of one sentence."""
    with file.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


def kind_of(name: str, file: Path) -> str:
    """What a configuration describes: "study", "paper" (a study at the paper's sizes), "trial", "recipe" or "model"."""
    if name.startswith("models/"):
        return "model"
    if name.startswith("smoke/"):
        return "trial"
    if not _STUDY.search(file.read_text(encoding="utf-8")):
        return "recipe"
    return "paper" if name.endswith(("_paper", "_imagenet")) else "study"
