"""What probes captured, model by model and layer by layer, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

from rsm_probe.arrays import real_tensor
from rsm_probe.checks import require_text
from rsm_probe.errors import CostError, LayerError, MatchingError, RepresentationError
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation

# Representations, or what a probe's `reduce` made of them.
Layers = Probe | Mapping[str, Any]
Probed = Layers | Mapping[str, Layers]


def walk(probed: Probed, reduced: type | None = None) -> list[tuple[str, str, Any]]:
    """(model, layer, representation) of everything that was captured; or what a probe's `reduce` made of each.

    Args:
        probed: a probe or what it holds, whose model is then called "model"; or model name -> these.
        reduced: what `reduce` makes of a representation.

    Raises:
        LayerError: nothing was captured; neither probes nor mappings by name.
        RepresentationError: an entry is not a representation, or its tokens are not real numbers (N, S, C).
    """
    found = []
    for model, part in _by_model(probed).items():
        representations = part.representations if isinstance(part, Probe) else part
        if not representations:
            raise LayerError(
                f"model {model!r} captured nothing; call the model inside the 'with' block before updating (a layer "
                f"that runs outside of the model's forward, as in encode_image(), empties its probe)"
            )
        for layer, kept in representations.items():
            require_text(layer, f"the name of a layer of model {model!r}", LayerError)
            found.append((model, layer, _checked(model, layer, kept, reduced)))
    return found


def _by_model(probed: Probed) -> Mapping[str, Layers]:
    if isinstance(probed, Probe):
        return {"model": probed}
    if not isinstance(probed, Mapping):
        raise LayerError(
            f"give a Probe after a forward pass, its representations, or model name -> one of these; found "
            f"{type(probed).__name__}"
        )
    if not probed:
        raise LayerError("there is nothing to take up: no model was given")
    if not all(isinstance(part, Probe | Mapping) for part in probed.values()):
        return {"model": probed}
    for name in probed:
        require_text(name, "the name of a model", LayerError)
    return probed


def _checked(model: str, layer: str, kept: Any, reduced: type | None) -> Any:
    if reduced is not None and isinstance(kept, reduced):
        return kept
    where = f"layer {layer!r} of model {model!r}"
    if not isinstance(kept, Representation):
        raise RepresentationError(
            f"{where} holds {type(kept).__name__} where a Representation belongs; give the Probe itself, and as its "
            f"reduce= nothing but the reducer of what is updated"
        )
    tokens = real_tensor(kept.tokens, f"{where}: tokens", RepresentationError)
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise RepresentationError(
            f"{where}: tokens must have shape (images, locations, channels), found {tuple(tokens.shape)}"
        )
    return replace(kept, tokens=tokens)


def require_one_batch(counts: Sequence[tuple[str, str, int]], ids: Sequence[str], labels: Sequence[str] = ()) -> int:
    """The number of images in a batch, on which all layers and names agree.

    Args:
        counts: (model, layer, number of images).
        ids: names of the images, or none.
        labels: their labels, or none.

    Raises:
        RepresentationError: they do not agree.
    """
    count = counts[0][2]
    for what, names in (("ids", ids), ("labels", labels)):
        if len(names) not in (0, count):
            raise RepresentationError(f"{what} holds {len(names)} names for a batch of {count} images")
    for model, layer, found in counts:
        if found != count:
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} holds {found} images, others {count}; "
                f"all models must see the same batch"
            )
    return count


class TakenPasses:
    """The last pass of each probe that was taken, also where what it held was given: every pass counts once."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Probe, int] = WeakKeyDictionary()
        self._held: list[ref[Representation]] = []

    def require_new(self, probed: Probed) -> None:
        """Refuses probes that still hold the pass that was taken last.

        Raises:
            LayerError: names the model.
        """
        taken = {id(kept) for held in self._held if (kept := held()) is not None}
        for model, part in _by_model(probed).items():
            if (isinstance(part, Probe) and self._last.get(part) == part.passes) or taken & set(map(id, _held(part))):
                raise LayerError(
                    f"the pass that the probe of model {model!r} holds was taken already; call the model on the next "
                    f"batch before updating"
                )

    def take(self, probed: Probed) -> None:
        """Remembers the passes that probes hold now."""
        parts = _by_model(probed).values()
        self._held = [ref(kept) for part in parts for kept in _held(part) if isinstance(kept, Representation)]
        for part in parts:
            if isinstance(part, Probe):
                self._last[part] = part.passes


def _held(part: Layers) -> Iterable[Any]:
    return (part.representations if isinstance(part, Probe) else part).values()


@contextmanager
def naming(model: str, layer: str) -> Iterator[None]:
    """Adds model and layer to what matching says is wrong.

    Raises:
        MatchingError: what was raised within.
        CostError: what was raised within.
    """
    try:
        yield
    except (MatchingError, CostError) as error:
        raise type(error)(f"layer {layer!r} of model {model!r}: {error}") from error
