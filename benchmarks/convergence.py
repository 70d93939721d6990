"""How fast mini-batch CKA approaches that of all pairs: what a sample of images, in batches, costs in accuracy.

    python benchmarks/convergence.py [--images 2000] [--folder DIR]

All pairs of crops of photographs are matched once; batches are cut from the whole RSMs, so that nothing is matched
again. Each row is over 40 random choices of the images and of their batches.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from pairs import captured, report

import rsm_probe
from rsm_probe.comparison.alignment import get_estimator

LAYER = "layer4.1"  # 64 locations
REPEATS = 40


def batched(stack: np.ndarray, estimator: str, images: np.ndarray, size: int) -> float:
    """The ratio of HSICs summed over batches of two RSMs (2, N, N)."""
    rows_of, sums = get_estimator(estimator).rows, np.zeros((2, 2))
    for batch in np.array_split(images, max(1, len(images) // size)):
        rows = rows_of(stack[:, batch][:, :, batch])
        sums += rows @ rows.T
    return float(sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where captures and pairs are kept between runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        layer = rsm_probe.Capture.open(captured(folder, options.images, LAYER))[LAYER]
        rsms = [
            rsm_probe.rsm(
                layer, None, matching, "linear", "location-mean", out=folder / f"{matching}.zarr", progress=True
            )
            for matching in ("identity", "optimal")
        ]
    stack, everything = np.stack([rsm.values for rsm in rsms]), np.arange(options.images)
    rng, table = np.random.default_rng(0), []
    for estimator in ("unbiased", "biased"):
        whole = batched(stack, estimator, everything, options.images)
        for size in (10, 50, 250):
            for share in (0.25, 1.0):
                count = int(share * options.images)
                found = [batched(stack, estimator, rng.permutation(everything)[:count], size) for _ in range(REPEATS)]
                pairs = count * (size - 1) / (options.images * (options.images - 1))
                table.append(
                    {
                        "estimator": estimator,
                        "batch": size,
                        "images": count,
                        "share_of_pairs": f"{pairs:.4f}",
                        "all_pairs": f"{whole:.4f}",
                        "mean": f"{np.mean(found):.4f}",
                        "deviation": f"{np.std(found, ddof=1):.4f}",
                    }
                )
    report("convergence.csv", table)


if __name__ == "__main__":
    main()
