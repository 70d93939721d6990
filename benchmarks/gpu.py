"""What one GPU does: matchings a second, a row of Table 2, a sweep; beside its ceilings and the machine's CPU threads.

    python benchmarks/gpu.py [--out benchmarks/results] [--only ceilings matchings peer half row sweep profile]
    python benchmarks/gpu.py --only half                   # what rounding changes can be measured on a CPU as well
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke    # without a GPU: whether it runs, on tiny problems

Features are those of a full-width ResNet-18 on 64-pixel crops of photographs, centred per location. The first run
trains it (configs/train_photos.yaml), which takes seconds on a GPU. For C = 768, a rotation embeds the features in 768
channels, which leaves inner products unchanged. The peer is torch-linear-assignment
(`pip install torch-linear-assignment`).
Times are medians of wall clocks around work that ends with its results in main memory, after a first run that compiles.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from features import ROOT, features, machine, trained_network

import rsm_probe
from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.execution.devices import find_device
from rsm_probe.execution.executors import available_cores
from rsm_probe.matching.compiled.gpu_batches import solve_on_device
from rsm_probe.matching.matching import Pairs
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.pairs.affinities import Affinities
from rsm_probe.pairs.sides import Side
from rsm_probe.sources import normalise, photos
from rsm_probe.streaming.cost import stopwatch

LAYERS = {64: "layer4.1", 256: "layer3.1", 1024: "layer2.1", 4096: "layer1.1"}
# Pairs that the peer is given, which takes seconds for many large ones.
OF_THE_PEER = {64: 4096, 256: 2048, 1024: 256}
ROW = {"queries": 2000, "database": 5000, "channels": 768}


class Bench:
    """One run on one device; `lines` become the report."""

    def __init__(self, smoke: bool) -> None:
        self.smoke, self.device = smoke, find_device("cpu" if smoke else "auto")
        self.lines: list[str] = []
        self.crops = 6 if smoke else 128 if self.device.type == "cuda" else 48
        self._module = None

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """The median, after a first call."""
        times = []
        for _ in range(1 if self.smoke else repeats + 1):
            start = stopwatch(self.device)
            work()
            times.append(stopwatch(self.device) - start)
        return statistics.median(times[1:] or times)

    def tokens(self, locations: int, count: int) -> torch.Tensor:
        if self.smoke:
            return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0))
        if self._module is None:
            self._module = trained_network(self.device)
        z = features(self._module, 64, [LAYERS[locations]], count)[LAYERS[locations]]
        return (z - z.mean(dim=0)).to(self.device)

    def pairs(self, z: torch.Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
        """As many different pairs as there are, again and again."""
        rows, columns = np.tril_indices(len(z), -1)
        order = np.random.default_rng(0).permutation(len(rows))
        return np.resize(rows[order], most), np.resize(columns[order], most)

    def ceilings(self) -> None:
        """What the device can do at best: bytes of a copy, operations of a product."""
        size = 256 if self.smoke else 8192
        source = torch.randn(16 * size**2 if not self.smoke else size, device=self.device)
        target = torch.empty_like(source)
        self.copied = 2 * source.nbytes / self.seconds(lambda: target.copy_(source))
        a, b = torch.randn(2, size, size, device=self.device)
        single = 2 * size**3 / self.seconds(lambda: a @ b)
        self.say("## Ceilings\n")
        self.say(f"- device-to-device copy: {self.copied / 1e12:.2f} TB/s, read and written")
        self.say(f"- product of {size} x {size} float32: {single / 1e12:.1f} TFLOP/s")
        if not self.smoke:
            a, b = a.half(), b.half()
            half = 2 * size**3 / self.seconds(lambda: torch.mm(a, b, out_dtype=torch.float32))
            self.say(f"- of float16, summed in float32: {half / 1e12:.1f} TFLOP/s")
        self.say()

    def matchings(self) -> None:
        """Matchings a second, by the kernel and by CPU threads, over the size of the batch."""
        self.say("## Matchings\n")
        self.say(
            "| S | pairs at once | kernel, matchings/s | CPU threads, matchings/s | bids a row | read, TB/s | "
            "certified | largest gap | largest difference from the CPU, of the norms |"
        )
        self.say("|" + "---|" * 9)
        for locations in LAYERS:
            z = Side.of(self.tokens(locations, self.crops))
            most = 12 if self.smoke else min(1 << 16, (4 << 30) // (4 * locations**2))
            for count in sorted({most} if self.smoke else {min(count, most) for count in (64, 512, 2048, most)}):
                self._matchings(locations, z, count)
        self.say()

    def _affinities(self, z: Side, count: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        rows, columns = self.pairs(z.tokens, count)
        source = Affinities(z, z, on_device=True)
        affinity = torch.empty(count, *[z.locations.count] * 2, device=self.device)
        for start in range(0, count, source.gathered_per_block):
            part = slice(start, start + source.gathered_per_block)
            affinity[part] = source.block(rows[part], columns[part], one_by_one=True).affinity()
        return rows, columns, affinity

    def _matchings(self, locations: int, z: Side, count: int) -> None:
        rows, columns, affinity = self._affinities(z, count)
        images, gap = z.locations, Auction().gap
        prepared = (Auction().prepare(images),) * 2
        pairs = Pairs(rows, columns, images, images, affinity, prepared)
        scales = pairs.scales()
        *_, certified, bids = solve_on_device(affinity, scales, gap, 2000)
        seconds = self.seconds(lambda: Auction(where="device").solve(pairs))
        # A row is read by each bid, and four times besides: for the range, twice, the starting prices and the bound.
        read = (float(bids.sum()) + 4 * count * affinity.shape[1]) * affinity.shape[2] * 4 / seconds
        few = min(count, 64 * available_cores())
        on_cpu = affinity[:few].cpu().numpy()
        each = max(1, min(8, few // available_cores()))
        parts = [slice(k, k + each) for k in range(0, few, each)]
        method = Auction(where="cpu")

        def solve(part: slice) -> np.ndarray:
            return method.solve(
                Pairs(rows[:few][part], columns[:few][part], images, images, on_cpu[part], prepared)
            ).values

        with ThreadPoolExecutor(available_cores()) as pool:
            expected = np.concatenate(list(pool.map(solve, parts)))
            on_threads = self.seconds(lambda: list(pool.map(solve, parts)), 2) / few
        found = Auction(where="device").solve(pairs)
        gaps = (found.bounds - found.values) / scales
        off = np.abs(found.values[:few] - expected) / scales[:few]
        self.say(
            f"| {locations} | {count:,} | {count / seconds:,.0f} | {1 / on_threads:,.0f} | "
            f"{bids.mean() / affinity.shape[1]:.1f} | {read / 1e12:.2f} | {certified.mean():.2%} | {gaps.max():.1e} | "
            f"{off.max():.1e} |"
        )

    def peer(self) -> None:
        """The same affinities, on the same device, by torch-linear-assignment; both end with values in main memory."""
        from torch_linear_assignment import batch_linear_assignment

        self.say("## Against torch-linear-assignment\n")
        self.say("| S | pairs | ours, matchings/s | theirs, matchings/s | ratio | largest difference, of the norms |")
        self.say("|" + "---|" * 6)
        for locations, pairs in OF_THE_PEER.items():
            z = Side.of(self.tokens(locations, self.crops))
            rows, columns, affinity = self._affinities(z, 4 if self.smoke else pairs)
            prepared = (Auction().prepare(z.locations),) * 2
            ours = Pairs(rows, columns, z.locations, z.locations, affinity, prepared)

            def theirs(affinity: torch.Tensor = affinity) -> np.ndarray:
                partners = batch_linear_assignment(-affinity)
                return affinity.gather(2, partners[..., None]).double().sum(dim=(1, 2)).cpu().numpy()

            method = Auction(1e-2 if self.smoke else 1e-6, where="device")
            off = np.abs(method.solve(ours).values - theirs()) / ours.scales()
            taken = self.seconds(lambda p=ours, m=method: m.solve(p)), self.seconds(theirs, 2)
            self.say(
                f"| {locations} | {len(rows):,} | {len(rows) / taken[0]:,.0f} | {len(rows) / taken[1]:,.0f} | "
                f"{taken[1] / taken[0]:.1f} | {off.max():.1e} |"
            )
        self.say()

    def half(self) -> None:
        """What rounding the tokens to float16 changes."""
        self.say("## Half precision\n")
        self.say(
            "| S | largest change of a matched product, of the norms | of the cosine, on average | product, ms a pair |"
        )
        self.say("|---|---|---|---|")
        for locations in LAYERS:
            z = self.tokens(locations, self.crops)
            found = {}
            for precision in ("float32", "float16"):
                images = Side.of(z)
                source = Affinities(images, images, True, True, precision)
                rows, columns = next(source.all_pairs())
                taken = self.seconds(lambda s=source, r=rows, c=columns: s.block(r, c).affinity()) / len(rows)
                solved = rsm_probe.rsm(z, matching=Auction(precision=precision), kernel="cosine")
                found[precision] = solved.dataset["product"].values, solved.values, taken
            norms = np.sqrt(np.outer(*(np.diagonal(found["float32"][0]),) * 2))
            change = np.abs(found["float16"][0] - found["float32"][0]) / norms
            cosine = np.abs(found["float16"][1] - found["float32"][1]).mean()
            times = " / ".join(f"{found[p][2] * 1e3:.4f}" for p in ("float32", "float16"))
            self.say(f"| {locations} | {change.max():.1e} | {cosine:.1e} | {times} |")
        self.say()

    def _captures(self, folder: str) -> list[CapturedLayer]:
        """Queries and database on disk: crops of photographs, S = 256, C = 768."""
        turn = torch.linalg.qr(torch.randn(ROW["channels"], 256, generator=torch.Generator().manual_seed(0)))[0]
        network = dict(trained_network(self.device).named_children())
        stages = list(network.values())[: list(network).index("layer4")]
        loaded = rsm_probe.sources.LoadedModel("net", torch.nn.Sequential(*stages, _Turned(turn)).eval(), normalise)
        layers = []
        for name in ("queries", "database"):
            crops = photos("all", size=64, count=ROW[name], seed=len(name))
            capture = rsm_probe.capture(loaded, crops, [str(len(stages))], f"{folder}/{name}.zarr", device=self.device)
            layers.append(capture[str(len(stages))])
        return layers

    def row(self) -> None:
        """One row of Table 2: 10 million pairs, exact, from the captures on disk to the values."""
        self.say("## A row of Table 2\n")
        if self.smoke:
            self.say("(not in a smoke run)\n")
            return
        with tempfile.TemporaryDirectory() as folder:
            sides = self._captures(folder)
            for precision in ("float32", "float16"):
                start = time.perf_counter()
                pairs = rsm_probe.all_pairs(
                    *sides, f"{folder}/{precision}.zarr", Auction(precision=precision), "location-mean", memory="32GB",
                    device="auto", progress=True,
                )  # fmt: skip
                rsm_probe.RSM.from_pairs(pairs, "cosine")
                taken = time.perf_counter() - start
                gap = (pairs["bound"] - pairs["product"]) / np.sqrt(pairs["norm_a"] * pairs["norm_b"])
                (rows, locations, channels), columns = sides[0].shape, len(sides[1])
                self.say(
                    f"- {rows:,} x {columns:,} images, S = {locations}, C = {channels}, tokens in {precision}: "
                    f"{taken:.1f} s, largest certified gap {float(gap.max()):.1e}"
                )
        self.say()

    def sweep(self) -> None:
        """A ResNet-101 over 10 000 images of 64 x 64: all blocks, batches of 250."""
        self.say("## A sweep\n")
        count, batch = (12, 6) if self.smoke else (10_000, 250)
        images = photos("all", size=32 if self.smoke else 64, count=count, seed=1)
        name = "torchvision:resnet18" if self.smoke else "torchvision:resnet101"
        model = rsm_probe.load_model(name, weights=None)
        model = rsm_probe.sources.LoadedModel(name, model.module, normalise)
        start = time.perf_counter()
        found = rsm_probe.sweep(
            model, images, "layer4.1" if self.smoke else "blocks", batch_size=batch, device=self.device,
            centering="location-mean", progress=True,
        )  # fmt: skip
        layers = len(set(found.cka["layer_a"].values.tolist()))
        self.say(f"- {name}, random weights, {count:,} images, {layers} blocks: {time.perf_counter() - start:.1f} s")
        self.say()

    def profile(self) -> None:
        """Where the time of a batch of pairs goes: S = 256."""
        self.say("## Profile\n")
        z = self.tokens(256, self.crops)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self.smoke:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        method = Auction() if not self.smoke else Auction(1e-2, where="device")
        rsm_probe.rsm(z, matching=method)
        with torch.profiler.profile(activities=activities) as found:
            rsm_probe.rsm(z, matching=method)
        order = "self_cpu_time_total" if self.smoke else "self_cuda_time_total"
        self.say("```")
        self.say(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))
        self.say("```\n")


class _Turned(torch.nn.Module):
    """Channels (N, C, H, W) in another orthonormal basis, of more dimensions."""

    def __init__(self, turn: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("turn", turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.turn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["ceilings", "matchings", "peer", "row", "sweep", "half", "profile"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.smoke)
    name = "CPU" if bench.device.type == "cpu" else torch.cuda.get_device_name()
    if options.smoke:
        bench.say("# A smoke run: no figure of it means anything\n")
    elif bench.device.type == "cpu" and options.only != ["half"]:
        parser.error("there is no GPU here; --only half can be measured without one")
    else:
        versions = f"CUDA {torch.version.cuda}, PyTorch {torch.__version__.split('+')[0]}, "
        versions += f"Triton {version('triton')}"
        bench.say(f"# {machine() if name == 'CPU' else f'{name}, {available_cores()} CPU cores, {versions}'}\n")
    for part in options.only:
        getattr(bench, part)()
        if not options.smoke:  # nothing that was measured is lost
            file = "half-precision.md" if name == "CPU" else f"gpu-{name.replace(' ', '-')}.md"
            (options.out / file).write_text("\n".join(bench.lines) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    main()
