"""One pair of S = 65 536 locations: windows against an auction on the full affinity, or against a proven bound.

    python benchmarks/matching_largest.py [--optimum]

Features are those of the first stage of the network of `benchmarks/matching.py`, on 256-pixel crops of photographs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from features import features, milliseconds, trained_network

from rsm_probe.matching.bounds import dual_bound
from rsm_probe.matching.matching import Locations, Pairs
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.optimal import auction
from rsm_probe.matching.methods.rewindowed import Rewindowed

LAYER = "layer1.1"


def largest(path: Path, rounds: int) -> None:
    """In a process of its own: one pair at S = 65 536; prints seconds, value, and MB above what imports took."""
    torch.set_num_threads(1)
    auction(np.eye(64, dtype=np.float32)[None], np.zeros(1), 1e-3)  # load what is compiled: it is an import
    before = peak_megabytes()
    tokens = torch.from_numpy(np.load(path))
    images = Locations(tokens)
    method = Rewindowed(rounds=rounds)
    start = time.perf_counter()
    prepared = method.prepare(images)
    preparation = time.perf_counter() - start
    pairs = Pairs(np.array([0]), np.array([1]), images, images, prepared=(prepared, prepared))
    start = time.perf_counter()
    found = method.solve(pairs)
    seconds = time.perf_counter() - start
    print(seconds, float(found.values[0]), peak_megabytes() - before, preparation)


def peak_megabytes() -> float:
    """The most memory that this process has held; what `getrusage` says counts the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def compare_largest(module: torch.nn.Module, optimum: bool) -> list[dict[str, object]]:
    """S = 65 536: windows against the best that one blockwise auction finds, or against a proven bound."""
    tokens = features(module, 256, [LAYER], 2)[LAYER]
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    base = {"locations": tokens.shape[1], "channels": tokens.shape[2], "pairs": 1}
    images = Locations(tokens)
    for method in (BatchOptimal(), Identity()):
        prepared = method.prepare(images)
        pairs = Pairs(np.array([0]), np.array([1]), images, images, prepared=(prepared, prepared))
        found = method.solve(pairs)
        rows.append(
            {
                **base,
                "method": "batch-optimal b=512" if isinstance(method, BatchOptimal) else method.name,
                "ms": milliseconds(partial(method.solve, pairs), 2),
                "value": found.values[0],
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, tokens.numpy())
        for rounds in (3, 6, 12):
            command = [sys.executable, __file__, "--tokens", str(path), "--rounds", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, value, peak, prepared = map(float, done.stdout.split())
            print(f"rewindowed, {rounds} rounds: {seconds:.2f} s, {peak:.0f} MB, preparing {prepared:.2f} s")
            rows.append(
                {
                    **base,
                    "method": f"rewindowed(window=256, rounds={rounds})",
                    "ms": seconds * 1e3,
                    "value": value,
                    "mb": peak,
                }
            )
    reference, what = largest_optimum(tokens) if optimum else (None, "")
    if reference is None:
        method = Rewindowed(rounds=12)
        permutation = method.solve(replace(pairs, prepared=None)).permutations[0]
        rows_of = lambda rows: (tokens[0][torch.from_numpy(rows)].double() @ tokens[1].T.double()).numpy()  # noqa: E731
        reference, what = dual_bound(rows_of, tokens.shape[1], permutation), "a proven bound"
    print(f"S = {tokens.shape[1]}: shares against {what}")
    for row in rows:
        row["share_min"] = row["share_median"] = row.pop("value") / reference
    return rows


def largest_optimum(tokens: torch.Tensor) -> tuple[float, str]:
    """The auction on all 17 GB of the affinity, which is computed block by block."""
    size = tokens.shape[1]
    affinity = np.empty((1, size, size), np.float32)
    for start in range(0, size, 1024):
        affinity[0, start : start + 1024] = (tokens[0, start : start + 1024] @ tokens[1].T).numpy()
    scale = np.array([float(tokens[0].double().norm() * tokens[1].double().norm())])
    start_time = time.perf_counter()
    found = auction(affinity, scale, 1e-5)
    gap = (found.bounds - found.values)[0] / scale[0]
    print(f"full auction at S = {size}: {time.perf_counter() - start_time:.0f} s, certified gap {gap:.1e} of the norms")
    return float(found.values[0]), "an auction on the full affinity"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum", action="store_true", help="solve the pair exactly as well: 20 GB and some minutes")
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens:
        largest(options.tokens, options.rounds)
        return
    torch.set_num_threads(2)
    module = trained_network()
    for row in compare_largest(module, options.optimum):
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
