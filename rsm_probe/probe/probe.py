"""`Probe`: captures representations through hooks, which are removed at exit even after an error."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from rsm_probe.checks import listed
from rsm_probe.errors import LayerError
from rsm_probe.html_table import html_table
from rsm_probe.probe import fx_layers
from rsm_probe.probe.calls.attention_watch import AttentionWatch
from rsm_probe.probe.calls.boundary import FORWARD, Boundary, LastLayerSeenError, called_method, require_method
from rsm_probe.probe.calls.module_calls import ModuleCalls
from rsm_probe.probe.calls.notices import Notices
from rsm_probe.probe.forward_pass import ForwardPass
from rsm_probe.probe.layers import Layers, Selection, layer_specs, resolve
from rsm_probe.probe.learned_readers import LearnedReaders
from rsm_probe.probe.options import Options, Reduce
from rsm_probe.probe.representation import Layout, Representation
from rsm_probe.probe.representations import NO_PASS, Representations
from rsm_probe.probe.torch_internals import in_backward
from rsm_probe.probe.wrappers import evaluating, named_layers, plain_model, require_values, run_eagerly


class Probe:
    """Captures the representations of named layers during forward passes.

    Inside the `with` block, every forward pass replaces `representations`. Model outputs, training flags and hooks set
    by other code stay as they are. Captured tensors are detached copies, safe from later in-place operations. A probe
    ignores forward passes in threads other than the one that entered the block, and layers that run again in a
    backward pass (checkpointed layers).

    A probe captures only calls of the model itself, or of the method that `method` names. If a probed layer runs in any
    other way (another method, a submodule that is called directly, another model that shares the layer), or if a pass
    fails, `representations` is empty until the next pass. It therefore always belongs to the last batch that the
    layers saw.

    The first forward pass over inputs of a given shape is traced operation by operation and takes longer. The trace
    shows which axes hold images, locations and channels, which tokens have no location, and the order of the
    locations. Windowed or shuffled tokens are returned in image order.

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> with torch.no_grad(), rsm_probe.Probe(model, ["1"]) as probe:
        ...     _ = model(torch.rand(5, 3, 8, 8))
        >>> layer = probe.representations["1"]
        >>> layer.tokens.shape, layer.grid    # (N images, S locations, C channels), (H, W)
        (torch.Size([5, 36, 4]), (6, 6))

    Args:
        model: the module to be called. It may be wrapped in `torch.compile`, which then runs eagerly, or in data
            parallelism on one device.
        layers: exact names, globs (`layer*`, `blocks.*`), `regex:...`, a list of these, `"blocks"` (the default:
            residual or transformer blocks in forward order) or `"all"`. `name#1` is the second call of a module,
            `name[part]` a part of a tuple or dict output. `attn[query]`, `attn[key]` and `attn[value]` are facets of an
            attention layer or of a block with one: the outputs of its projections, before any normalisation or rotary
            embedding that follows them. `attn[key.2]` is the third head, `attn[key.*]` is every head as a layer of its
            own, and `blocks.*.attn[key]` names the facet in every block. `fx:name` is an operation that is not a
            module: it costs a second forward pass and needs a model that `torch.fx` can trace.
        example: an input for one forward pass at entry, which checks that every layer runs and yields tokens before
            long work starts: a tensor, a tuple of positional arguments or a mapping of keyword arguments. Its
            representations are discarded.
        layouts: how to read outputs that the trace cannot resolve, by layer name or glob: "NCHW", "NHWC", "NTC",
            "TNC", "NCT", "NC", or for videos "NCTHW" and "NTHWC".
        method: the method of the model whose calls are forward passes: `"encode_image"`, `"get_image_features"`,
            `"forward_features"`, `"training_step"`, `"generate"`. Calls that it makes of itself or of the model belong
            to the same pass. By default, each call of the model is a pass: each denoising step, each generated token.
        stop_early: end each forward pass after the last probed layer, from the second pass on; the model then returns
            None.
        dtype: of the captured tensors. By default that of the layer, with half precision converted to float32.
        reduce: called with a layer's name and its `Representation` as soon as the layer has run; its return value
            replaces the representation. The tokens are not copied and belong to the model: read them immediately, and
            neither keep nor modify them. The second call of a module is named `name#1`.
        inputs: the arguments that hold images, by name or position: `"pixel_values"`, `["left", "right"]`, `[0, 1]`.
            By default all that look like images; `Representation.input` says to which one a layer's tokens belong.

    Attributes:
        representations: layer name -> `Representation`, or the return value of `reduce`, in forward order; empty before
            the first forward pass. Looking up a layer that it does not hold raises a LayerError with the reason.
        passes: number of forward passes captured since the probe was created, over all its `with` blocks, without the
            pass over `example`. Equal numbers mean the same pass.
        skipped: layers matched by a pattern or "all" that could not be captured, each with the reason.
        notes: layers of which some vectors were left out or selected by index, each with the details.

    Raises:
        ModelError: `model` is not a module (at construction).
        LayerError: a name matches no module, or the model runs no hooks or has no values (at construction); a named
            layer never ran or ran more than once (at the end of the forward pass); the model has no such method.
        RepresentationError: the output of a named layer is not a set of concept vectors (during the forward pass); an
            option is invalid (at construction).

    Warns:
        UserWarning: once each: modules that compute differently in training mode are in training mode (call
            `model.eval()`); layers ran outside a forward pass; layers matched by a pattern could not be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "blocks",
        example: Any = None,
        *,
        layouts: Mapping[str, Layout] | None = None,
        method: str = FORWARD,
        stop_early: bool = False,
        dtype: torch.dtype | None = None,
        reduce: Reduce | None = None,
        inputs: str | int | Sequence[str | int] | None = None,
    ) -> None:
        self._plain = plain_model(model)
        self._method = require_method(self._plain, method)
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
        if operations and method != FORWARD:
            raise LayerError(
                f"layer {operations[0]!r} is an operation of the model's forward; leave out method={method!r}, or name "
                f"modules instead"
            )
        self._graph = fx_layers.GraphLayers(self._plain, operations) if operations else None
        if self._graph is not None:
            self.selections += self._graph.selections
            for name in sorted(self._graph.modules & self._modules.keys()):
                self._by_module.setdefault(name, [])
        self._attention_watches = [
            AttentionWatch(name, self._modules[name])
            for name, named in self._by_module.items()
            if any(selection.facet is not None for selection in named)
        ]
        self._options = Options.checked(self.selections, layouts, dtype, stop_early, example, reduce, inputs)
        self._parameters = _positional(getattr(self._plain, method))
        require_values(self._plain)
        self.representations: dict[str, Any] = Representations(NO_PASS)
        self.passes = 0
        self.skipped: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        hooked = method == FORWARD
        own = (None, None) if hooked else (self._begin, self._end)
        self._boundary = Boundary(self._plain, method, self._fail, *own)
        self._learned = LearnedReaders()
        self._pass: ForwardPass | None = None
        self._active = self._in_example = False
        self._notices = Notices(self._plain)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self._active:
            raise LayerError("this Probe is already active; leave its 'with' block before entering it again")
        self._thread = threading.get_ident()
        with ExitStack() as opened:
            opened.callback(self._close)
            opened.enter_context(run_eagerly(self.model, self._method))
            plain, hooked = self._plain, self._method == FORWARD
            if hooked:
                opened.callback(plain.register_forward_pre_hook(self._on_start, with_kwargs=True).remove)
            self._module_calls.watch(opened, self._follows)
            for watch in self._attention_watches:
                watch.open(opened, self._follows, lambda: self._pass)
            for name in self._by_module:
                opened.callback(self._modules[name].register_forward_hook(self._capturing(name)).remove)
            if hooked:
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
        if self._options.stop_early and isinstance(error, AttributeError | TypeError) and "None" in str(error):
            error.add_note("stop_early=True: from the second pass on, the model returns None; by default, its result")

    def __repr__(self) -> str:
        layers = listed(self.representations or [selection.label for selection in self.selections])
        return f"Probe({type(self._plain).__name__}, {self.passes} forward passes; layers {layers})"

    def _repr_html_(self) -> str:
        """Tabulate the layers, with the shapes of their representations after a forward pass, for notebooks."""
        facts = {"model": type(self._plain).__name__, "forward passes": self.passes}
        if not self.representations:
            graph = fx_layers.PREFIX
            rows: list[list[object]] = [
                [s.label, "operation" if s.label.startswith(graph) else type(self._modules[s.module_name]).__name__]
                for s in self.selections
            ]
            note = "Nothing is captured yet: pass images through the model inside the 'with' block."
            return html_table("Probe", facts, ["layer", "module"], rows, count=len(rows), note=note)
        rows = [[name, *_cells(value)] for name, value in self.representations.items()]
        reasons = [f"{name} ({reason})" for name, reason in self.skipped.items()]
        note = f"Not captured: {listed(reasons, 3)}." if reasons else ""
        columns = ["layer", "tokens", "prefix", "grid", "dtype", "device", "input"]
        return html_table("Probe", facts, columns, rows, count=len(rows), note=note)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copying a model copies its hooks; they recognise that the copy is not the probed model.
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
                call = self.model if self._method == FORWARD else getattr(self._plain, self._method)
                call(*args, **(example if named else {}))
        finally:
            self._in_example = False
            self.representations = Representations(NO_PASS)

    # Hooks return None: any other value would replace the module's output. A hook that requests keyword arguments may
    # be called without them if another thread runs the model while hooks are added or removed (PyTorch registers the
    # hook first and the request second), so check `_follows` before reading them.

    def _follows(self, module: nn.Module, own: nn.Module) -> bool:
        """Whether a call counts: not in a copy, another thread, a backward pass or the second pass of `fx:` layers."""
        return (
            module is own
            and threading.get_ident() == self._thread
            and not fx_layers.is_repeating()
            and not in_backward()
        )

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
        # A model that calls itself is still in the same pass.
        if self._follows(module, self._plain) and not self._boundary.depth:
            self._begin(args, *kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a pass."""
        if not self._follows(self._plain, self._plain):
            return
        self._drop("a forward pass has begun and not ended")
        self._module_calls.begin()
        if not self._in_example:
            self._notices.training_mode()
        self._pass = ForwardPass(
            self.selections, self._module_calls, self._learned, self._options, args, kwargs, self._parameters
        )

    def _drop(self, reason: str) -> None:
        """Drops all representations, because a pass begins, failed or was interrupted."""
        self.representations = Representations(reason)
        self._abandon()

    def _fail(self) -> None:
        if self._pass is not None and self._follows(self._plain, self._plain):
            self._drop("the last forward pass failed or was interrupted")

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
                self.representations = Representations(
                    f"layer {name!r} ran outside the forward pass since the last one"
                )
                self._notices.outside(
                    name, self._method, lambda: (called_method(self._plain), self._module_calls.outside(name))
                )
            elif selections:  # empty for modules that are hooked only because the graph of `fx:` layers calls them
                with self._pass.ended_attention(name):
                    for selection in selections:
                        self._pass.take(selection, module, type(module).__name__, args, output)
                if self._pass.is_last_call() and self._options.stop_early:
                    raise LastLayerSeenError(self._boundary)

        return capture

    def _on_failure(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Runs after `_on_end` even on errors, so a pass that is still open has failed.
        if module is self._plain and not self._boundary.depth:
            self._fail()

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        if self._follows(module, self._plain) and not self._boundary.depth:
            self._end(args, kwargs_and_output[0])

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ends a pass, and hands out its representations."""
        if self._pass is None or not self._follows(self._plain, self._plain):
            return
        forward = self._pass
        if self._graph is not None:
            if any(part.training for part in self._plain.modules()):
                raise LayerError(
                    f"'{fx_layers.PREFIX}...' layers run the model twice, which changes a model in training mode; call "
                    f"model.eval() first"
                )
            self._graph.run(
                args, kwargs, lambda selection, result: forward.take(selection, self._plain, "operation", (), result)
            )
        traced = forward.traced
        representations, self.skipped = forward.end()
        self.notes = self._learned.notes
        if traced:
            self._notices.layers(self.skipped, self.notes, self._learned.prefixes)
        self._module_calls.begin()
        self._pass, self.representations = None, Representations("", representations, self.skipped)
        self.passes += not self._in_example


def _cells(value: Any) -> list[object]:
    """What a table shows of a representation, or of what a reducer made of one."""
    if not isinstance(value, Representation):
        return [f"reduced to {type(value).__name__}", "", "", "", "", ""]
    shapes = (" x ".join(map(str, shape or ())) for shape in (value.tokens.shape, value.prefix.shape, value.grid))
    return [*shapes, str(value.tokens.dtype).removeprefix("torch."), value.tokens.device, value.input]


def _positional(function: Callable[..., Any]) -> list[str]:
    """The names of a function's positional parameters; [] where they are unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
