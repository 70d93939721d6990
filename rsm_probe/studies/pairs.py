"""All pairs of a set of images, or of queries with a database, as a study: whole RSMs, layer by layer, on disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field, model_validator

from rsm_probe import figures
from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.captures.recording import capture
from rsm_probe.comparison.alignment import cka
from rsm_probe.config import Config
from rsm_probe.errors import ComparisonError, ModelError
from rsm_probe.execution.amounts import parse_bytes
from rsm_probe.execution.devices import find_device
from rsm_probe.figures import names_as_written
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.on_disk import all_pairs, open_pairs
from rsm_probe.paper.similarity_rules import require_usable
from rsm_probe.runs.entries import ImagesConfig, ModelConfig, ToldApart
from rsm_probe.runs.fields import Count, Folder, Hours, Kernels, Layers, Matchings, Memory, Place
from rsm_probe.runs.loaded_models import check_models, load_models
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.run_folder import claimed, require_free, run_folder
from rsm_probe.runs.tables import csv_text, load_table, save_table
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import check_kernel, get_kernel
from rsm_probe.similarity.rsm import RSM
from rsm_probe.storage.files import save_json, save_text
from rsm_probe.storage.places import absolute, file_name, is_url

# After the title of a model, in the name of its capture of the database.
_DATABASE = "-database"
# Layers that fit on a figure.
_MOST_ROWS = 8


@dataclass(frozen=True)
class PairsResult:
    """Where the pairs of every layer are, and what is known of them.

    Attributes:
        table: one row for each model, layer and matching: `images_a`, `images_b`, `locations`, `channels`;
            `largest_gap`, how far a product can be from the optimum, relative to the norms (NaN where nothing is
            proven); for one set of images and each kernel the CKA with the spatio-semantic RSM of the same layer, where
            there is one and `memory` holds both; and `path`, relative to `folder`.
        folder: path or URL that holds the pairs.
    """

    table: list[dict[str, Any]]
    folder: str

    def rsm(self, model: str, layer: str, matching: str, kernel: str = "cosine") -> RSM:
        """One RSM, read into memory.

        Raises:
            ComparisonError: there is none of these names.
        """
        for row in self.table:
            if (row["model"], row["layer"], row["matching"]) == (model, layer, matching):
                return RSM.from_pairs(open_pairs(f"{self.folder}/{row['path']}"), kernel)
        raise ComparisonError(f"no pairs of layer {layer!r} of model {model!r} under matching {matching!r}")

    def __str__(self) -> str:
        keys = [key for key in self.table[0] if key != "path"]
        cells = [keys, *([_shown(row[key]) for key in keys] for row in self.table)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(keys))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


class PairsConfig(Config):
    """All pairs: which models see which images, how their pairs are matched, and where it all goes."""

    study: Literal["pairs"] = "pairs"
    models: Annotated[tuple[ModelConfig, ...], ToldApart] = Field(min_length=1)
    images: ImagesConfig
    database: ImagesConfig | None = Field(
        default=None,
        description="the images in the columns; else those in the rows, each pair of which is matched once",
    )
    layers: Layers = "blocks"
    matchings: Matchings = Field(default=("identity", "optimal"), min_length=1)
    kernels: Kernels = Field(default=("cosine",), min_length=1)
    centering: Centering | None = "location-mean"
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of tokens on disk")
    batch_size: Count = Field(default=64, description="images per forward pass")
    tile: Count | None = Field(default=None, description="images on each side of a tile")
    permutations: bool = Field(default=False, description="also keep how locations were paired")
    store: Place | None = Field(
        default=None, description="folder or URL for captures and pairs, which all workers see; else the run folder"
    )
    device: str | None = Field(default="auto", description="auto: a GPU where there is one; or cpu, cuda, cuda:1, mps")
    workers: Count | None = None
    memory: Memory = "2GB"
    max_hours: Hours | None = Field(default=None, description="for the pairs of a layer")
    networks: Folder | None = Field(default=None, description="folder of trained networks; else in the run folder")

    _EXECUTION: ClassVar[set[str]] = {"device", "workers", "memory", "max_hours", "networks"}

    @model_validator(mode="after")
    def _applicable(self) -> PairsConfig:
        try:
            for matching, kernel in itertools.product(self.matchings, self.kernels):
                check_kernel(get_kernel(kernel), matching, get_matching(matching)[1].one_to_one)
        except ComparisonError as error:
            raise ValueError(str(error)) from None
        titles = {title for model in self.models for title in model.titles()}
        if self.database is not None and (twice := sorted(titles & {f"{title}{_DATABASE}" for title in titles})):
            raise ValueError(f"models: captures of the database are called so, choose another name: than {twice[0]!r}")
        return self

    def run(self, out: Path, progress: bool = False, executor: Executor | None = None) -> PairsResult:
        """Runs the study, or continues it: captures every model once, then matches all pairs, layer by layer.

        The folder then holds `captures/` and `pairs/` (unless `store` says where else), `pairs.csv`, `config.yaml`,
        `provenance.json` and `figures/`.

        Args:
            out: the run folder.
            progress: show what is needed, and bars.
            executor: where tiles are computed; None for threads of this process.

        Raises:
            RsmProbeError: whatever `capture`, `all_pairs` and the loading of models and images raise.
        """
        out = run_folder(out)
        # Whatever can be refused is refused before the folder is claimed and networks are trained.
        require_free(self, out, self._has_begun, self._EXECUTION)
        find_device(self.device, ModelError)
        require_usable(get_matching(name)[1] for name in self.matchings)
        store = absolute(self.store or out)
        images = self.images.load(progress)
        database = None if self.database is None else self.database.load(progress)
        networks = out / "models" if self.networks is None else Path(self.networks)
        known = check_models(self.models, self.layers, networks)
        how: dict[str, Any] = {
            "dtype": self.dtype, "batch_size": self.batch_size, "device": self.device, "progress": progress,
        }  # fmt: skip
        with claimed(self, out, self._has_begun, self._EXECUTION) as require_there:
            models, layers, accuracies = load_models(self.models, self.layers, networks, self.device, progress, known)
            table: list[dict[str, Any]] = []
            for title, model in models.items():
                require_there()
                place = f"{store}/captures/{file_name(title)}"
                rows = capture(model, images, layers[title], f"{place}.zarr", **how)
                columns = None
                if database is not None:
                    columns = capture(model, database, layers[title], f"{place}{_DATABASE}.zarr", **how)
                for number, layer in enumerate(rows):
                    require_there()
                    sides = rows[layer], None if columns is None else columns[layer]
                    table += self._layer(store, title, number, *sides, progress, executor)
            require_there()
            save_text(out / "pairs.csv", csv_text(table))
            if not (out / "provenance.json").exists():
                counted = {"images": len(images), "skipped": dict(images.skipped)}
                save_json(out / "provenance.json", {**provenance(), **counted, "accuracy": accuracies})
            # A run folder that holds its own pairs may be moved.
            save_table(out / "pairs.json", table, folder=self.store and store)
        return PairsResult(table, store)

    def _has_begun(self, out: Path) -> bool:
        """Whether something was computed; behind a URL, captures and pairs themselves know of which settings."""
        if self.store is not None and is_url(self.store):
            return (out / "pairs.json").exists()
        return any(Path(absolute(self.store or out)).glob("captures/*/layers"))

    def _layer(
        self,
        store: str,
        title: str,
        number: int,
        x: CapturedLayer,
        y: CapturedLayer | None,
        progress: bool,
        executor: Executor | None,
    ) -> Iterator[dict[str, Any]]:
        """The pairs of one layer under all matchings."""
        aligned: dict[str, RSM] = {}
        for matching in sorted(self.matchings, key=lambda name: name != "identity"):
            path = f"pairs/{file_name(title)}/{number:03d}-{matching}.zarr"
            pairs = all_pairs(
                x, y, f"{store}/{path}", matching, self.centering, memory=self.memory, workers=self.workers,
                executor=executor, tile=self.tile, permutations=self.permutations, device=self.device,
                max_hours=self.max_hours, progress=progress,
            )  # fmt: skip
            row: dict[str, Any] = {"model": title, "layer": x.name, "matching": matching}
            row |= {
                "images_a": len(x),
                "images_b": len(x if y is None else y),
                "locations": x.shape[1],
                "channels": x.shape[2],
            }
            row["largest_gap"] = _largest_gap(pairs)
            for kernel in self.kernels if y is None and "identity" in self.matchings and self._fits(len(x)) else ():
                found = RSM.from_pairs(pairs, kernel)
                aligned.setdefault(kernel, found)
                row[f"cka_{kernel}"] = cka(found, aligned[kernel])
            yield {**row, "path": path}

    def figures(self, out: Path) -> dict[str, Figure]:
        """The RSMs of a finished run by name, one figure for each model; of one set of images only.

        Raises:
            StorageError: the run is not finished.
        """
        result = self.open(out)
        if self.database is not None or not self._fits(result.table[0]["images_a"]):
            return {}
        drawn = {}
        for title in dict.fromkeys(row["model"] for row in result.table):
            layers = list(dict.fromkeys(row["layer"] for row in result.table if row["model"] == title))
            shown = layers if len(layers) <= _MOST_ROWS else _spread(layers)
            drawn[f"rsms-{title}"] = self._panels(result, title, shown)
        return drawn

    def _fits(self, images: int) -> bool:
        """Whether some whole RSMs may be held in memory at a time."""
        return (4 + 2 * len(self.kernels)) * 8 * images**2 <= parse_bytes(self.memory)

    @staticmethod
    def open(out: Path) -> PairsResult:
        """The result of a finished run.

        Raises:
            StorageError: the run is not finished, or its result is damaged.
        """
        table, about = load_table(out / "pairs.json")
        return PairsResult(table, about.get("folder") or str(out))

    @names_as_written()
    def _panels(self, result: PairsResult, title: str, layers: list[str]) -> Figure:
        figure = Figure(figsize=(4.4 * len(self.matchings) + 0.6, 3.9 * len(layers) + 0.6), layout="constrained")
        axes = figure.subplots(len(layers), len(self.matchings), squeeze=False)
        for layer, line in zip(layers, axes, strict=True):
            for matching, ax in zip(self.matchings, line, strict=True):
                rsm = result.rsm(title, layer, matching, self.kernels[0])
                labels = rsm.dataset["label_a"].values
                order = np.argsort(labels, kind="stable")
                figures.rsm_heatmap(ax, rsm.values[np.ix_(order, order)], list(labels[order]), f"{layer}, {matching}")
                ax.tick_params(labelleft=ax in axes[:, 0], labelbottom=ax in axes[-1])
        figure.suptitle(f"{title}: {self.kernels[0]} similarity")
        return figure


def _largest_gap(pairs: xr.Dataset) -> float:
    """How far a product can be from the optimum at most, relative to the norms; read row of tiles by row of tiles."""
    largest, step = 0.0, int(pairs.attrs["tile"])
    for start in range(0, pairs.sizes["image_a"], step):
        part = pairs.isel(image_a=slice(start, start + step))
        scale = np.sqrt(np.outer(part["norm_a"].values, part["norm_b"].values))
        gaps = part["bound"].values - part["product"].values
        largest = max(largest, float(np.divide(gaps, scale, out=np.zeros_like(scale), where=scale > 0).max()))
    return largest if np.isfinite(largest) else float("nan")


def _spread(layers: list[str]) -> list[str]:
    return [layers[k] for k in np.linspace(0, len(layers) - 1, _MOST_ROWS).astype(int)]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
