"""A sweep as large as pages are judged by, from random numbers: `python tests/large_page.py OUT.html` writes its page.

3 models of 16 layers, and 500 images in two mini-batches of 250, all of which have a thumbnail.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.report.thumbnails import thumbnail
from rsm_probe.report.write import write_page
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.sweep_report.choosing import sorted_by_label
from rsm_probe.studies.sweep_report.page import sweep_page
from rsm_probe.studies.sweep_report.shown import Interval, Neighbours, RankChange, Shown, settings_hash

LABELS = ["ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "<script>alert(1)</script>"]


def random_sweep(models=3, layers=16, images=500, shown_images=64, seed=0) -> tuple[SweepResult, Shown]:
    """A result and what its run stored, with random numbers; rows of a grid decay with the distance of layers."""
    draw, batch = np.random.default_rng(seed), images // 2
    keys = [
        RsmKey(f"model-{m}", f"blocks.{d}", d, matching, "linear")
        for m in range(models) for d in range(layers) for matching in ("identity", "optimal")
    ]  # fmt: skip
    depth, matched = np.array([key.depth for key in keys]), np.array([key.matching == "optimal" for key in keys])
    cka = np.exp(-np.abs(depth[:, None] - depth) / 8) - 0.2 * (matched[:, None] != matched)
    noise = draw.normal(0, 0.02, cka.shape)
    cka = np.clip(cka + noise + noise.T, 0, 1)
    np.fill_diagonal(cka, 1)
    facts = {"images": images, "batches": 2, "left_out": 0, "centering": "location-mean", "source": "random"}
    intervals_of = {"unbiased": (cka - 1e-6, cka + 1e-6)}
    result = SweepResult.build(
        {"unbiased": label_grid(cka, keys, keys)}, [], np.zeros(len(keys)), intervals_of, **facts
    )
    labels = [LABELS[k % len(LABELS)] for k in range(batch)]
    rsms = draw.normal(0, 1, (len(keys), shown_images, shown_images)).cumsum(axis=2)
    rsms = (rsms + rsms.transpose(0, 2, 1)).astype(np.float32)
    ids = [f"images/{k:05d} & more.png" for k in range(batch)]
    changes, near, intervals = [], [], []
    for key in keys[::2]:
        for number in range(8):
            a, b = sorted(int(k) for k in draw.choice(batch, 2, replace=False))
            lines = [tuple(draw.random(5).round(4).tolist()) for _ in range(24)]
            ranks = sorted(draw.random(2).tolist(), reverse=number < 4)
            changes.append(RankChange(key.model, key.layer, (a, b), *ranks, lines, 196))
        for query in range(3):
            near.append(Neighbours(key.model, key.layer, query, *draw.integers(0, batch, (2, 5)).tolist()))
        one, other = keys.index(key), keys.index(key._replace(matching="optimal"))
        value = float(cka[one, other])
        intervals.append(Interval(key.model, key.layer, "optimal", "linear", value, value - 0.02, value + 0.02))
    thumbnails = {k: thumbnail(_photo(draw), ids[k], labels[k]) for k in range(batch)}
    order = sorted_by_label(labels, shown_images)
    ranks = draw.random(rsms.shape)
    ranks = np.where(np.eye(shown_images, dtype=bool), np.nan, (ranks + ranks.transpose(0, 2, 1)) / 2)
    ranges = np.stack([rsms.min(axis=(1, 2)), rsms.max(axis=(1, 2))], axis=1).astype(float)
    notes = [f"RSMs show {shown_images} of {batch} images, evenly spread over labels."]
    cells = np.stack([cka - 0.02, cka + 0.02], axis=-1).astype(np.float32)
    differences = np.full_like(cells, np.nan)
    aligned = cka[np.ix_(~matched, ~matched)]
    differences[np.ix_(matched, matched)] = cells[np.ix_(matched, matched)] - aligned[..., None]
    shown = Shown(
        settings_hash(result), ids, labels, "optimal", "linear", order, keys, rsms, ranges, thumbnails, changes, near,
        intervals, 200, notes, 100.0, ranks, cells, differences,
    )  # fmt: skip
    return result, shown


def _photo(draw: np.random.Generator) -> Image.Image:
    """Smooth colours with some texture, whose thumbnail takes as many bytes as that of a photo."""
    coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8)).resize((144, 144), Image.Resampling.BICUBIC)
    return Image.fromarray((0.85 * np.asarray(coarse) + draw.normal(0, 14, (144, 144, 3)).clip(0, 38)).astype(np.uint8))


def write_large_page(file: Path) -> Path:
    """Write the page of that sweep."""
    result, shown = random_sweep()
    return write_page(sweep_page(result, shown, "A large sweep", "python tests/large_page.py"), file)


if __name__ == "__main__":
    write_large_page(Path(sys.argv[1]))
