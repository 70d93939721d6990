"""What a probe costs: forward passes with and without it, beside other ways to the same layers, shuffled in one run.

    python benchmarks/probe.py [--model vit_base_patch16_224] [--images 8] [--rounds 15] [--threads 2]

Prints the median of each way, its overhead over the bare pass, and the memory that it holds at the end beyond what it
gives back. The first pass of a probe, which is followed operation by operation, is timed apart. On a machine that does
other work, single passes scatter by more than the overhead: take many rounds.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from rsm_probe import Probe


def hidden_states(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A ViT of the same size in transformers, bare and with all hidden states."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(image_size=options.size)).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    probe = Probe(model, "blocks")

    def probed() -> object:
        with probe:
            return model(images)

    return {
        "transformers, bare": lambda: model(images),
        "transformers, output_hidden_states": lambda: model(images, output_hidden_states=True),
        "transformers, probe": probed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    probe, early = Probe(model, "blocks"), Probe(model, "blocks", stop_early=True)
    names = [selection.label for selection in probe.selections]
    extractor = create_feature_extractor(model, names)

    def probed() -> object:
        with probe:
            return model(images)

    def probed_early() -> object:
        with early:
            return model(images)

    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: model(images),
        "probe": probed,
        "probe, stop_early": probed_early,
        "torchvision feature extractor": lambda: extractor(images),
        "timm forward_intermediates": lambda: model.forward_intermediates(images),
    }
    if options.model.startswith("vit_base"):
        ways |= hidden_states(options)
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad(), ExitStack():
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if way in ("bare", "probe"):
                print(f"first pass, {way}: {(time.perf_counter() - start) * 1e3:.0f} ms")
        for _ in range(options.rounds):
            for way in random.sample(list(ways), k=len(ways)):
                start = time.perf_counter()
                ways[way]()
                times[way].append(time.perf_counter() - start)
    captured = sum(kept.tokens.nbytes + kept.prefix.nbytes for kept in probe.representations.values())
    print(f"{options.model}: {len(names)} layers, {captured / 1e6:.0f} MB captured a pass, {options.rounds} rounds")
    for way, values in times.items():
        bare = times["transformers, bare" if way.startswith("transformers") else "bare"]
        print(
            f"{way:36s} {statistics.median(values) * 1e3:6.0f} ms  "
            f"{statistics.median(values) / statistics.median(bare) - 1:+6.1%} by medians  "
            f"{min(values) / min(bare) - 1:+6.1%} by fastest passes"
        )


if __name__ == "__main__":
    main()
