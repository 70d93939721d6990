"""Commands that run no study (rsm-probe keys, images, report), and what other commands print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsm_probe.errors import ConfigError, look_up
from rsm_probe.storage.paths import local_folder

if TYPE_CHECKING:
    from rsm_probe.probe.describe import LayerInfo
    from rsm_probe.runs.study import Study


def keys(
    study: Annotated[str, typer.Argument(help="the study: in a configuration, such as sweep or pairs")] = "sweep",
) -> None:
    """List the keys of a configuration, with their defaults.

    A key such as images.clips is written as `clips:` within `images:`, and models: is a list of entries with the keys
    models.name, models.source and so on. For examples, see configs/.
    """
    from rsm_probe.config import described_keys
    from rsm_probe.studies.registry import STUDIES

    for key, default, description in described_keys(look_up(study, STUDIES, "study", ConfigError)):
        typer.echo(f"{key}: {default}")
        if description:
            typer.echo(f"    {description}")


def images(
    config: Annotated[Path, typer.Argument(help="a YAML file with images:, such as that of a study")],
    out: Annotated[str, typer.Option(help="folder for the images; new or empty")],
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="run Python code that the configuration names in source: file.py:function"),
    ] = False,
    progress: Annotated[bool, typer.Option(help="show progress bars")] = True,
) -> None:
    """Write the images of a configuration as PNG files, with their objects as COCO JSON.

    The folder receives images/ and annotations.json, which holds the classes and boxes of all objects. The images need
    annotations with boxes, as those of `source: composed` and `source: scenes` have.
    """
    from rsm_probe.config import ConfigFolder, read_yaml
    from rsm_probe.runs.images_config import ImagesConfig
    from rsm_probe.sources import write_coco

    data = read_yaml(config)
    if not isinstance(data.get("images"), dict):
        raise ConfigError(
            f"{config} must hold images: with its source: and options, as a configuration of a study does"
        )
    entry = ImagesConfig.parse(data["images"], f"{config}, images:", ConfigFolder.of(config, allow_code))
    image_set = entry.load(progress)
    file = write_coco(image_set, local_folder(out, "--out"), progress=progress)
    objects = sum(len(note["boxes"]) for note in image_set.annotations)
    typer.echo(f"{len(image_set)} images with {objects} objects: {file}")


def report(
    run_folder: Annotated[str, typer.Argument(help="the folder of a finished run, or of a sweep from Python")],
    out: Annotated[str | None, typer.Option(help="the HTML file; by default report.html in the run folder")] = None,
) -> None:
    """Write the report page of a finished run again: one HTML file that opens without a network.

    It shows what the run stored; no model runs and no image is read.
    """
    from rsm_probe.errors import StorageError
    from rsm_probe.report.default import write_report
    from rsm_probe.studies.registry import read_study
    from rsm_probe.studies.sweep_report.page import write_result_report

    folder, file = local_folder(run_folder, "the run folder"), None if out is None else local_folder(out, "--out")
    if (folder / "config.yaml").is_file():
        written = write_report(read_study(folder / "config.yaml", stored=True), folder, file)
    elif (folder / "result.zarr").is_dir():
        written = write_result_report(folder, file)
    else:
        raise StorageError(f"{folder} is not a run folder (it has neither config.yaml nor result.zarr)")
    typer.echo(f"report: {written}")


def report_after_run(study: Study, folder: Path) -> str:
    """Write the report page at the end of a run, and say where it is, or why there is none: the result is safe."""
    from rsm_probe.errors import StorageError
    from rsm_probe.report.default import write_report

    try:
        return f"report: {write_report(study, folder)}"
    except StorageError as error:
        return f"no report page: {error}"


def layer_table(layers: Sequence[LayerInfo]) -> Iterator[str]:
    """The lines of a table of layers."""
    rows = [("", "name", "class", "output", "S", "C", "grid", "prefix")]
    for layer in layers:
        shape, grid = ("x".join(map(str, sizes)) if sizes else "-" for sizes in (layer.shape, layer.grid))
        numbers = str(layer.locations), str(layer.channels), grid, str(layer.prefix)
        rows.append(("*" if layer.is_block else "", layer.name, layer.kind, shape, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
