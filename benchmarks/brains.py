"""Whether the tests of `rsm_probe.brains` find what is true, and nothing where nothing is true; and their time.

    rsm-probe run brain --out RUN
    python benchmarks/brains.py truth RUN [--simulations 100] [--noise 2.0]
    python benchmarks/brains.py nothing RUN [--simulations 1000]
    python benchmarks/brains.py equal [--simulations 1000]
    python benchmarks/brains.py time

`truth` simulates 8 subjects who hold the distances of one RSM of the trained network plus noise, each layer and notion
of similarity in turn, and counts how often that RSM is named among all of the run, trained and untrained.

`nothing` simulates subjects from noise: each alone, or all around one random RDM that is not related to the images.
It counts how often any RSM is named, how often one is above chance before correction, and how often a difference of two
notions of similarity has p <= .05, beside the interval of a binomial count at that rate.

Each simulation of `equal` makes new images, subjects and two models. Subjects and models hold the same patterns plus
noise of their own, as much in one model as in the other, so neither is better on average. It counts how often their
difference has p <= .05 all the same.

`time` evaluates 3 models x 16 layers x 2 notions against 8 subjects and 200 images, in 1 000 draws of both.
"""

import argparse
import csv
import time
from pathlib import Path

import features
import numpy as np
from scipy.stats import binom

from rsm_probe import RSM, RSMs
from rsm_probe.brains import best, differences, evaluate, simulated_subjects, unrelated_subjects

OUT = Path(__file__).parent / "results"
LEVEL = 0.95


def rsms_of_run(run: Path) -> dict[tuple[str, str], RSM]:
    """The cosine RSMs of a run of `study: brain`, by model and "layer matching"."""
    found = {}
    for folder in sorted(run.glob("pairs/*/*.zarr")):
        rsm = RSM.open(folder).with_kernel("cosine")
        name = f"{rsm.attributes['layer']} {rsm.attributes['matching']}"
        found[folder.parent.name, name] = RSM.from_array(rsm.values, rsm.ids, kind="similarity")
    return found


def truth(options: argparse.Namespace) -> list[dict[str, object]]:
    rsms = rsms_of_run(options.run)
    candidates = [key for key in rsms if not key[0].endswith("untrained")]
    named = []
    for seed in range(options.simulations):
        true = candidates[seed % len(candidates)]
        subjects = simulated_subjects(rsms[true], options.subjects, options.noise, seed)
        evaluation = evaluate(rsms, subjects, options.measure, draw="subjects", repeats=options.repeats, seed=seed)
        named.append(best(evaluation) == "/".join(true))
    return [
        {
            "rsms": len(rsms), "measure": options.measure, "subjects": options.subjects, "noise": options.noise,
            "simulations": len(named), "true_rsm_named": sum(named),
        }
    ]  # fmt: skip


def nothing(options: argparse.Namespace) -> list[dict[str, object]]:
    rsms = rsms_of_run(options.run)
    ids = next(iter(rsms.values())).ids
    pairs = [(f"{m}/{name}", f"{m}/{name.split()[0]} identity") for m, name in rsms if name.endswith("optimal")]
    rows: list[dict[str, object]] = []
    for kind in ("each alone", "around one random RDM"):
        counts = {
            "any_rsm_named": 0,
            "above_chance_uncorrected": 0,
            "difference_uncorrected": 0,
            "any_difference_fdr": 0,
        }
        for seed in range(options.simulations):
            if kind == "each alone":
                subjects = unrelated_subjects(ids, options.subjects, seed)
            else:
                shared = unrelated_subjects(ids, 1, seed + 10**6)["subject 0"]
                subjects = simulated_subjects(shared, options.subjects, 1.0, seed)
            evaluation = evaluate(rsms, subjects, options.measure, repeats=options.repeats, seed=seed, level=LEVEL)
            compared = differences(evaluation, pairs)
            counts["any_rsm_named"] += best(evaluation) is not None
            # One RSM and one pair in turn, because those of one simulation are not independent.
            counts["above_chance_uncorrected"] += float(evaluation["p"][seed % len(rsms)]) <= 1 - LEVEL
            counts["difference_uncorrected"] += float(compared["p"][seed % len(pairs)]) <= 1 - LEVEL
            counts["any_difference_fdr"] += float(compared["p_corrected"].min()) <= 1 - LEVEL
        low, high = binom.interval(LEVEL, options.simulations, 1 - LEVEL)
        rows.append(
            {
                "subjects": kind, "measure": options.measure, "simulations": options.simulations, **counts,
                "nominal": f"{low:.0f} to {high:.0f}",
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def equal(options: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for images in (20, 60):
        wrong = 0
        for seed in range(options.simulations):
            rng = np.random.default_rng(seed)
            truth = rng.normal(size=(images, 10))

            def noisy(noise: float, rng: np.random.Generator = rng, truth: np.ndarray = truth) -> np.ndarray:
                patterns = truth + noise * rng.normal(size=truth.shape)
                return patterns @ patterns.T

            models = {name: RSM.from_array(noisy(1.0)).to_distances() for name in ("a", "b")}
            subjects = RSMs.from_rsms(
                {str(number): RSM.from_array(noisy(2.0)).to_distances() for number in range(options.subjects)}
            )
            evaluation = evaluate(models, subjects, options.measure, repeats=options.repeats, seed=seed, workers=1)
            wrong += float(differences(evaluation, correction=None)["p"][0]) <= 1 - LEVEL
        low, high = binom.interval(LEVEL, options.simulations, 1 - LEVEL)
        rows.append(
            {
                "images": images, "subjects": options.subjects, "measure": options.measure,
                "simulations": options.simulations, "difference_called": wrong, "nominal": f"{low:.0f} to {high:.0f}",
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def seconds(options: argparse.Namespace) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    images = 200
    shared = rng.normal(size=(images, 30))

    def rsm(noise: float) -> np.ndarray:
        patterns = shared + noise * rng.normal(size=shared.shape)
        return patterns @ patterns.T

    models = {
        (f"model {model}", f"layer {layer} {notion}"): RSM.from_array(rsm(1 + layer / 8))
        for model in range(3)
        for layer in range(16)
        for notion in ("identity", "optimal")
    }
    subjects = RSMs.from_array(np.stack([rsm(2.0) for _ in range(8)]))
    rows = []
    for measure in ("rsa-spearman", "rsa-pearson", "cka", "distance-correlation"):
        start = time.perf_counter()
        differences(evaluate(models, subjects, measure, repeats=1000))
        rows.append({"measure": measure, "rsms": len(models), "seconds": f"{time.perf_counter() - start:.1f}"})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "nothing", "equal", "time"])
    parser.add_argument("run", type=Path, nargs="?", help="a run of `rsm-probe run brain`")
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--noise", type=float, default=2.0, help="in standard deviations of the true distances")
    parser.add_argument("--measure", default="rsa-spearman")
    parser.add_argument("--repeats", type=int, default=199)
    parser.add_argument("--write", action="store_true", help="write the figures to the results")
    options = parser.parse_args()
    if options.what in ("truth", "nothing") and options.run is None:
        parser.error(f"{options.what} needs RUN, the folder of `rsm-probe run brain --out RUN`")
    rows = {"truth": truth, "nothing": nothing, "equal": equal, "time": seconds}[options.what](options)
    print("\n".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows))
    if options.write:
        with (OUT / f"brains_{options.what}.csv").open("w", newline="") as stream:
            stream.write(f"# {features.machine().replace('one core', '2 cores')}\n")
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
