"""The folder of a run: who may write to it, symbolic links that lead out of it, and saving its figures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rsm_probe.checks import brief
from rsm_probe.config import Config, ConfigFolder, read_yaml
from rsm_probe.errors import StorageError
from rsm_probe.figures import print_style
from rsm_probe.storage.files import save_text
from rsm_probe.storage.locks import sole_writer
from rsm_probe.storage.paths import file_name, inside, local_folder
from rsm_probe.storage.replacing import replacing

# How deep to search for links: deeper levels hold arrays.
_DEEPEST = 3


def run_folder(out: Any) -> Path:
    """Check the path of a run folder; nothing is created.

    Raises:
        StorageError: it is a URL, a file, or a folder with links that lead out of it.
    """
    folder = local_folder(out)
    try:
        if folder.is_file():
            raise StorageError(f"{folder} is a file; choose a different --out")
        if folder.is_dir():
            _require_no_way_out(folder, folder, _DEEPEST)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot read {folder}: {error}") from error
    return folder


def require_free(
    config: Config, out: Path, begun: Callable[[Path], bool] = lambda _: False, execution: Collection[str] = ()
) -> None:
    """Check that a study may use a folder; nothing is written.

    Args:
        config: configuration of the study; its key `study` is the name.
        out: the folder.
        begun: whether the folder holds computed results. Until then the settings may change.
        execution: keys that may differ when a run is continued, because they decide how the work runs.

    Raises:
        StorageError: the folder holds other files, a different study, or a run with different settings.
    """
    file, settings = out / "config.yaml", config.model_dump(mode="json")
    if not file.exists():
        if out.is_dir() and any(not f.name.startswith(".") for f in out.iterdir()):
            raise StorageError(
                f"{out} is not empty and not a run folder (it has no config.yaml); choose a different --out"
            )
        return
    data = read_yaml(file)
    if data.get("study") != settings["study"]:
        raise StorageError(f"{out} holds a run of study {brief(data.get('study'))}; choose a different --out")
    if begun(out):
        stored = config.parse(data, str(file), ConfigFolder(allow_code=True)).model_dump(mode="json")
        differing = [key for key in settings if key not in execution and settings[key] != stored[key]]
        if differing:
            raise StorageError(
                f"{out} holds a run with different {', '.join(differing)}; choose a different --out or remove it"
            )


@contextmanager
def claimed(
    config: Config, out: Path, begun: Callable[[Path], bool] = lambda _: False, execution: Collection[str] = ()
) -> Iterator[Callable[[], None]]:
    """Reserve a folder for a study while it runs, and write `config.yaml`; see `require_free`.

    Yields:
        A function that raises StorageError if the folder was removed in the meantime.

    Raises:
        StorageError: the folder is not free, another process runs in it, or it was removed during the run.
    """
    require_free(config, out, begun, execution)  # before leaving a lock in a folder that holds other files
    file = out / "config.yaml"

    def require_there() -> None:
        if not file.exists():
            raise StorageError(
                f"{out} was removed during the run (its config.yaml is gone), so its contents are incomplete; remove "
                "it and run again"
            )

    with sole_writer(file):
        require_free(config, out, begun, execution)
        save_text(file, config.to_yaml())
        try:
            yield require_there
        except Exception as error:
            try:
                require_there()
            except StorageError as removed:
                raise removed from error
            raise
        require_there()


def save_figures(study: Any, out: Any, dpi: int = 300, most_pixels: int = 30_000) -> Iterator[Path]:
    """Draw the figures of a finished run into its folder `figures`, as `.png` and `.pdf`.

    Each file is written next to its destination and then moved there: a link there is replaced, not followed.

    Args:
        study: the study whose figures are drawn.
        out: its run folder.
        dpi: pixels per inch.
        most_pixels: limit for the longer side; larger figures get fewer pixels per inch. More than 2^16 pixels cannot
            be written.

    Yields:
        The path of each `.png`, once both files are written.

    Raises:
        StorageError: the run is not finished, or a file cannot be written.
    """
    folder = run_folder(out)
    figures: Mapping[str, Figure] = study.figures(folder)
    for name, figure in figures.items():
        fitting = min(dpi, most_pixels / max(figure.get_size_inches()))
        for kind in ("pdf", "png"):
            file = inside(folder, folder / "figures" / f"{file_name(name)}.{kind}")
            # Font type 42 embeds fonts, so that text stays text.
            with replacing(file) as fresh, print_style(), rc_context({"pdf.fonttype": 42}):
                figure.savefig(fresh, format=kind, dpi=fitting, bbox_inches="tight")
        yield file


def _require_no_way_out(home: Path, folder: Path, depth: int) -> None:
    for path in folder.iterdir():
        if path.is_symlink() and path.is_dir():
            inside(home, path / "file")
        if depth > 1 and path.is_dir() and path.suffix != ".zarr":
            _require_no_way_out(home, path, depth - 1)
