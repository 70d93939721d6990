"""Which layers: names, globs, regular expressions, "blocks" and "all" become modules of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rsm_probe.checks import brief, require_text
from rsm_probe.errors import LayerError, nearest
from rsm_probe.probe.torch_internals import COMPILED_FROM, CONVOLUTIONS
from rsm_probe.probe.wrappers import named_layers

Layers = str | Sequence[str]

# Containers whose class says nothing about what they hold.
_GENERIC = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A kind of block that holds less than this share of all block parameters is an accessory (squeeze-excitation).
_ACCESSORY_SHARE = 0.01
# A sweep along fewer layers would show nothing.
_FEWEST_LAYERS = 4
_NO_LAYERS = "probe it as a whole with layers=''"


@dataclass(frozen=True)
class Selection:
    """One layer to capture.

    Attributes:
        label: the name under which its representation appears.
        module_name: the module's dotted name in the model, "" for the model itself.
        call: which call of the module counts, or None for "exactly one is expected".
        key: which part of a tuple or dict output counts, or None for the default choice.
        strict: whether a module that never ran, ran repeatedly or gave no tokens is an error: of layers that were
            named; not of those that a pattern or a rule found.
    """

    label: str
    module_name: str
    call: int | None = None
    key: str | None = None
    strict: bool = True


def resolve(model: nn.Module, layers: Layers) -> list[Selection]:
    """Finds the modules that a layer specification names.

    Args:
        model: the model to search.
        layers: one of, or a list of: an exact module name (`layer1.0`), also with a call (`relu#1`) or a part of its
            output (`encoder[hidden_states]`); a glob per name component (`layer*`, `blocks.*`; `**` crosses dots);
            `regex:` and a regular expression, searched in the whole name; `"blocks"`; `"all"`.

    Returns:
        Selections without repetition, in the order of registration (they are re-sorted as they fire).

    Raises:
        LayerError: a name or pattern that matches nothing (the message holds the nearest names); not text.
    """
    modules = named_layers(model)
    specs = layer_specs(layers, modules)
    selections: dict[str, Selection] = {}
    for spec in specs:
        # Names may come from a wrapper's point of view.
        if spec not in modules:
            spec = re.sub(rf"(?<![^.]){COMPILED_FROM}\.", "", spec)
            spec = spec.removeprefix("module.") if "module" not in modules else spec
        for selection in _resolve_one(model, modules, spec):
            # A layer that is named stays strict when a pattern matches it too.
            if selection.strict or selection.label not in selections:
                selections[selection.label] = selection
    order = {name: number for number, name in enumerate(modules)}
    return sorted(selections.values(), key=lambda s: (order[s.module_name], s.call or 0))


def layer_specs(layers: Layers, modules: Mapping[str, nn.Module]) -> list[str]:
    """The layer specification of a user as a list of texts.

    Raises:
        LayerError: no text, or nothing.
    """
    several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes | nn.Module)
    if isinstance(layers, Mapping):
        raise LayerError(f"layers must be text or a list of texts, found {brief(layers)}; give list(layers)")
    specs = list(layers) if several and getattr(layers, "ndim", None) != 0 else [layers]
    for spec in specs:
        if isinstance(spec, nn.Module):
            name = next((name for name, module in modules.items() if module is spec), "")
            near = f"; write {name!r}" if name else ", which is not a part of the model"
            raise LayerError(f"layers are named by text, found a module ({type(spec).__name__}){near}")
    if not specs:
        raise LayerError("no layers named; give names, globs, 'regex:...', 'blocks' or 'all'")
    return [require_text(spec, "a layer's name", LayerError) for spec in specs]


def _resolve_one(model: nn.Module, modules: dict[str, nn.Module], spec: str) -> Iterable[Selection]:
    if spec == "blocks":
        return [Selection(name, name, strict=False) for name in block_names(model)]
    if spec == "all":
        return _matching(modules, "", f"{type(model).__name__} has no layers inside; {_NO_LAYERS}")
    top = ", ".join(list(dict.fromkeys(n.split(".")[0] for n in modules if n))[:12])
    no_match = f"no layer matches {spec!r}; top-level names are: {top}"
    if spec.startswith("regex:"):
        return _matching(modules, spec.removeprefix("regex:"), no_match, f"{spec!r} is not a valid regular expression")
    if spec in modules:
        return [Selection(spec, spec)]
    exact = re.fullmatch(r"(?P<name>[^#\[]*)(?:\[(?P<key>[^\]]+)\])?(?:#(?P<call>\d+))?", spec)
    if exact and exact["name"] in modules:
        call = int(exact["call"]) if exact["call"] else None
        return [Selection(spec, exact["name"], call=call, key=exact["key"])]
    if any(char in spec for char in "*?["):
        return _matching(modules, rf"\A(?:{_glob_to_regex(spec)})\Z", no_match, f"{spec!r} is not a valid glob")
    near = nearest(exact["name"] if exact else spec, (n for n in modules if n), 5)
    raise LayerError(
        f"{type(model).__name__} has no layer {spec!r}{near} (`rsm-probe layers` lists them; operations that are "
        f"not modules, such as residual sums, are 'fx:...' layers where torch.fx can trace the model)"
    )


def _matching(modules: dict[str, nn.Module], regex: str, no_match: str, invalid: str = "") -> list[Selection]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise LayerError(f"{invalid}: {error}") from None
    names = [n for n, m in modules.items() if n and pattern.search(n) and type(m) not in _GENERIC[1:]]
    if not names:
        raise LayerError(no_match)
    return [Selection(name, name, strict=False) for name in names]


def _glob_to_regex(glob: str) -> str:
    """Shell wildcards within one dotted component, `**` across components."""

    def translate(part: re.Match[str]) -> str:
        if part["characters"]:
            characters = re.escape(part["characters"]).replace(r"\-", "-")
            return f"[^.{characters}]" if part["negated"] else f"[{characters}]"
        return {"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(part[0]) or re.escape(part[0])

    return re.sub(r"\*\*|\[(?P<negated>!?)(?P<characters>[^\]]+)\]|.", translate, glob)


def block_names(model: nn.Module) -> list[str]:
    """The default sweep: the residual, transformer or dense blocks that a network stacks, in order.

    A block is an outermost module of a class that occurs at least twice and holds at least two weights (convolutions,
    linear maps). Modules that only stack blocks in a container (stages) are looked into. A network without
    blocks of a class of their own is swept along its convolutions: at the members of the container that holds most of
    their weights, or at its activations. No names of models or layers are used.

    Raises:
        LayerError: the model stacks no blocks, so that the layers have to be named.
    """
    classes = Counter(type(m) for m in model.modules() if type(m) not in _GENERIC and _weight_count(m) >= 2)
    repeated = {cls for cls, count in classes.items() if count >= 2}
    # A stage of a single block looks like a block, but for the others of its class.
    stages = {type(module) for module in model.modules() if type(module) in repeated and _is_stage(module, repeated)}

    def walk(prefix: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            if type(child) in repeated - stages:
                yield name, child
            else:
                yield from walk(name, child)

    blocks = list(walk("", model))
    # The multilayer perceptron of a head is of a class that occurs inside blocks.
    parts = {type(part) for _, block in blocks for part in block.modules() if type(part) is not type(block)}
    counts = Counter(type(block) for _, block in blocks)
    blocks = [(name, block) for name, block in blocks if counts[type(block)] > 1 or type(block) not in parts]
    sizes: Counter[type[nn.Module]] = Counter()
    for _, block in blocks:
        sizes[type(block)] += sum(p.numel() for p in block.parameters())
    names = [name for name, block in blocks if sizes[type(block)] >= _ACCESSORY_SHARE * sizes.total()]
    names = names or _along_convolutions(model)
    if not names:
        top = ", ".join(name for name, _ in model.named_children())
        raise LayerError(
            f"{type(model).__name__} stacks no blocks of one class, so there is no default sweep; "
            + (f"name its layers instead; top-level names are: {top}" if top else _NO_LAYERS)
        )
    return names


def _weight_count(module: nn.Module) -> int:
    # A first axis of size 1 is that of a table of positions or of a class token.
    return sum(parameter.ndim >= 2 and parameter.shape[0] > 1 for parameter in module.parameters())


def _along_convolutions(model: nn.Module) -> list[str]:
    """Members of the container with most convolutional weights, or its activations; none where they are few."""

    def convolved(module: nn.Module) -> int:
        return sum(p.weight.numel() for p in module.modules() if isinstance(p, CONVOLUTIONS))

    containers = [(n, m) for n, m in model.named_modules() if type(m) in _GENERIC[:2] and len(m) >= _FEWEST_LAYERS]
    if not containers:
        return []
    prefix, container = max(containers, key=lambda item: (convolved(item[1]), len(item[1])))
    members = {f"{prefix}.{name}" if prefix else name: child for name, child in container.named_children()}
    composite = [name for name, child in members.items() if len(list(child.children())) and convolved(child)]
    activations = [n for n, child in members.items() if type(child).__module__ == nn.modules.activation.__name__]
    return next((names for names in (composite, activations) if len(names) >= _FEWEST_LAYERS), [])


def _is_stage(module: nn.Module, blocks: set[type[nn.Module]]) -> bool:
    """Whether a module is, or holds, a sequence of nothing but blocks: then its blocks are swept, not the module."""
    containers = [list(child.children()) for child in module.children() if type(child) in _GENERIC[:2]]
    # A stage may hold its blocks itself; what joins them in its own way (dense blocks) is a dictionary of them.
    if isinstance(module, nn.Sequential) or (
        not isinstance(module, nn.ModuleDict) and len(list(module.children())) > 1
    ):
        containers.append(list(module.children()))
    return any(elements and all(type(part) in blocks for part in elements) for elements in containers)
