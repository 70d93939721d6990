"""What matching costs and what it reaches: every method and library on the same features, one core, one run.

    python benchmarks/matching.py [--pairs 20] [--optimum] [--out benchmarks/results/matching.csv]

Features are those of a full-width ResNet-18 (configs/train_photos.yaml, trained at the first run, about eight minutes
on two cores) on 64-pixel crops of photographs: S = 256, 1024 and 4096 locations of C = 256, 128 and 64 channels. On
256-pixel crops its first stage has S = 65 536, where only methods without the full affinity run. Times are medians over
pairs on features centred per location; shares of the optimum are ratios of sums on features that are not centred.
"""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from features import ROOT, features, machine, milliseconds, trained_network
from matching_largest import compare_largest

from rsm_probe.matching.matching import Locations, Matching, Pairs, solve_both_ways
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.greedy import Greedy, TopKGreedy
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.library_solvers import LapAssignment, ScipyAssignment
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.registry import matching_label

LAYERS = {256: "layer3.1", 1024: "layer2.1", 4096: "layer1.1"}
LARGEST = 65_536
# OR-Tools takes integer costs: a millionth of the affinity's range is about as fine as the auction's gap.
LEVELS = 1_000_000


def library_calls() -> dict[str, Callable[[np.ndarray], Callable[[], object]]]:
    """What is timed of a library: a function that takes an affinity, prepares the input and returns the timed call."""

    def ortools(affinity: np.ndarray) -> Callable[[], object]:
        from ortools.graph.python import linear_sum_assignment

        size = len(affinity)
        cost = np.rint((affinity.max() - affinity) / np.ptp(affinity) * LEVELS).astype(np.int64).ravel()
        left, right = np.repeat(np.arange(size, dtype=np.int32), size), np.tile(np.arange(size, dtype=np.int32), size)

        def call() -> object:
            solver = linear_sum_assignment.SimpleLinearSumAssignment()
            solver.add_arcs_with_cost(left, right, cost)
            return solver.solve()

        return call

    def lapjv(affinity: np.ndarray) -> Callable[[], object]:
        from lapjv import lapjv as solve

        cost = affinity.max() - affinity
        return lambda: solve(cost)

    return {
        "OR-Tools": ortools,
        "scipy": lambda affinity: lambda: ScipyAssignment().permutation(affinity),
        "lap": lambda affinity: lambda: LapAssignment().permutation(affinity),
        "lapjv": lapjv,
    }


OWN: list[Matching] = [
    Auction(), Auction(gap=1e-2), Rewindowed(), Rewindowed(256, 3), BatchOptimal(window=128), BatchOptimal(),
    TopKGreedy(), Greedy(), Translation(), Identity(),
]  # fmt: skip


class Case:
    """The pairs of one number of locations, centred for times and as they are for shares."""

    def __init__(self, tokens: torch.Tensor, count: int) -> None:
        centred = tokens - tokens.mean(dim=0)
        self.images = {"centred": Locations(centred), "plain": Locations(tokens)}
        everyone = list(itertools.combinations(range(len(tokens)), 2))
        self.numbers = everyone[:: max(1, len(everyone) // count)][:count]
        self.size = tokens.shape[1]

    def pair(self, kind: str, i: int, j: int, affinity: bool = True) -> Pairs:
        images = self.images[kind]
        product = images.tokens[i] @ images.tokens[j].T if affinity else None
        return Pairs(np.array([i]), np.array([j]), images, images, None if product is None else product.numpy()[None])


def compare(case: Case, slow_pairs: int) -> list[dict[str, object]]:
    """One row a method: median time, share of the optimum, certified gap."""
    repeats = 5 if case.size <= 1024 else 2
    centred = case.images["centred"]
    product = [
        milliseconds(partial(torch.matmul, centred.tokens[i], centred.tokens[j].T), repeats) for i, j in case.numbers
    ]
    base = {"locations": case.size, "channels": centred.tokens.shape[2]}
    rows: list[dict[str, object]] = [{**base, "method": "affinity product", "ms": statistics.median(product)}]
    optima = {(i, j): float(Auction().solve(case.pair("plain", i, j)).values[0]) for i, j in case.numbers}
    for method in OWN:
        prepared = {kind: (method.prepare(images),) * 2 for kind, images in case.images.items()}
        times, shares, gaps, solvers = [], [], [], []
        for i, j in case.numbers:
            pairs = replace(case.pair("centred", i, j, method.needs_affinity), prepared=prepared["centred"])
            found = solve_both_ways(method, pairs)
            times.append(milliseconds(partial(solve_both_ways, method, pairs), repeats))
            if method == Auction():
                gaps.append(float((found.bounds - found.values)[0] / pairs.scales()[0]))
                solvers += found.solvers
            plain = replace(case.pair("plain", i, j, method.needs_affinity), prepared=prepared["plain"])
            shares.append(float(solve_both_ways(method, plain).values[0]) / optima[i, j])
        rows.append(
            {
                **base,
                "method": matching_label(method),
                "ms": statistics.median(times),
                "share_min": min(shares),
                "share_median": statistics.median(shares),
                "gap_median": statistics.median(gaps) if gaps else None,
                "gap_max": max(gaps, default=None),
                "fallbacks": sum(solver != "auction" for solver in solvers) if solvers else None,
                "pairs": len(case.numbers),
            }
        )
    for name, prepare in library_calls().items():
        chosen = case.numbers[:slow_pairs]
        times = [milliseconds(prepare(case.pair("centred", i, j).affinities()[0]), 1) for i, j in chosen]
        rows.append({**base, "method": name, "ms": statistics.median(times), "pairs": len(chosen)})
    return rows


def thread_gain(case: Case) -> float:
    """How many times more pairs two threads match in the same time than one; in a sweep affinities are just made."""
    pairs = [case.pair("centred", i, j) for i, j in case.numbers[:2]]
    repeats = max(1, 20_000_000 // case.size**2)

    def work() -> None:
        for _ in range(repeats):
            for one in pairs:
                Auction().solve(one)

    ratios = []
    for _ in range(5):
        alone = milliseconds(work, 1)
        with ThreadPoolExecutor(2) as pool:
            together = milliseconds(lambda: list(pool.map(lambda _: work(), range(2))), 1)
        ratios.append(2 * alone / together)
    return statistics.median(ratios)


def first_calls() -> list[float]:
    """Seconds of the first match in a new process: with nothing compiled, and once it is cached on disk."""
    code = (
        "import time, numpy as np, rsm_probe; a = np.random.default_rng(0).normal(size=(64, 64)).astype('float32');"
        "start = time.perf_counter(); rsm_probe.match_affinity(a); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        return [
            float(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
            for _ in range(2)
        ]


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    shown = [
        "lap",
        "scipy",
        "lapjv",
        "OR-Tools",
        "greedy",
        "optimal",
        "optimal(gap=0.01)",
        "rewindowed",
        "batch-optimal",
        "affinity product",
    ]
    for name in shown:
        points = sorted((row["locations"], row["ms"]) for row in rows if row["method"] == name)
        style = (
            {"linewidth": 2.4}
            if name == "optimal"
            else {"linestyle": "--", "color": "black"}
            if name == "affinity product"
            else {}
        )
        ax.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    ax.set_xticks([256, 1024, 4096, LARGEST], ["256", "1 024", "4 096", "65 536"])
    ax.minorticks_off()
    ax.set_xlabel("locations S")
    ax.set_ylabel("milliseconds a pair, one core")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs at S = 256 and 1024; a quarter of them at 4096")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "matching.csv")
    parser.add_argument("--optimum", action="store_true", help="solve S = 65 536 exactly: 20 GB and some minutes")
    options = parser.parse_args()
    torch.set_num_threads(2)
    module = trained_network()
    tokens = features(module, 64, list(LAYERS.values()), 12)
    torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    for size, layer in LAYERS.items():
        case = Case(tokens[layer], options.pairs if size <= 1024 else max(2, options.pairs // 4))
        assert case.size == size
        rows += compare(case, {256: options.pairs, 1024: 5, 4096: 1}[size])
        for row in rows:
            if row["locations"] == size:
                print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        by_name = {row["method"]: row["ms"] for row in rows if row["locations"] == size}
        print(
            f"S = {size}: optimal {by_name['OR-Tools'] / by_name['optimal']:.1f} times as fast as OR-Tools, "
            f"{by_name['optimal'] / by_name['affinity product']:.2f} times the affinity product"
        )
        if size <= 1024:
            print(f"S = {size}: two threads {thread_gain(case):.2f} times one")
    rows += compare_largest(module, options.optimum)
    for row in rows:
        if row["locations"] == LARGEST:
            print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    print("first match in a new process, compiled and then cached: {:.1f} s, {:.1f} s".format(*first_calls()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with options.out.open("w", newline="") as file:
        file.write(f"# {machine()}\n")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
