"""Whether a version is slower than another: both checkouts side by side, in alternation, in one run.

    git worktree add ../before v0.1.0
    python benchmarks/versions.py ../before [--rounds 9] [--only matching sweep pairs cka probe] [--threads 1]

Each checkout runs in a process of its own that stays alive, so that nothing is compiled or imported in what is timed.
Every round times both, in turn, the first one changing. The ratio of a round is this checkout over the other.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORK = ["matching", "sweep", "pairs", "cka", "probe"]


def work(name: str, folder: str, threads: int) -> Callable[[], object]:
    """A call that a version is timed by; public names only, which both versions have."""
    import torch
    import torchvision

    import rsm_probe

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokens = (torch.randn(24, 16, 64) @ torch.randn(64, 64)).repeat(1, 16, 1) + 0.5 * torch.randn(24, 256, 64)
    network = torchvision.models.resnet18(weights=None).eval()
    pixels = torch.rand(64, 3, 64, 64)
    blocks = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    if name == "matching":
        affinities = torch.bmm(tokens[:12], tokens[12:].mT).numpy()
        return lambda: [rsm_probe.match_affinity(affinities), rsm_probe.rsm(tokens, workers=threads)]
    if name == "sweep":
        images = torch.utils.data.TensorDataset(pixels[:32], torch.zeros(32))
        return lambda: rsm_probe.sweep(network, images, ["layer2.0", "layer4.0"], batch_size=16, workers=threads)
    if name == "pairs":
        images = torch.utils.data.TensorDataset(torch.rand(96, 3, 64, 64), torch.zeros(96))
        layer = rsm_probe.capture(network, images, ["layer2.0"], f"{folder}/c.zarr")["layer2.0"]
        return lambda: rsm_probe.all_pairs(layer, workers=threads)
    if name == "cka":

        def identity() -> object:
            accumulator = rsm_probe.Accumulator(matchings=["identity"])
            with torch.no_grad(), accumulator, rsm_probe.Probe(network, blocks, reduce=accumulator.reducer()) as probe:
                for batch in pixels.split(16):
                    network(batch)
                    accumulator.update(probe)
            return accumulator.cka

        return identity

    def probed() -> object:
        with torch.no_grad(), rsm_probe.Probe(network, blocks) as probe:
            for batch in pixels.split(16):
                network(batch)
        return probe.representations

    return probed


def serve(folder: str, threads: int) -> None:
    """Time what standard input asks for, a line each."""
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in calls:
            calls[name] = work(name, folder, threads)
            calls[name]()
        start = time.perf_counter()
        calls[name]()
        print(time.perf_counter() - start, flush=True)


class Version:
    """A checkout in a process of its own."""

    def __init__(self, checkout: Path, folder: str, threads: int) -> None:
        self.checkout = checkout
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, str(checkout), "--serve", folder, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def seconds(self, name: str) -> float:
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{name} failed in {self.checkout}; its error is above")
        return float(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.threads)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        now, before = Version(ROOT, one, options.threads), Version(options.before.resolve(), other, options.threads)
        print("| | this version, s | before, s | median ratio | 95 % of bootstrap medians |\n|---|---|---|---|---|")
        for name in options.only:
            times = np.empty((options.rounds, 2))
            for k in range(-1, options.rounds):  # what is compiled or cached is so after the first
                pair = {}
                for version in ((now, before), (before, now))[k % 2]:
                    pair[version] = version.seconds(name)
                if k >= 0:
                    times[k] = pair[now], pair[before]
            ratios = times[:, 0] / times[:, 1]
            drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
            low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
            ours, theirs = np.median(times, axis=0)
            print(
                f"| {name} | {ours:.4f} | {theirs:.4f} | {statistics.median(ratios):.3f} | {low:.3f}-{high:.3f} |",
                flush=True,
            )
        for version in (now, before):
            version.process.stdin.close()
            version.process.wait()
    return None


if __name__ == "__main__":
    main()
