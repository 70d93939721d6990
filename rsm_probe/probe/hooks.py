"""Probe: hooks on at entry, all off at exit whatever happens."""

from __future__ import annotations

import fnmatch
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe import graph
from rsm_probe.probe.calls import NOTHING, Calls
from rsm_probe.probe.evidence import INDEPENDENT, Evidence, declared_prefix
from rsm_probe.probe.layers import Layers, Selection, resolve
from rsm_probe.probe.tokens import Layout, Representation, pick_tensor
from rsm_probe.probe.wrappers import (
    LastLayerSeenError,
    ending_early,
    evaluating,
    named_layers,
    plain_model,
    run_eagerly,
)


class Probe:
    """Captures the representations of named layers during forward passes.

    Inside the `with` block every forward pass replaces `representations`. The model's outputs, its training flags and
    other people's hooks stay as they are; captured tensors are detached copies, safe from later in-place operations.
    Forward passes in other threads than the one that entered the block are not captured.

    The first forward pass over inputs of a shape is followed operation by operation, which takes longer: it shows which
    axes hold images, locations and channels, which tokens stand for no location, and the order of the locations.
    Windows and shuffled tokens are put back in the order of the image.

    Example:
        >>> with Probe(model, "blocks") as probe:
        ...     model(images)
        >>> probe.representations["layer1.0"].tokens.shape        # (N, S, C)

    Args:
        model: the module that will be called; also inside `torch.compile`, which then runs eagerly, or data parallelism
            on one device.
        layers: exact names, globs (`layer*`, `blocks.*`), `regex:...`, a list of these, `"blocks"` (the default:
            residual or transformer blocks in forward order) or `"all"`. `name#1` takes the second call of a module,
            `name[key]` a part of a tuple or dict output; `fx:name` an operation that is no module, at the price of a
            second forward pass, where `torch.fx` can trace the model.
        example: an input for one forward pass at entry, which checks that every layer runs and gives tokens before
            long work starts: a tensor, a tuple of positional or a mapping of keyword arguments.
        layouts: how to read outputs that nothing else settles, by layer name or glob: "NCHW", "NHWC", "NTC", "TNC",
            "NCT", "NC", or of videos "NCTHW" and "NTHWC".
        stop_early: end each forward pass after the last probed layer, from the second pass on; the model then returns
            None.
        dtype: of the captured tensors; by default that of the layer, half precision as float32.
        reduce: called with a layer's name and its `Representation` as soon as the layer has run; what it returns is
            kept in its place, and nothing is copied: the tokens are the model's own, to be read at once and not to be
            kept or changed. A second call of a module goes by `name#1`.

    Attributes:
        representations: layer name -> `Representation`, or what `reduce` made of it, in forward order; empty before the
            first forward pass.
        passes: number of forward passes captured since the probe was made, over all its `with` blocks; the pass over
            `example` does not count. Two equal numbers mean the same pass.
        skipped: layers that a pattern or "all" matched but that could not be captured, each with the reason.
        notes: layers of whose output a part was left out, each with what it was.

    Raises:
        LayerError: a name matches no module, or the model runs no hooks (at construction); a named layer never ran or
            ran more than once (at the end of the forward pass).
        RepresentationError: a named layer's output is no set of concept vectors (during the forward pass).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "blocks",
        example: Any = None,
        *,
        layouts: Mapping[str, Layout] | None = None,
        stop_early: bool = False,
        dtype: torch.dtype | None = None,
        reduce: Callable[[str, Representation], Any] | None = None,
    ) -> None:
        self.model = model
        self.reduce = reduce
        self._plain = plain_model(model)
        self._modules = named_layers(self._plain)
        specs = [layers] if isinstance(layers, str) else list(layers)
        operations = [spec.removeprefix(graph.PREFIX) for spec in specs if spec.startswith(graph.PREFIX)]
        specs = [spec for spec in specs if not spec.startswith(graph.PREFIX)]
        self.selections = resolve(self._plain, specs) if specs or not operations else []
        self._graph = graph.GraphLayers(self._plain, operations) if operations else None
        self.selections += [Selection(f"{graph.PREFIX}{name}", "") for name in operations]
        self.representations: dict[str, Any] = {}
        self.passes = 0
        self.skipped: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._example = example
        self._layouts = dict(layouts or {})
        self._require_known(self._layouts)
        self._dtype = dtype
        self._stop_early = stop_early
        self._by_module: dict[str, list[Selection]] = {}
        for selection in self.selections:
            if not selection.label.startswith(graph.PREFIX):
                self._by_module.setdefault(selection.module_name, []).append(selection)
        self._open = ExitStack()
        self._active = False
        self._thread = threading.get_ident()
        self._warned = False
        self._passes, self._outside = 0, ""
        self._in_graph = self._running = self._showing = False
        self._evidence = Evidence()
        self._reset()

    def __enter__(self) -> Self:
        if self._active:
            raise LayerError("this Probe is already active; leave its 'with' block before entering it again")
        try:
            with ExitStack() as opened:
                opened.callback(self._close)
                opened.enter_context(run_eagerly(self.model))
                plain = self._plain
                opened.callback(plain.register_forward_pre_hook(self._on_start, with_kwargs=True).remove)
                for name in self._by_module:
                    opened.callback(self._modules[name].register_forward_hook(self._capturing(name)).remove)
                opened.callback(plain.register_forward_hook(self._on_failure, always_call=True).remove)
                opened.callback(plain.register_forward_hook(self._on_end, with_kwargs=True).remove)
                if self._stop_early:
                    opened.enter_context(ending_early(plain))
                self._active, self._thread = True, threading.get_ident()
                if self._example is not None:
                    self._run_example()
                self._passes, self._outside = 0, ""
                self._open = opened.pop_all()
        except BaseException:
            self._active = False
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self._outside and not self._passes and error is None:
            warnings.warn(
                f"nothing was captured: layers ran outside of the forward of {type(self._plain).__name__} (first "
                f"{self._outside!r}); call the model itself, or probe the part of it that is called",
                stacklevel=2,
            )

    def _close(self) -> None:
        self._active = self._running = False
        self._evidence.forget()
        self._calls = Calls(self.selections, self._modules)

    def _run_example(self) -> None:
        example, self._showing = self._example, True
        try:
            with torch.no_grad(), evaluating(self.model):
                if isinstance(example, Mapping):
                    self.model(**example)
                elif isinstance(example, tuple):
                    self.model(*example)
                else:
                    self.model(example)
        finally:
            self._showing = False

    # Hooks are methods that return None: any other value would replace the module's output.

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        self._reset()
        self._running, self._passes = True, self._passes + 1
        self._evidence.begin(args, kwargs)

    def _reset(self) -> None:
        self._calls = Calls(self.selections, self._modules)
        self._fired = 0
        self.representations = {}

    def _capturing(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        selections = self._by_module[name]

        def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Only in the model's own pass: not in one for operations, in another thread, or of a model that shares it.
            if self._in_graph or threading.get_ident() != self._thread:
                return
            if not self._running:
                self._outside = self._outside or name
                return
            for selection in selections:
                self._take(selection, type(module).__name__, module, args, output)
            self._fired += 1
            if self._stop_early and self._fired == self._evidence.calls and not self._evidence.following:
                raise LastLayerSeenError

        return capture

    def _take(self, selection: Selection, kind: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Reads one output of a layer."""
        label, index = selection.label, self._calls.count(selection.label)
        if selection.call not in (None, index):
            self._calls.add(label, NOTHING)
            return
        try:
            if selection.key is None:
                tensor = self._evidence.choose(label, index, output)
            else:
                tensor = pick_tensor(output, selection.key, self._evidence.batch)
            dtype = self._dtype or torch.promote_types(tensor.dtype, torch.float32)
            layout = next((layout for pattern, layout in self._layouts.items() if _answers(label, pattern)), None)
            copy = self.reduce is None
            kept: Any = self._evidence.read(label, index, tensor, dtype, args, module, layout, copy)
        except RepresentationError as error:
            if selection.strict:
                raise RepresentationError(f"layer {label!r} ({kind}): {error}") from None
            self._calls.add(label, NOTHING, str(error))
            return
        if self.reduce is not None:
            with torch.no_grad(), _disable_current_modes():
                kept = self.reduce(label if selection.call is not None or not index else f"{label}#{index}", kept)
        self._calls.add(label, kept)

    def _require_known(self, patterns: Mapping[str, Layout]) -> None:
        for pattern in patterns:
            if not any(_answers(selection.label, pattern) for selection in self.selections):
                raise LayerError(f"layouts: no probed layer answers to {pattern!r}")

    def _on_failure(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Called in any case; a forward pass that raised has no output.
        if output is None and threading.get_ident() == self._thread:
            self._running = False
            self._evidence.forget()

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if self._graph is not None:
            if any(part.training for part in self._plain.modules()):
                raise LayerError(
                    f"'{graph.PREFIX}...' layers run the model twice, which changes it in training mode; eval() it"
                )
            selections = {selection.label: selection for selection in self.selections}
            self._in_graph = True
            try:
                self._graph.run(
                    args,
                    kwargs,
                    lambda name, result: self._take(selections[graph.PREFIX + name], "operation", module, (), result),
                )
            finally:
                self._in_graph = False
        self._running = False
        followed = self._evidence.following
        self._evidence.end(self._fired)
        self.representations, self.skipped = self._calls.collect()
        self.notes = self._evidence.notes
        self.passes += not self._showing
        self._calls = Calls(self.selections, self._modules)
        if followed and not self._warned:
            self._warned = self._warn()

    def _warn(self) -> bool:
        """Says once what a user may not expect; whether there was anything to say."""
        # That a text tower sees no image surprises nobody.
        skipped = [label for label, reason in self.skipped.items() if reason != INDEPENDENT]
        sequences = self._evidence.prefixes
        declared = declared_prefix(self._plain)
        other = [label for label, found in sequences.items() if declared is not None and found != declared]
        said = False
        for what, layers in (
            ("layers that a pattern matched could not be captured; `Probe.skipped` says why", skipped),
            (
                "layers hold vectors that are left out, or that were picked by index; `Probe.notes` says more",
                self.notes,
            ),
            (f"layers hold another number of prefix tokens than the {declared} that the model declares", other),
        ):
            if layers:
                names = ", ".join(list(layers)[:5]) + (", ..." if len(layers) > 5 else "")
                warnings.warn(f"{len(layers)} {what} ({names})", stacklevel=2)
                said = True
        return said


def _answers(label: str, pattern: str) -> bool:
    """Whether a layer, or the module of which it names a call, is named by a name or glob."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in (label, label.partition("#")[0]))
