"""Commands that run no study: rsm-probe keys, images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsm_probe.errors import ConfigError, look_up
from rsm_probe.storage.paths import local_folder


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
