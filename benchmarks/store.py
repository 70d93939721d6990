"""What keeping the RSMs costs a sweep: time, memory and disk, and what float32 would cost in accuracy.

    python benchmarks/store.py time [--images 500] [--batch 100] [--size 112] [--rounds 3]
    python benchmarks/store.py memory [--counts 250 500 1000]
    python benchmarks/store.py precision [--images 200]

`time` alternates between a sweep with `out=` and the same sweep without: a random ResNet-18, crops of photographs, the
outputs of all blocks, matched by `identity` and `optimal`. `memory` runs both over more and more images, each in a
process of its own, and reports their peaks above what the process holds before. `precision` compares CKA from the
stored products with CKA from the same products rounded to float32, which would take half the disk.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import features
import numpy as np
import torch

import rsm_probe
from rsm_probe.sources import photos
from rsm_probe.streaming import SweepResult

OUT = Path(__file__).parent / "results"


def sweep(options: argparse.Namespace, count: int, out: str | None) -> tuple[float, SweepResult]:
    """Seconds, and the result."""
    images = photos(count=count, size=options.size)
    model = rsm_probe.load_model("timm:resnet18", None, seed=0, preprocess="imagenet", size=options.size)
    start = time.perf_counter()
    result = rsm_probe.sweep(
        {"net": model}, images, options.layers or "blocks", batch_size=options.batch, kernels=options.kernels, out=out
    )
    return time.perf_counter() - start, result


def disk(folder: str) -> float:
    """Megabytes of the store."""
    return sum(file.stat().st_size for file in Path(folder, "rsms.zarr").rglob("*") if file.is_file()) / 1e6


def measure_time(options: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        sweep(options, options.batch, f"{folder}/first")  # first calls are slower
    without, stored, size = [], [], 0.0
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, expected = sweep(options, options.images, None)
            without.append(seconds)
            seconds, result = sweep(options, options.images, f"{folder}/run")
            stored.append(seconds)
            size = disk(f"{folder}/run")
        np.testing.assert_array_equal(result.cka.values, expected.cka.values)
        print(f"without {without[-1]:.1f} s, with the store {stored[-1]:.1f} s", flush=True)
    ratios = [b / a for a, b in zip(without, stored, strict=True)]
    return [
        {
            "images": options.images, "batch": options.batch, "size": options.size, "rsms": result.cka.sizes["rsm_a"],
            "without_s": f"{statistics.median(without):.2f}", "with_s": f"{statistics.median(stored):.2f}",
            "ratio": f"{statistics.median(ratios):.3f}", "store_mb": f"{size:.1f}",
        }
    ]  # fmt: skip


def measure_memory(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for count in options.counts:
        peaks = []
        for stored in ("no", "yes"):
            command = [sys.executable, __file__, "peak", "--images", str(count), "--stored", stored]
            command += ["--batch", str(options.batch), "--size", str(options.size), "--layers", *(options.layers or [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(float(done.stdout.splitlines()[-1]))
        rows.append({"images": count, "peak_mb_without": f"{peaks[0]:.0f}", "peak_mb_with": f"{peaks[1]:.0f}"})
        print(rows[-1], flush=True)
    return rows


def peak(options: argparse.Namespace) -> None:
    def resident(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1e3

    with tempfile.TemporaryDirectory() as folder:
        sweep(options, 8, f"{folder}/first")  # imports and compiles
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        sweep(options, options.images, f"{folder}/run" if options.stored == "yes" else None)
        print(resident("VmHWM") - before)


def measure_precision(options: argparse.Namespace) -> list[dict[str, object]]:
    """Largest difference of CKA, by kernel and estimator, if products and norms were stored in float32."""
    with tempfile.TemporaryDirectory() as folder:
        sweep(options, options.images, folder)
        store = rsm_probe.RsmStore.open(folder)
        rows = []
        for kernel in options.kernels:
            one = store.select(kernels=(kernel,))
            grids = []
            for rounded in (False, True):
                sums = {False: np.zeros((len(one.keys),) * 2), True: np.zeros((len(one.keys),) * 2)}
                for batch in range(len(one.sizes)):
                    rsms = one.rsms(batch)
                    if rounded:
                        rsms = rsms.astype(np.float32).astype(np.float64)
                    for unbiased in sums:
                        sums[unbiased] += hsics(rsms, unbiased)
                grids.append({unbiased: cka(total) for unbiased, total in sums.items()})
            for unbiased, name in ((True, "unbiased"), (False, "biased")):
                error = np.nanmax(np.abs(grids[0][unbiased] - grids[1][unbiased]))
                rows.append({"kernel": kernel, "estimator": name, "error_of_float32": f"{error:.1e}"})
                print(rows[-1], flush=True)
    return rows


def hsics(rsms: np.ndarray, unbiased: bool) -> np.ndarray:
    """HSICs of all pairs of RSMs (R, n, n), times the number of pairs of images."""
    count = rsms.shape[-1]
    if not unbiased:
        centred = rsms - rsms.mean(1, keepdims=True)
        centred = centred - centred.mean(2, keepdims=True)
        flat = centred.reshape(len(rsms), -1)
        return flat @ flat.T
    hollow = rsms * (1 - np.eye(count))
    flat, rows, totals = hollow.reshape(len(rsms), -1), hollow.sum(2), hollow.sum((1, 2))
    return flat @ flat.T + np.outer(totals, totals) / ((count - 1) * (count - 2)) - rows @ rows.T * 2 / (count - 2)


def cka(total: np.ndarray) -> np.ndarray:
    own = np.sqrt(np.diagonal(total))
    return total / np.outer(own, own)


def report(name: str, rows: list[dict[str, object]], write: bool) -> None:
    print("\n".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows))
    if write:
        with (OUT / name).open("w", newline="") as stream:
            stream.write(f"# {features.machine().replace('one core', f'{torch.get_num_threads()} threads')}\n")
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "precision", "peak"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--layers", nargs="*", help="instead of all blocks")
    parser.add_argument("--kernels", nargs="+", default=["linear"])
    parser.add_argument("--stored", choices=["yes", "no"], help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the figures to the results")
    options = parser.parse_args()
    if options.what == "peak":
        peak(options)
        return
    measure = {"time": measure_time, "memory": measure_memory, "precision": measure_precision}[options.what]
    report(f"store-{options.what}.csv", measure(options), options.write)


if __name__ == "__main__":
    main()
