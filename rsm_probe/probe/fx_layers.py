"""Captures operations that are not modules, such as residual sums, through `torch.fx`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from rsm_probe.errors import LayerError, did_you_mean
from rsm_probe.probe.layers import Selection

PREFIX = "fx:"
_STATE = threading.local()


def is_repeating() -> bool:
    """Whether this thread is repeating a forward pass to capture operations."""
    return getattr(_STATE, "repeating", False)


class GraphLayers:
    """The operations of a model's graph, named as in torchvision's feature extraction.

    Args:
        model: a model that `torch.fx` can trace.
        names: names of operations, such as `fx:layer1.0.add`.

    Attributes:
        selections: the operations, as layers to capture.
        modules: names of the modules that the graph calls; hooks on them detect calls outside a forward pass.

    Raises:
        LayerError: the model cannot be traced, or has no such operation.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        from torchvision.models.feature_extraction import NodePathTracer

        tracer = NodePathTracer()
        try:
            graph = tracer.trace(model)
        # The model's own code runs on symbolic values and may raise anything.
        except Exception as error:  # noqa: BLE001
            raise LayerError(f"torch.fx cannot trace {type(model).__name__}: {error}; name modules instead") from None
        named = {name: node for node, name in tracer.node_to_qualname.items()}
        self._nodes: dict[fx.Node, Selection] = {}
        for label in names:
            if (name := label.removeprefix(PREFIX)) not in named:
                raise LayerError(
                    f"the graph of {type(model).__name__} has no operation {name!r}{did_you_mean(name, named, 5)}"
                )
            self._nodes[named[name]] = Selection(label, "")
        self.selections = list(self._nodes.values())
        self._module = fx.GraphModule(tracer.root, graph)
        self.modules = {str(node.target) for node in graph.nodes if node.op == "call_module"}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], take: Callable[[Selection, Any], None]) -> None:
        """Runs the graph, and passes on the result of each operation before later ones can modify it."""
        nodes = self._nodes
        inputs = [node.target for node in self._module.graph.nodes if node.op == "placeholder"][len(args) :]

        class Following(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                result = super().run_node(node)
                if node in nodes:
                    take(nodes[node], result)
                return result

        _STATE.repeating = True
        try:
            Following(self._module).run(*args, *(kwargs[name] for name in inputs if name in kwargs))
        finally:
            _STATE.repeating = False
