"""Find the weights of a module in a checkpoint by names and shapes, and load them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.checks import require_text
from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.sources.models.checkpoints import Entry
from rsm_probe.sources.models.fingerprints import require_weights

# What DataParallel, compile, FSDP and checkpointed activations put between the names of modules.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Counts the batches of the training; no layer computes with it.
_UNUSED = "num_batches_tracked"
_SHOWN = 5

Prefix = tuple[str, ...]


@dataclass
class Fit:
    """How the values of a checkpoint under one prefix fit a module.

    Attributes:
        prefix: keys and parts of names that precede the module's own names.
        entries: name in the module -> value in the checkpoint.
        missing: names for which the checkpoint has no value.
        unknown: names under the prefix that the module does not have.
        reshaped: names whose shapes differ.
        whole: names of weights for which the checkpoint holds whole numbers: quantised values without their scale.
        outside: names in the same mappings, but not under the prefix.
    """

    prefix: Prefix
    entries: dict[str, Entry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every value of the module is there, and no others."""
        return not (self.missing or self.unknown or self.reshaped or self.whole)

    def problems(self) -> str:
        """What does not fit, for messages."""
        listed = (
            ("missing", self.missing),
            ("unknown", self.unknown),
            ("of a different shape", self.reshaped),
            ("whole numbers", self.whole),
        )
        return "; ".join(f"{what}: {_some(names)}" for what, names in listed if names)

    def origin(self) -> str:
        """The key and the prefix, for messages; "" for a bare state dict."""
        keys = next(iter(self.entries.values())).keys if self.entries else ()
        key, prefix = self.prefix[: len(keys)], self.prefix[len(keys) :]
        named = [f"key={'.'.join(key)!r}"] if key else []
        return ", ".join([*named, *([f"prefix={'.'.join(prefix) + '.'!r}"] if prefix else [])])


def best_fit(module: nn.Module, entries: Sequence[Entry], where: str, key: str = "", prefix: str = "") -> Fit:
    """Find the values of a module in a checkpoint: those under the prefix where most names and shapes agree.

    Args:
        module: the module.
        entries: the values of the checkpoint.
        where: the checkpoint, for messages.
        key: keys of the mappings that lead to the weights, separated by dots; "" to search all.
        prefix: what precedes the module's own names; "" to search all.

    Raises:
        ModelError: the module has no values of its own yet, `key` or `prefix` does not exist, or several prefixes fit
            equally well and hold different values.
    """
    require_weights(module, type(module).__name__)
    own = module.state_dict()
    entries = _under(entries, require_text(key, "key", ModelError), where)
    fits = _fits(own, entries, ())
    whole = any(all(n in f.entries and _same_shape(f.entries[n].value, own[n]) for n in own) for f in fits.values())
    # Modules may have parts of such names themselves: wrappers are looked for only where the plain names do not fit.
    if not whole and len({_plain(name.split("."), _WRAPPERS) for name in own}) == len(own):
        fits = _fits(own, entries, _WRAPPERS)
    if require_text(prefix, "prefix", ModelError):
        fits = _with_prefix(fits, prefix, entries, where)
    agreeing = {start: sum(_same_shape(e.value, own[n]) for n, e in fit.entries.items()) for start, fit in fits.items()}
    most = max(agreeing.values(), default=0)
    best = [fits[start] for start, count in agreeing.items() if count == most]
    if len(best) > 1 and most and not all(_same_values(best[0], other, own) for other in best[1:]):
        listed = [fit.origin() or "the names as they are" for fit in best]
        more = f" (and {len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
        raise ModelError(
            f"{where} holds several sets of weights that fit {type(module).__name__} equally well; choose with "
            f"{' or '.join(listed[:_SHOWN])}{more} (of load_model or a model's entry; --key, --prefix)"
        )
    fit = best[0] if best else Fit(())
    _compare(fit, own, entries)
    return fit


def load_fit(
    module: nn.Module, fit: Fit, where: str, strict: bool = True, head: Collection[str] = (), advice: str = ""
) -> tuple[str, ...]:
    """Load the values that `best_fit` found into a module.

    Args:
        module: the module.
        fit: the values.
        where: the checkpoint, for messages.
        strict: whether all values of module and checkpoint must fit.
        head: names in the module that need not fit even so; missing ones become NaN.
        advice: what to do about a checkpoint that does not fit, for the message.

    Returns:
        The names without values, which now hold NaN: whatever is computed from them is NaN, too.

    Raises:
        ModelError: values do not fit; the module has not changed.

    Warns:
        UserWarning: says under which key and prefix the weights were, and what was left out.
    """
    kind, own = type(module).__name__, module.state_dict()
    parents = tuple(f"{name.rpartition('.')[0]}." for name in head if "." in name)
    left_out = [*fit.missing, *fit.reshaped, *fit.whole]
    may_be = fit.entries and (not strict or all(n in head for n in left_out))
    surplus = [name for name in fit.unknown if strict and not (parents and name.startswith(parents))]
    if (not may_be and left_out) or surplus:
        raise ModelError(f"the weights in {where} do not fit {kind} ({fit.problems()}){advice}")
    given = {name: entry.value for name, entry in fit.entries.items() if name not in left_out}
    if not any(isinstance(value, Tensor) for value in given.values()) and own:
        raise ModelError(
            f"the weights in {where} do not fit {kind}: none of them has a name and a shape of the model's"
        )
    # Constants such as tables of indices keep the values that the module was built with.
    empty = [name for name in left_out if not _is_whole(own[name]) or own[name].is_quantized]
    for name in empty:
        if not isinstance(own[name], Tensor) or own[name].is_quantized:
            raise ModelError(f"the weights in {where} lack {name} of {kind}, which cannot be left out")
    # The module's own mapping also tells its layers in which version of their format the values are.
    state = module.state_dict()
    for name in list(state):
        if name in given:
            state[name] = given[name]
        else:
            del state[name]
    try:
        module.load_state_dict(state, strict=False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the weights in {where} do not fit {kind}: {error}") from error
    with torch.no_grad():
        for name in empty:
            own[name].fill_(torch.nan)
    notes = [f"read from {origin}" if (origin := fit.origin()) else ""]
    notes += [f"left out, not under this prefix: {_some(fit.outside)}" if fit.outside else ""]
    surplus = [*fit.unknown, *fit.reshaped, *fit.whole]
    notes += [f"left out: {_some(surplus)}" if surplus else ""]
    notes += [f"{_some(empty)} of the model are without values, and layers that need them are refused" if empty else ""]
    if any(notes):
        warnings.warn(f"weights of {where}: {'; '.join(note for note in notes if note)}", stacklevel=4)
    return tuple(empty)


def classes_of(fit: Fit, module: nn.Module) -> int | None:
    """The number of classes of a checkpoint that fits but for a head with another number of classes, or None."""
    if not fit.reshaped or fit.missing or fit.unknown or fit.whole:
        return None
    own = module.state_dict()
    pairs = [(own[name], fit.entries[name].value) for name in fit.reshaped]
    shapes = [(tuple(getattr(ours, "shape", ())), tuple(getattr(theirs, "shape", ()))) for ours, theirs in pairs]
    heads = {(ours[0], theirs[0]) for ours, theirs in shapes if ours and theirs and ours[1:] == theirs[1:]}
    same = all(ours and theirs and ours[1:] == theirs[1:] for ours, theirs in shapes)
    return next(iter(heads))[1] if same and len(heads) == 1 else None


def _fits(own: Collection[str], entries: Sequence[Entry], wrappers: Collection[str]) -> dict[Prefix, Fit]:
    """The values under every prefix under which a name of the module occurs, with wrappers taken out of all names."""
    names = {_plain(name.split("."), wrappers): name for name in own}
    fits: dict[Prefix, Fit] = {}
    for entry in entries:
        parts = entry.parts
        steps = [k for k, part in enumerate(parts) if part not in wrappers]
        for count, step in enumerate(steps):
            name = names.get(tuple(parts[k] for k in steps[count:]))
            if name is not None:
                fits.setdefault(parts[:step], Fit(parts[:step])).entries.setdefault(name, entry)
    return fits


def _compare(fit: Fit, own: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """List what does not fit."""
    fit.reshaped = [n for n in own if n in fit.entries and not _same_shape(fit.entries[n].value, own[n])]
    fit.whole = [
        n for n in own
        if n in fit.entries and n not in fit.reshaped and _is_whole(fit.entries[n].value) and not _is_whole(own[n])
    ]  # fmt: skip
    # Files may keep only one of two names of the same tensor.
    shared = {_address(own[name]) for name in fit.entries if name in own} - {None}
    fit.missing = [
        n for n in own
        if n not in fit.entries and n.rpartition(".")[2] != _UNUSED and _address(own[n]) not in shared
    ]  # fmt: skip
    mappings = {entry.keys for entry in fit.entries.values()} or {entry.keys for entry in entries}
    used = {id(entry) for entry in fit.entries.values()}
    for entry in entries:
        weight = isinstance(entry.value, Tensor) or entry.name.rpartition(".")[2] == "_extra_state"
        if entry.keys in mappings and id(entry) not in used and weight:
            inside = entry.parts[: len(fit.prefix)] == fit.prefix
            (fit.unknown if inside else fit.outside).append(
                ".".join(entry.parts[len(fit.prefix) :]) if inside else entry.name
            )


def _under(entries: Sequence[Entry], key: str, where: str) -> list[Entry]:
    if not key:
        return list(entries)
    start = tuple(key.split("."))
    under = [entry for entry in entries if tuple(".".join(entry.keys).split("."))[: len(start)] == start]
    if not under:
        known = sorted({".".join(entry.keys) for entry in entries if isinstance(entry.value, Tensor)} - {""})
        there = f"it has {', '.join(known[:20])}" if known else "its weights lie under no key"
        raise ModelError(f"{where} has no weights under key={key!r}{did_you_mean(key, known)}; {there}")
    return under


def _with_prefix(fits: Mapping[Prefix, Fit], prefix: str, entries: Sequence[Entry], where: str) -> dict[Prefix, Fit]:
    """The fits whose prefix ends with the given one; wrappers may be left out."""
    wanted = tuple(prefix.strip(".").split("."))
    plain = _plain(wanted, _WRAPPERS)

    def agrees(start: Prefix, keys: int) -> bool:
        shortened = _plain(start, _WRAPPERS)
        inner = start[keys:], start, _plain(start[keys:], _WRAPPERS), shortened
        return wanted in inner or (bool(plain) and plain in inner)

    agreeing = {start: fit for start, fit in fits.items() if agrees(start, len(next(iter(fit.entries.values())).keys))}
    if not agreeing:
        starts = sorted({f"{entry.name.partition('.')[0]}." for entry in entries if "." in entry.name})
        raise ModelError(
            f"{where} has no weights of the model under prefix={prefix!r}{did_you_mean(prefix, starts)}; names begin "
            f"with {', '.join(starts[:20])}"
        )
    return agreeing


def _plain(parts: Sequence[str], wrappers: Collection[str]) -> Prefix:
    return tuple(part for part in parts if part not in wrappers)


def _same_shape(one: Any, other: Any) -> bool:
    return getattr(one, "shape", None) == getattr(other, "shape", None)


def _same_values(one: Fit, other: Fit, own: Mapping[str, Any]) -> bool:
    if one.entries.keys() != other.entries.keys():
        return False
    pairs = [(one.entries[name].value, other.entries[name].value) for name in one.entries if name in own]
    return all(a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)) for a, b in pairs)


def _address(value: Any) -> tuple[int, Any] | None:
    """Where a tensor lies in memory; None for what has no place of its own."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel() or value.is_quantized:
        return None
    return value.data_ptr(), value.shape


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
