"""Probe: hooks on at entry, all off at exit whatever happens."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.layers import Layers, Selection, resolve
from rsm_probe.probe.tokens import (
    GRID_SOURCES,
    Grid,
    Layout,
    Representation,
    infer_layout,
    pick_tensor,
    to_representation,
)


@dataclass
class _Call:
    """One output of one module, kept until the forward pass ends."""

    order: int
    representation: Representation | None
    problem: str = ""


class Probe:
    """Captures the representations of named layers during forward passes.

    Inside the `with` block every forward pass replaces `representations`. The model's outputs, its training flags and
    other people's hooks stay as they are; captured tensors are detached copies, safe from later in-place operations.

    Example:
        >>> with Probe(model, "blocks") as probe:
        ...     model(images)
        >>> probe.representations["layer1.0"].tokens.shape        # (N, S, C)

    Args:
        model: the module that will be called.
        layers: exact names, globs (`layer*`, `blocks.*`), `regex:...`, a list of these, `"blocks"` (the default:
            residual or transformer blocks in forward order) or `"all"`. `name#1` takes the second call of a module,
            `name[key]` a part of a tuple or dict output.
        example: an input for one forward pass at entry, which checks that every layer runs and gives tokens before
            long work starts: a tensor, a tuple of positional or a mapping of keyword arguments.
        layouts: how to read outputs whose shape settles nothing, by layer name or glob: "NCHW", "NHWC", "NTC", "TNC",
            "NCT" or "NC".

    Attributes:
        representations: layer name -> `Representation`, in forward order; empty before the first forward pass.
        skipped: layers that a pattern or "all" matched but that could not be captured, each with the reason.

    Raises:
        LayerError: a name matches no module (at construction); a named layer never ran or ran more than once (at
            the end of the forward pass).
        RepresentationError: a named layer's output is no set of concept vectors (during the forward pass).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "blocks",
        example: Any = None,
        *,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        for part in model.modules():
            if isinstance(part, torch.jit.ScriptModule):
                raise LayerError(
                    f"{type(part).__name__} is scripted and runs no hooks; probe the model it was made from"
                )
        self.model = model
        self.selections = resolve(model, layers)
        self.representations: dict[str, Representation] = {}
        self.skipped: dict[str, str] = {}
        self._example = example
        self._layouts = dict(layouts or {})
        self._by_module: dict[str, list[Selection]] = {}
        for selection in self.selections:
            self._by_module.setdefault(selection.module_name, []).append(selection)
        self._handles: list[RemovableHandle] = []
        self._warned = False
        self._settled: dict[str, Layout] = {}
        self._start(0)

    def __enter__(self) -> Self:
        if self._handles:
            raise LayerError("this Probe is already active; leave its 'with' block before entering it again")
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._on_start, with_kwargs=True))
            for module in self.model.modules():
                if isinstance(module, GRID_SOURCES):
                    self._handles.append(module.register_forward_hook(self._on_grid))
            for name in self._by_module:
                module = self.model.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._capturing(name)))
            self._handles.append(self.model.register_forward_hook(self._on_end))
            if self._example is not None:
                self._run_example()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def _run_example(self) -> None:
        example = self._example
        with torch.no_grad(), evaluating(self.model):
            if isinstance(example, Mapping):
                self.model(**example)
            elif isinstance(example, tuple):
                self.model(*example)
            else:
                self.model(example)

    # Hooks are methods that return None: any other value would replace the module's output.

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._start(_batch_size((*args, *kwargs.values())))

    def _start(self, batch: int) -> None:
        self._batch = batch
        self._grids: list[Grid] = []
        self._calls: dict[str, list[_Call]] = {}
        self._fired = 0
        self.representations = {}

    def _on_grid(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            self._grids.append((output.shape[2], output.shape[3]))

    def _capturing(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        selections = self._by_module[name]

        def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            index = len(self._calls.setdefault(selections[0].label, []))
            for selection in selections:
                calls = self._calls.setdefault(selection.label, [])
                wanted = selection.call is None or selection.call == index
                calls.append(self._read(selection, module, output) if wanted else _Call(self._fired, None))
            self._fired += 1

        return capture

    def _read(self, selection: Selection, module: nn.Module, output: Any) -> _Call:
        try:
            tensor = pick_tensor(output, selection.key, self._batch)
            layout = self._layout_of(selection.label) or self._settled_layout(selection.label, tensor, module)
            # A copy in memory order; reading it as (N, S, C) costs nothing more. Half precision becomes float32.
            kept = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            return _Call(self._fired, to_representation(kept, layout, self._grids))
        except RepresentationError as error:
            if selection.strict:
                raise RepresentationError(f"layer {selection.label!r} ({type(module).__name__}): {error}") from None
            return _Call(self._fired, None, str(error))

    def _settled_layout(self, label: str, tensor: Tensor, module: nn.Module) -> Layout:
        """The layout by evidence; where a sequence is as long as the batch, that of an earlier, clearer pass."""
        unclear = tensor.ndim == 3 and tensor.shape[0] == tensor.shape[1] == self._batch
        if unclear and label in self._settled:
            return self._settled[label]
        layout = infer_layout(tensor, self._batch, self._grids, module)
        if not unclear:
            self._settled[label] = layout
        return layout

    def _layout_of(self, label: str) -> Layout | None:
        names = (label, label.partition("#")[0])
        for pattern, layout in self._layouts.items():
            if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names):
                return layout
        return None

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured: list[tuple[int, str, Representation]] = []
        self.skipped = {}
        for selection in self.selections:
            captured.extend(self._collect(selection, self._calls.get(selection.label, [])))
        self._calls.clear()
        self.representations = {label: kept for _, label, kept in sorted(captured, key=lambda item: item[0])}
        if not captured:
            label, reason = next(iter(self.skipped.items()))
            raise LayerError(f"none of {len(self.skipped)} layers could be captured; {label!r}: {reason}")
        if self.skipped and not self._warned:
            self._warned = True
            names = ", ".join(list(self.skipped)[:5]) + (", ..." if len(self.skipped) > 5 else "")
            warnings.warn(
                f"{len(self.skipped)} layers that a pattern matched could not be captured ({names}); "
                f"`Probe.skipped` says why",
                stacklevel=2,
            )

    def _collect(self, selection: Selection, calls: list[_Call]) -> list[tuple[int, str, Representation]]:
        label, count = selection.label, len(calls)
        if not count:
            reason = f"never ran in this forward pass{self._ran_nearby(selection.module_name)}"
            return self._give_up(selection, LayerError(f"layer {label!r} {reason}"), reason)
        if selection.call is not None:
            if selection.call >= count:
                message = f"layer {label!r} was called {count} times in this forward pass; calls count from #0"
                return self._give_up(selection, LayerError(message), message)
            calls = [calls[selection.call]]
        elif count > 1:
            if selection.strict:
                raise LayerError(
                    f"layer {label!r} ran {count} times in one forward pass; choose a call: "
                    f"{', '.join(repr(f'{label}#{k}') for k in range(min(count, 4)))}"
                )
            return [
                (call.order, f"{label}#{k}", call.representation)
                for k, call in enumerate(calls)
                if call.representation is not None
            ]
        call = calls[0]
        if call.representation is None:
            self.skipped[label] = call.problem
            return []
        return [(call.order, label, call.representation)]

    def _give_up(self, selection: Selection, error: LayerError, reason: str) -> list[Any]:
        if selection.strict:
            raise error
        self.skipped[selection.label] = reason
        return []

    def _ran_nearby(self, name: str) -> str:
        """Names children of a container, or the parent of a leaf: what can be probed in the silent module's place."""
        module = self.model.get_submodule(name)
        children = [f"{name}.{child}" for child, _ in module.named_children()][:4]
        if children:
            return f"; the model calls its parts by hand: probe {', '.join(map(repr, children))}"
        parent = name.rpartition(".")[0]
        return f"; its weights may be used without calling it: probe {parent!r} instead" if parent else ""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every training flag as it was outside."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def _batch_size(inputs: tuple[Any, ...]) -> int:
    """The number of images in a forward pass: the first axis of the input that looks most like images.

    That is the first tensor of four or more axes; else a list of images, as detectors take them; else any tensor.
    """
    values = [v for value in inputs for v in (value.values() if isinstance(value, Mapping) else (value,))]
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    for tensor in tensors:
        if tensor.ndim >= 4:
            return int(tensor.shape[0])
    for value in values:
        if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
            return len(value)
    return int(tensors[0].shape[0]) if tensors else 0
