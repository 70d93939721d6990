"""One forward pass: what its layers return is read as they run, and handed over when it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.arrays import require_dense
from rsm_probe.errors import RepresentationError
from rsm_probe.probe.layer_outputs import NOTHING, Calls
from rsm_probe.probe.layers import Selection
from rsm_probe.probe.module_calls import Called
from rsm_probe.probe.options import Options
from rsm_probe.probe.readers import Evidence
from rsm_probe.probe.representation import Representation, pick_tensor
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.inputs import NestingError

_PART_OF_LAYER = re.compile(r"<layer>\[([^\]]+)\]")
Reduce = Callable[[str, Representation], Any]


class ForwardPass:
    """Takes what layers return while a pass runs.

    Args:
        selections: the layers that are wanted.
        called: for messages that name what can be probed in place of a silent layer.
        evidence: what the pass shows, which has begun.
        options: how outputs are read.
        reduce: see `Probe`.

    Attributes:
        fired: how many calls of probed modules were seen.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        called: Called,
        evidence: Evidence,
        options: Options,
        reduce: Reduce | None,
    ) -> None:
        self.fired = 0
        self._calls = Calls(selections, called)
        self._evidence = evidence
        self._options = options
        self._reduce = reduce

    def take(self, selection: Selection, module: nn.Module, kind: str, args: tuple[Any, ...], output: Any) -> None:
        """Reads one output of a layer.

        Raises:
            RepresentationError: a layer that was named has an output that cannot be read.
        """
        label, index = selection.label, self._calls.count(selection.label)
        if selection.call not in (None, index):
            self._calls.add(label, NOTHING)
            return
        try:
            tensor = self._tensor(selection, index, output)
            dtype = self._options.dtype or torch.promote_types(tensor.dtype, torch.float32)
            layout, copy = self._options.layout(selection, index), self._reduce is None
            kept: Any = self._evidence.read(label, index, tensor, dtype, args, module, layout, copy)
        except RepresentationError as error:
            problem = _named(str(error), selection, index)
            if selection.strict:
                raise RepresentationError(f"layer {label!r} ({kind}): {problem}") from None
            self._calls.add(label, NOTHING, problem)
            return
        if self._reduce is not None:
            with torch.no_grad(), unobserved():
                kept = self._reduce(label if selection.call is not None or not index else f"{label}#{index}", kept)
        self._calls.add(label, kept)

    def _tensor(self, selection: Selection, index: int, output: Any) -> Tensor:
        try:
            if selection.key is None:
                tensor = self._evidence.choose(selection.label, index, output)
            else:
                tensor = pick_tensor(output, selection.key, self._evidence.batch)
        except NestingError as error:
            raise RepresentationError(f"in its output, {error}; choose a part with '<layer>[<part>]'") from None
        try:
            require_dense(tensor, "its output", RepresentationError)
        except RepresentationError as error:
            raise RepresentationError(f"{error} in the model, or probe a layer before or after it") from None
        if not tensor.numel():
            raise RepresentationError(
                f"its output has shape {tuple(tensor.shape)} and holds no values; give at least one image, larger "
                f"ones, or probe another layer"
            )
        return tensor

    def collect(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The pass is over: layer -> what is kept of it, in forward order, and the layers that gave nothing, with why.

        Raises:
            LayerError: see `Calls.collect`.
        """
        return self._calls.collect()


def _named(problem: str, selection: Selection, index: int) -> str:
    """A message that says what to write, with the layer's name for `<layer>`; parts and calls as a probe takes them."""
    call = f"#{selection.call or index}" if selection.call is not None or index else ""
    holder = "" if selection.key is None else f"{selection.key}."
    problem = _PART_OF_LAYER.sub(lambda part: f"{selection.module_name}[{holder}{part[1]}]{call}", problem)
    return problem.replace("<layer>", selection.label if selection.call is not None else f"{selection.label}{call}")
