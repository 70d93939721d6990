"""Probe: hooks on at entry, all off at exit whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from rsm_probe.errors import LayerError
from rsm_probe.probe import fx_layers
from rsm_probe.probe.forward_pass import ForwardPass
from rsm_probe.probe.layers import Layers, Selection, layer_specs, resolve
from rsm_probe.probe.module_calls import ModuleCalls
from rsm_probe.probe.notices import Notices
from rsm_probe.probe.options import Options, Reduce
from rsm_probe.probe.readers import LearnedReaders
from rsm_probe.probe.representation import Layout
from rsm_probe.probe.torch_internals import in_backward
from rsm_probe.probe.wrappers import (
    Boundary,
    LastLayerSeenError,
    evaluating,
    named_layers,
    plain_model,
    require_values,
    run_eagerly,
)


class Probe:
    """Captures the representations of named layers during forward passes.

    Inside the `with` block every forward pass replaces `representations`. The model's outputs, its training flags and
    other people's hooks stay as they are; captured tensors are detached copies, safe from later in-place operations.
    Forward passes in other threads than the one that entered the block are not captured, nor is what runs again in a
    backward pass (checkpointed layers).

    Only calls of the model itself are captured. Once a probed layer runs in any other way (another method, such as
    `encode_image`, a part that is called by itself, another model that shares it), or a pass fails, `representations`
    is empty until the next pass: what is there always belongs to the last batch that the layers saw.

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
            `name[key]` a part of a tuple or dict output; `fx:name` an operation that is not a module, at the price of a
            second forward pass, where `torch.fx` can trace the model.
        example: an input for one forward pass at entry, which checks that every layer runs and gives tokens before
            long work starts: a tensor, a tuple of positional or a mapping of keyword arguments. What it gives is not
            kept.
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
        ModelError: `model` is not a module (at construction).
        LayerError: a name matches no module, or the model runs no hooks or holds no values (at construction); a named
            layer never ran or ran more than once (at the end of the forward pass).
        RepresentationError: a named layer's output is not a set of concept vectors (during the forward pass); an
            option is invalid (at construction).

    Warns:
        UserWarning: once each: modules that compute differently in training mode are in it (call `model.eval()`);
            layers ran outside of a forward pass; layers of a pattern could not be captured.
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
        reduce: Reduce | None = None,
    ) -> None:
        self._plain = plain_model(model)
        self.model = model
        self._modules = named_layers(self._plain)
        specs = layer_specs(layers, self._modules)
        operations = [spec for spec in specs if spec.startswith(fx_layers.PREFIX)]
        modules = [spec for spec in specs if spec not in operations]
        self.selections = resolve(self._plain, modules) if modules else []
        self._by_module: dict[str, list[Selection]] = {}
        for selection in self.selections:
            self._by_module.setdefault(selection.module_name, []).append(selection)
        self._module_calls = ModuleCalls(self._modules, self._by_module)
        self._graph = fx_layers.GraphLayers(self._plain, operations) if operations else None
        if self._graph is not None:
            self.selections += self._graph.selections
            for name in sorted(self._graph.modules & self._modules.keys()):
                self._by_module.setdefault(name, [])
        self._options = Options.checked(self.selections, layouts, dtype, stop_early, example, reduce)
        require_values(self._plain)
        self.representations: dict[str, Any] = {}
        self.passes = 0
        self.skipped: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._boundary = Boundary(self._plain, self._drop)
        self._learned = LearnedReaders()
        self._pass: ForwardPass | None = None
        self._active = self._in_example = False
        self._notices = Notices(self._plain)

    def __enter__(self) -> Self:
        if self._active:
            raise LayerError("this Probe is already active; leave its 'with' block before entering it again")
        self._thread = threading.get_ident()
        with ExitStack() as opened:
            opened.callback(self._close)
            opened.enter_context(run_eagerly(self.model))
            plain = self._plain
            opened.callback(plain.register_forward_pre_hook(self._on_start, with_kwargs=True).remove)
            self._module_calls.watch(opened, self._follows)
            for name in self._by_module:
                opened.callback(self._modules[name].register_forward_hook(self._capturing(name)).remove)
            opened.callback(plain.register_forward_hook(self._on_end, with_kwargs=True).remove)
            opened.callback(plain.register_forward_hook(self._on_failure, always_call=True).remove)
            opened.enter_context(self._boundary.in_place())
            self._active = True
            if self._options.example is not None:
                self._run_example()
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copied model brings its hooks along, which then see that it is not the model that is probed.
        return self

    def _close(self) -> None:
        self._active = False
        self._abandon()

    def _run_example(self) -> None:
        example, self._in_example = self._options.example, True
        named = isinstance(example, Mapping)
        args = () if named else example if isinstance(example, tuple) else (example,)
        try:
            with torch.no_grad(), evaluating(self.model):
                self.model(*args, **(example if named else {}))
        finally:
            self._in_example = False
            self.representations = {}

    # Hooks are methods that return None: any other value would replace the module's output. A hook that asks for
    # keyword arguments is called without them where another thread runs the model while hooks are put on or taken off
    # (PyTorch adds the hook first and notes the wish after that), so `_follows` comes before they are looked at.

    def _follows(self, module: nn.Module, own: nn.Module) -> bool:
        """Whether the call of a module counts: not in a copy, another thread, a backward pass, one for operations."""
        return (
            module is own
            and threading.get_ident() == self._thread
            and not fx_layers.is_repeating()
            and not in_backward()
        )

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
        # A model that calls itself is still in the same pass.
        if not self._follows(module, self._plain) or self._boundary.depth:
            return
        self._drop()
        self._module_calls.begin()
        if not self._in_example:
            self._notices.training_mode()
        self._pass = ForwardPass(self.selections, self._module_calls, self._learned, self._options, args, *kwargs)

    def _drop(self) -> None:
        """Drops what was captured: another pass begins, or one failed or was interrupted."""
        self.representations = {}
        self._abandon()

    def _abandon(self) -> None:
        if self._pass is not None:
            self._pass.abandon()
        self._pass = None

    def _capturing(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        selections, own = self._by_module[name], self._modules[name]

        def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._follows(module, own):
                return
            if self._pass is None:
                self.representations = {}
                self._notices.outside(name, self._module_calls.outside(name))
            elif selections:  # none of a module that is called by a model of which only operations are probed
                for selection in selections:
                    self._pass.take(selection, module, type(module).__name__, args, output)
                if self._pass.is_last_call() and self._options.stop_early:
                    raise LastLayerSeenError(self._boundary)

        return capture

    def _on_failure(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Called in any case, after `_on_end`: a pass that is still there raised.
        if self._pass is not None and self._follows(module, self._plain) and not self._boundary.depth:
            self._drop()

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        if self._pass is None or not self._follows(module, self._plain) or self._boundary.depth:
            return
        forward, (kwargs, _) = self._pass, kwargs_and_output
        if self._graph is not None:
            if any(part.training for part in self._plain.modules()):
                raise LayerError(
                    f"'{fx_layers.PREFIX}...' layers run the model twice, which changes it in training mode; eval() it"
                )
            self._graph.run(
                args, kwargs, lambda selection, result: forward.take(selection, module, "operation", (), result)
            )
        traced = forward.traced
        representations, self.skipped = forward.end()
        self.notes = self._learned.notes
        if traced:
            self._notices.layers(self.skipped, self.notes, self._learned.prefixes)
        self._module_calls.begin()
        self._pass, self.representations = None, representations
        self.passes += not self._in_example
