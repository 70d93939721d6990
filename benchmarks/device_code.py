"""What the device's kernel is made of, counted without a device: registers, spills, instructions of a bid; bids.

    python benchmarks/device_code.py [--capability 90]      # compiles for a device, which need not be there
    TRITON_INTERPRET=1 python benchmarks/device_code.py --bids   # counts bids on trained features; minutes

These are counts, not times: what a device makes of them is for `benchmarks/gpu.py` to measure.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rsm_probe.matching.compiled.gpu_auction import solve_pairs
from rsm_probe.matching.compiled.gpu_batches import solve_on_device, warps_of
from rsm_probe.matching.methods.optimal import auction

POINTERS = {
    "affinities": "*fp32", "scales": "*fp64", "orders": "*i32", "aside": "*i32", "counts": "*i32",
    "permutations": "*i32", "values": "*fp64", "bounds": "*fp64", "bids_made": "*i32",
}  # fmt: skip
SCALARS = {"size": "i32", "order_stride": "i32", "gap": "fp32", "bids_per_row": "i32", "BLOCK": "constexpr"}
SIZES = [64, 256, 512, 1024, 4096]


def compiled(block: int, capability: int) -> Any:
    """The kernel for so many locations, as PyTorch's allocations are aligned."""
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(len(POINTERS) + 2)}
    source = ASTSource(solve_pairs, POINTERS | SCALARS, {(len(POINTERS) + len(SCALARS) - 1,): block}, aligned)
    options = {"num_warps": warps_of(block), "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def of_a_bid(code: str) -> int:
    """Instructions between the start and the end of the first loop that reduces over columns: one bid.

    A warp reduces by one instruction (REDUX) or by five exchanges (SHFL), as the version of Triton has it.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    reductions = [at for at, text in lines if "REDUX" in text or "SHFL" in text]
    jumps = [(int(to, 16), at) for at, text in lines for to in re.findall(r"BRA.* 0x([0-9a-f]+)", text)]
    loops = [(to, at) for to, at in jumps if any(to < reduction < at for reduction in reductions)]
    first = min(reduction for reduction in reductions if any(to < reduction < at for to, at in loops))
    start, end = min(((to, at) for to, at in loops if to < first < at), key=lambda loop: loop[1] - loop[0])
    return sum(start <= at <= end for at, _ in lines)


def layouts_changed(ttgir: str) -> int:
    """How often values move between threads in other ways than reductions within a bid: through shared memory."""
    bid = ttgir[ttgir.index("scf.while") :]
    bid = bid[bid.index("scf.while", 1) :]
    return bid[: bid.index("scf.yield")].count("convert_layout")


def count_code(capability: int) -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    print(f"Triton {triton.__version__}, compute capability {capability / 10}\n")
    print("| S | warps | registers | bytes of spills | shared bytes | instructions of a bid and warp | reductions by "
          "one instruction | changes of layout in a bid |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for block in SIZES:
        code = compiled(block, capability).asm
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code["cubin"])
            file.flush()
            run = [
                subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
                for option in ("--dump-resource-usage", "-sass")
            ]
        registers, stack, shared = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", run[0]).groups()
        print(f"| {block} | {warps_of(block)} | {registers} | {stack} | {shared} | {of_a_bid(run[1])} "
              f"| {code['ptx'].count('redux.sync')} | {layouts_changed(code['ttgir'])} |")  # fmt: skip


def count_bids() -> None:
    from features import features, trained_network

    layers = {64: "layer4.1", 256: "layer3.1"}
    found = features(trained_network(), 64, list(layers.values()), 6)
    for locations, layer in layers.items():
        z = found[layer] - found[layer].mean(dim=0)
        affinity = torch.bmm(z[:3], z[3:].mT)
        scales = (z[:3].flatten(1).norm(dim=1) * z[3:].flatten(1).norm(dim=1)).double().numpy()
        *_, certified, bids = solve_on_device(affinity, scales, 1e-6, 2000)
        queue = auction(affinity.numpy(), scales, 1e-6).bids
        taken = [np.round(part / locations, 1).tolist() for part in (bids, queue)]
        print(f"S = {locations}: {taken[0]} bids a row, {taken[1]} with a queue, certified {certified.tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the device: 80, 86, 89, 90, 100")
    parser.add_argument("--bids", action="store_true")
    options = parser.parse_args()
    if options.bids:
        count_bids()
    else:
        count_code(options.capability)


if __name__ == "__main__":
    main()
