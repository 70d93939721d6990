"""Certificates against exact optima: bounds, values and gaps of `optimal` on thousands of small, hostile affinities.

    python benchmarks/certificates.py                      # 60 000 affinities on the CPU's path, 5 000 on the device's
    python benchmarks/certificates.py --count 500 --seed 7

Affinities have 2 to 7 locations on each side, scales from 1e-25 to 1e25, rows of mixed scale, zeros, ties, and gaps and
budgets of bids with which an auction stops short of the optimum. The optimum is exact: entries are integers times a
power of two, and the best sum over all permutations is found in integers. Every comparison with it is exact, too; only
values, which are sums in float64, may differ from their own sum by what rounding allows.

Without a GPU the device's kernel runs in Triton's interpreter, at some five affinities a second.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rsm_probe import match_affinity
from rsm_probe.matching import Match
from rsm_probe.matching.methods.optimal import Auction

FEWEST, MOST = 2, 7
# Affinities of one shape and one method that are solved together.
TOGETHER = 8
KINDS = {
    "normal": lambda rng, s, t: rng.normal(size=(s, t)),
    "features": lambda rng, s, t: rng.normal(size=(s, 3)) @ rng.normal(size=(3, t)),
    "negative": lambda rng, s, t: -np.abs(rng.normal(size=(s, t))),
    "integers": lambda rng, s, t: rng.integers(-3, 4, (s, t)).astype(float),
    "binary": lambda rng, s, t: (rng.random((s, t)) < 0.4).astype(float),
    "zeros": lambda rng, s, t: np.zeros((s, t)),
    "constant": lambda rng, s, t: np.full((s, t), rng.normal()),
    "duplicates": lambda rng, s, t: rng.normal(size=(2, 2))[rng.integers(0, 2, s)][:, rng.integers(0, 2, t)],
    "dead locations": lambda rng, s, t: rng.random((s, t)) * np.outer(rng.random(s) < 0.5, rng.random(t) < 0.5),
    "rank one": lambda rng, s, t: np.outer(rng.lognormal(0, 2, s), rng.lognormal(0, 2, t)),
    "offset": lambda rng, s, t: 1 + 10 ** rng.uniform(-7, -1) * rng.normal(size=(s, t)),
    "one large": lambda rng, s, t: rng.normal(size=(s, t)) + 1e7 * (np.arange(s * t).reshape(s, t) == s * t // 2),
    "mixed rows": lambda rng, s, t: rng.normal(size=(s, t)) * 10 ** rng.uniform(-12, 12, (s, 1)),
    "mixed columns": lambda rng, s, t: rng.normal(size=(s, t)) * 10 ** rng.uniform(-12, 12, (1, t)),
}
# What an auction may be asked for: the usual gap, a loose one, and bids that run out.
OPTIONS = [{}, {"gap": 1e-3}, {"gap": 0.1}, {"bids_per_row": 1}, {"gap": 1e-3, "bids_per_row": 4}]
CHECKS = [
    "bound below the optimum", "value above the optimum", "value is not its own sum", "not a matching",
    "gap not met", "bound below the value",
]  # fmt: skip


@dataclass
class Tally:
    """What was counted on one path.

    Attributes:
        checked: affinities.
        short: of these, matchings that are not the optimum, which only their bound tells.
        beyond: affinities whose largest entry the device's kernel does not take.
        solvers: how often each ran.
        violations: how often each check failed, with the first example of each.
    """

    checked: int = 0
    short: int = 0
    beyond: int = 0
    solvers: Counter[str] = None  # type: ignore[assignment]
    violations: Counter[str] = None  # type: ignore[assignment]
    examples: dict[str, str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.solvers, self.violations, self.examples = Counter(), Counter(), {}


def batches(count: int, seed: int, dtypes: tuple[type, ...], most: int = MOST) -> Iterator[tuple[np.ndarray, Auction]]:
    """Affinities (B, S, T) of one shape and precision, and what solves them; `count` in all, of `most` locations."""
    rng = np.random.default_rng(seed)
    kinds = list(KINDS.values())
    made = 0
    while made < count:
        s, t = rng.integers(FEWEST, most + 1, 2)
        if rng.random() < 0.5:
            t = s
        several = min(TOGETHER, count - made)
        dtype = dtypes[rng.integers(len(dtypes))]
        parts = [kinds[rng.integers(len(kinds))](rng, s, t) * 10 ** rng.uniform(-25, 25) for _ in range(several)]
        yield np.stack(parts).astype(dtype), Auction(**OPTIONS[rng.integers(len(OPTIONS))])
        made += several


def exact_optimum(affinity: np.ndarray) -> Fraction:
    """The largest sum over all permutations, without rounding; zeros fill up the smaller side."""
    size = max(affinity.shape)
    entries = [[Fraction(float(value)) for value in row] for row in affinity]
    unit = max((entry.denominator for row in entries for entry in row), default=1)  # all are powers of two
    square = [[0] * size for _ in range(size)]
    for i, row in enumerate(entries):
        for j, entry in enumerate(row):
            square[i][j] = int(entry * unit)
    # The best sum of the first rows with a set of columns, for all sets: the same as trying all permutations.
    best: list[int | None] = [None] * (1 << size)
    best[0] = 0
    for columns in range(1 << size):
        row = columns.bit_count()
        if row < size:
            for column in range(size):
                after = columns | 1 << column
                if after != columns:
                    found = best[columns] + square[row][column]  # type: ignore[operator]
                    if best[after] is None or found > best[after]:  # type: ignore[operator]
                        best[after] = found
    return Fraction(best[-1], unit)  # type: ignore[arg-type]


def check(found: Match, affinity: np.ndarray, gap: float, tally: Tally) -> None:
    """Adds one answer to what was counted."""
    rows = np.flatnonzero(found.permutation >= 0)
    columns = found.permutation[rows]
    matched = affinity[rows, columns].astype(np.float64)
    own = sum(map(Fraction, matched.tolist()), Fraction(0))
    rounding = Fraction(len(rows) * 2.0**-53) * sum(map(Fraction, np.abs(matched).tolist()), Fraction(0))
    optimum, value, bound = exact_optimum(affinity), Fraction(found.value), Fraction(found.bound)
    unit = float(np.abs(affinity).max()) or 1.0
    scale = max(np.linalg.norm(affinity.astype(np.float64) / unit) * unit, abs(found.value))
    failed = {
        "bound below the optimum": bound < optimum,
        "value above the optimum": value > optimum + rounding,
        "value is not its own sum": abs(value - own) > rounding,
        "not a matching": not len(set(columns.tolist())) == len(rows) == min(affinity.shape),
        "gap not met": found.solver != "scipy" and found.gap > gap * scale * (1 + 1e-9),
        "bound below the value": bound < value,
    }
    tally.checked += 1
    tally.short += own < optimum
    tally.beyond += not 1e-15 < unit < 1e15 and bool(affinity.any())
    tally.solvers[found.solver] += 1
    for name in CHECKS:
        if failed[name]:
            tally.violations[name] += 1
            tally.examples.setdefault(name, f"{affinity.tolist()}: {found}, optimum {float(optimum)!r}")


def counted(where: str, count: int, seed: int, most: int = MOST) -> Tally:
    """Solves so many affinities on the "cpu" or the "device" and checks every answer."""
    here = torch.device("cuda" if where == "device" and torch.cuda.is_available() else "cpu")
    tally = Tally()
    dtypes = (np.float32,) if where == "device" else (np.float32, np.float64)
    for batch, method in batches(count, seed, dtypes, most):
        method = Auction(method.gap, method.bids_per_row, where=where)  # type: ignore[arg-type]
        for found, affinity in zip(match_affinity(torch.from_numpy(batch).to(here), method), batch, strict=True):
            check(found, affinity, method.gap, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60_000, help="affinities on the CPU's path")
    parser.add_argument("--device-count", type=int, default=5_000, help="affinities on the device's path")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for where, count in (("cpu", options.count), ("device", options.device_count)):
        start = time.perf_counter()
        tally = counted(where, count, options.seed)
        kernel = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
        print(f"path {where}{'' if where == 'cpu' else f' ({kernel})'}: {tally.checked} affinities, "
              f"{time.perf_counter() - start:.0f} s")  # fmt: skip
        print(f"  not the optimum: {tally.short}; beyond the kernel's range: {tally.beyond}")
        print(f"  solvers: {', '.join(f'{name} {times}' for name, times in sorted(tally.solvers.items()))}")
        for name in CHECKS:
            print(f"  {name}: {tally.violations[name]}")
        for name, example in tally.examples.items():
            print(f"  first: {name}: {example}")


if __name__ == "__main__":
    main()
