"""Resolves layer names, globs, regular expressions, "blocks" and "all" to modules of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rsm_probe.checks import brief, require_text
from rsm_probe.errors import LayerError, did_you_mean
from rsm_probe.probe.facets.facet_names import Facet, facet_of, split_pattern
from rsm_probe.probe.torch_internals import COMPILED_FROM, CONVOLUTIONS
from rsm_probe.probe.wrappers import named_layers

Layers = str | Sequence[str]

# Containers whose class says nothing about their contents.
_GENERIC = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A class of blocks with less than this share of all block parameters is an accessory (squeeze-excitation).
_ACCESSORY_SHARE = 0.01
# The fewest layers worth a sweep.
_FEWEST_LAYERS = 4
_NO_LAYERS = "probe it as a whole with layers=''"


@dataclass(frozen=True)
class Selection:
    """One layer to capture.

    Attributes:
        label: the name of its representation.
        module_name: the module's dotted name in the model, "" for the model itself.
        call: the call of the module to capture, or None if exactly one is expected.
        key: the part of a tuple or dict output, or the facet of attention, to capture; None for the default choice.
        strict: whether it is an error if the module never runs, runs repeatedly or yields no tokens: True for layers
            given by name, False for layers found by a pattern or rule.
    """

    label: str
    module_name: str
    call: int | None = None
    key: str | None = None
    strict: bool = True

    @property
    def facet(self) -> Facet | None:
        """The facet of attention that the key names, or None."""
        return None if self.key is None else facet_of(self.key)


def resolve(model: nn.Module, layers: Layers) -> list[Selection]:
    """Finds the modules that a layer specification names.

    Args:
        model: the model to search.
        layers: one of these, or a list of them: an exact module name (`layer1.0`), optionally with a call (`relu#1`) or
            a part of its output (`encoder[hidden_states]`) or a facet of its attention (`attn[key]`, `attn[key.2]`); a
            glob per name component (`layer*`, `blocks.*`; `**` crosses dots), also with a facet (`blocks.*.attn[key]`);
            `regex:` and a regular expression to search for in the whole name; `"blocks"`; `"all"`.

    Returns:
        Selections without duplicates, in order of registration. A pass sorts them in forward order.

    Raises:
        LayerError: a name or pattern matches nothing (the message lists the nearest names), or is not text.
    """
    modules = named_layers(model)
    specs = layer_specs(layers, modules)
    selections: dict[str, Selection] = {}
    for spec in specs:
        # Names may include those of wrappers.
        if spec not in modules:
            spec = re.sub(rf"(?<![^.]){COMPILED_FROM}\.", "", spec)
            spec = spec.removeprefix("module.") if "module" not in modules else spec
        for selection in _resolve_one(model, modules, spec):
            # An explicitly named layer stays strict if a pattern matches it too.
            if selection.strict or selection.label not in selections:
                selections[selection.label] = selection
    order = {name: number for number, name in enumerate(modules)}
    return sorted(selections.values(), key=lambda s: (order[s.module_name], s.call or 0))


def layer_specs(layers: Layers, modules: Mapping[str, nn.Module]) -> list[str]:
    """The user's layer specification as a list of texts.

    Raises:
        LayerError: it is empty, or contains something other than text.
    """
    several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes | nn.Module)
    if isinstance(layers, Mapping):
        raise LayerError(f"layers must be text or a list of texts, found {brief(layers)}; give list(layers)")
    if layers is None:
        raise LayerError("layers must be text, found None; leave it out for \"blocks\", or give names, globs or 'all'")
    specs = list(layers) if several and getattr(layers, "ndim", None) != 0 else [layers]
    for spec in specs:
        if isinstance(spec, nn.Module):
            name = next((name for name, module in modules.items() if module is spec), "")
            near = f"; write {name!r}" if name else ", which is not a part of the model"
            raise LayerError(f"layers are given by name, found a module ({type(spec).__name__}){near}")
    if not specs:
        raise LayerError("no layers given; give names, globs, 'regex:...', 'blocks' or 'all'")
    return [require_text(spec, "a layer's name", LayerError) for spec in specs]


def _resolve_one(model: nn.Module, modules: dict[str, nn.Module], spec: str) -> Iterable[Selection]:
    if spec == "blocks":
        return [Selection(name, name, strict=False) for name in block_names(model)]
    if spec == "all":
        return _matching(modules, "", f"{type(model).__name__} has no layers inside; {_NO_LAYERS}")
    if spec in modules:
        return [Selection(spec, spec)]
    top = ", ".join(list(dict.fromkeys(n.split(".")[0] for n in modules if n))[:12])
    no_match = f"no layer matches {spec!r}{_nearest(modules, spec)}; top-level names are: {top}"
    if spec.startswith("regex:"):
        return _matching(modules, spec.removeprefix("regex:"), no_match, f"{spec!r} is not a valid regular expression")
    exact = re.fullmatch(r"(?P<name>[^#\[]*)(?:\[(?P<key>[^\]]+)\])?(?:#(?P<call>\d+))?", spec)
    if exact and exact["name"] in modules:
        call = int(exact["call"]) if exact["call"] else None
        return [Selection(spec, exact["name"], call=call, key=exact["key"])]
    if any(char in spec for char in "*?["):
        invalid, facets = f"{spec!r} is not a valid glob", split_pattern(spec)
        try:
            return _matching(modules, _glob_to_regex(spec), no_match, invalid, whole=True)
        except LayerError:
            if facets is None:
                raise
        layers, key, call = facets
        named = "" if call is None else f"#{call}"
        return [
            Selection(f"{layer.label}[{key}]{named}", layer.module_name, call, key, strict=False)
            for layer in _matching(modules, _glob_to_regex(layers), no_match, invalid, whole=True)
        ]
    near = did_you_mean(exact["name"] if exact else spec, (n for n in modules if n), 5)
    raise LayerError(
        f"{type(model).__name__} has no layer {spec!r}{near} (`rsm-probe layers` lists them; operations that are "
        f"not modules, such as residual sums, are 'fx:...' layers where torch.fx can trace the model)"
    )


def _nearest(modules: dict[str, nn.Module], spec: str) -> str:
    """What a pattern without matches may have meant: `**` for `*`, or similar names; for the message."""
    facets = split_pattern(spec)
    layers = spec if facets is None else facets[0]
    if spec.startswith("regex:") or "[" in layers or layers in modules:
        return ""
    if not any(char in layers for char in "*?"):
        return did_you_mean(layers, (name for name in modules if name))
    across = layers.replace("**", "*").replace("*", "**")
    pattern = re.compile(_glob_to_regex(across))
    if across == layers or not any(pattern.fullmatch(n) and type(m) not in _GENERIC[1:] for n, m in modules.items()):
        return ""
    return f" (* does not match dots, ** does: {across + spec[len(layers) :]!r})"


def _matching(
    modules: dict[str, nn.Module], regex: str, no_match: str, invalid: str = "", *, whole: bool = False
) -> list[Selection]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise LayerError(f"{invalid}: {error}") from None
    match = pattern.fullmatch if whole else pattern.search
    names = [n for n, m in modules.items() if n and match(n) and type(m) not in _GENERIC[1:]]
    if not names:
        raise LayerError(no_match)
    return [Selection(name, name, strict=False) for name in names]


def _glob_to_regex(glob: str) -> str:
    """Translates shell wildcards; `*` and `?` match within one dotted component, `**` across components."""

    def translate(part: re.Match[str]) -> str:
        if part["characters"]:
            characters = re.escape(part["characters"]).replace(r"\-", "-")
            return f"[^.{characters}]" if part["negated"] else f"[{characters}]"
        return {"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(part[0]) or re.escape(part[0])

    return re.sub(r"\*\*|\[(?P<negated>!?)(?P<characters>[^\]]+)\]|.", translate, glob)


def block_names(model: nn.Module) -> list[str]:
    """The default layers of a sweep: the residual, transformer or dense blocks that a network stacks, in order.

    A block is an outermost module of a class that occurs at least twice and has at least two weights (convolutions,
    linear maps). A stage, which only stacks blocks in a container, is replaced by its blocks. In a network without
    repeated blocks, the layers are the members of the container with the most convolutional weights, or its
    activations. No rule depends on the name of a model or layer.

    Raises:
        LayerError: the model stacks no blocks, so its layers have to be named.
    """
    classes = Counter(type(m) for m in model.modules() if type(m) not in _GENERIC and _weight_count(m) >= 2)
    repeated = {cls for cls, count in classes.items() if count >= 2}
    # A stage with a single block looks like a block; other stages of its class reveal it.
    stages = {type(module) for module in model.modules() if type(module) in repeated and _is_stage(module, repeated)}

    def walk(prefix: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            if type(child) in repeated - stages:
                yield name, child
            else:
                yield from walk(name, child)

    blocks = list(walk("", model))
    # Drop the multilayer perceptron of a head, whose class also occurs inside blocks.
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
    # Position tables and class tokens have a first axis of size 1.
    return sum(parameter.ndim >= 2 and parameter.shape[0] > 1 for parameter in module.parameters())


def _along_convolutions(model: nn.Module) -> list[str]:
    """Members of the container with the most convolutional weights, or its activations; empty if too few."""

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
    """Whether a module is or contains a sequence of blocks only, so that its blocks are swept instead."""
    containers = [list(child.children()) for child in module.children() if type(child) in _GENERIC[:2]]
    # A stage may contain its blocks directly. Dense blocks join their layers in a ModuleDict and are no stages.
    if isinstance(module, nn.Sequential) or (
        not isinstance(module, nn.ModuleDict) and len(list(module.children())) > 1
    ):
        containers.append(list(module.children()))
    return any(elements and all(type(part) in blocks for part in elements) for elements in containers)
