"""How all pairs are cut into tiles that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import as_budget, format_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import device_workers
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.affinities import BLOCK_BYTES
from rsm_probe.pairs.pair_loop import affinity_bytes, require_machine

# Seconds of writing a tile and of checking what is there, mostly in one thread at a time.
TILE_SECONDS = 0.015
# Bytes of tokens on one side of a tile: large enough that matching outweighs reading, small enough to finish soon.
_TOKEN_BYTES = 16 << 20
_TOKEN_BYTES_ON_DEVICE = 256 << 20
_LARGEST_TILE = 1024
# At least this many tiles along each side of the result, so that workers finish at about the same time.
_TILES_PER_SIDE = 8
# Memory of a tile in units of the tokens on one side: both sides, centred and in float64, and chunks being read.
_SIDES_IN_MEMORY = 8
# Bytes per pair of products, bounds and their copies; bytes per location of permutations and their mirrored copies.
_PAIR_BYTES, _PERMUTATION_BYTES = 64, 16
# Tiles are small enough for this many workers to fit into the memory budget.
_WORKERS_THAT_FIT = 4


@dataclass(frozen=True)
class Plan:
    """How the pairs are cut into tiles that fit into memory.

    Attributes:
        image_bytes: bytes of the tokens of an image, of the larger side.
        block_bytes: bytes of affinities that one worker holds.
        pair_bytes: bytes held per pair while a tile is computed.
        memory: budget in bytes for all workers together.
        most: largest number of workers.
        tile: images on each side of a tile.
    """

    image_bytes: int
    block_bytes: int
    pair_bytes: int
    memory: int
    most: int
    tile: int

    @classmethod
    def of(
        cls,
        x: CapturedLayer,
        y: CapturedLayer,
        method: Matching,
        permutations: bool,
        execution: Execution,
        solver: torch.device | None = None,
    ) -> Plan:
        """The plan for all pairs of two captured layers.

        Affinities that stay on a device take no main memory, and its tiles are larger: its blocks hold many pairs.

        Args:
            x: the images in the rows.
            y: the images in the columns.
            method: the matching.
            permutations: whether they are kept.
            execution: the workers, and the memory for all of them.
            solver: the device that solves the pairs; None for the workers.

        Raises:
            CostError: one affinity alone exceeds the memory.
        """
        memory, workers = execution.memory_bytes, execution.worker_count
        image = max(x.shape[1], y.shape[1]) * x.shape[2] * 4
        least = _SIDES_IN_MEMORY * image + _PAIR_BYTES
        one = affinity_bytes(
            method, x.shape[1], y.shape[1], memory, whole=lambda one: 2 * max(one, BLOCK_BYTES) + least
        )
        if execution.executor is None:
            require_machine(method, x.shape, y.shape, 4, solver or torch.device("cpu"))
        # An affinity, its padded copy, and the state of its solver.
        block = 2 * max(one, BLOCK_BYTES) if one and solver is None else 0
        pair = _PAIR_BYTES + (_PERMUTATION_BYTES * x.shape[1] if permutations else 0)
        tokens = _TOKEN_BYTES if solver is None else _TOKEN_BYTES_ON_DEVICE
        wanted = max(1, min(tokens // image, _LARGEST_TILE, -(-max(len(x), len(y)) // _TILES_PER_SIDE)))
        most = workers if solver is None else min(workers, device_workers(solver))
        plan = cls(image, block, pair, memory, most, 1)
        # Independent of the number of workers here, or the last digits of a result would depend on it.
        share, chunk = memory // _WORKERS_THAT_FIT, x.images_per_chunk
        side = max((side for side in range(1, wanted + 1) if plan.tile_bytes(side) <= share), default=1)
        return replace(plan, tile=side // chunk * chunk if side > chunk else side)

    def workers(self, tile: int) -> int:
        """How many workers fit into memory with tiles of a size; at least one."""
        return max(1, min(self.most, self.memory // self.tile_bytes(tile)))

    def tile_bytes(self, tile: int) -> int:
        """Bytes that one worker needs."""
        return self.block_bytes + _SIDES_IN_MEMORY * tile * self.image_bytes + self.pair_bytes * tile**2

    def require_memory(self, tile: int) -> None:
        """Refuse tiles that exceed the memory.

        Raises:
            CostError: one tile exceeds the memory.
        """
        if self.tile_bytes(tile) > self.memory:
            raise CostError(
                f"a tile of {tile} x {tile} images takes {format_bytes(self.tile_bytes(tile))}, above the memory "
                f"budget of {format_bytes(self.memory)}; raise memory= to at least "
                f"{as_budget(self.tile_bytes(tile))!r}" + (", or take tiles of fewer images" if tile > 1 else "")
            )


def tiling_seconds(rows: int, columns: int | None, image_bytes: int, tile: int | None) -> float:
    """Estimated seconds of writing tiles, before there is a capture.

    Args:
        rows: images in the rows.
        columns: images in the columns; None for those in the rows, each pair of which is matched once.
        image_bytes: bytes of the tokens of an image.
        tile: images on each side of a tile; None for the size that a plan would choose, as memory permits.
    """
    wanted = -(-max(rows, columns or 0) // _TILES_PER_SIDE)
    side = tile or max(1, min(_TOKEN_BYTES // image_bytes, _LARGEST_TILE, wanted))
    along = -(-rows // side)
    return TILE_SECONDS * (along * (along + 1) // 2 if columns is None else along * -(-columns // side))
