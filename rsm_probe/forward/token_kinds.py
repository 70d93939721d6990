"""Which vectors of a layer are compared: its locations, its class token, or one vector pooled over locations.

For another kind, add an entry to `TOKEN_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from rsm_probe.errors import LayerError, did_you_mean, repeated
from rsm_probe.probe.representation import Representation

# Exponent of generalised-mean pooling (Radenovic et al., 2019), and the smallest value that it takes.
_GEM_POWER, _GEM_SMALLEST = 3.0, 1e-6
# Stands between the name of a layer and that of a kind: `blocks.3@class`.
SEPARATOR = "@"


def has_class_token(module: nn.Module) -> bool:
    """Whether the first token beside the locations is a class token, unless the model says that all are registers."""
    kinds = [part.cls_token for part in module.modules() if hasattr(part, "cls_token") and hasattr(part, "reg_token")]
    return not kinds or any(kind is not None for kind in kinds)


def _class_token(representation: Representation) -> Tensor:
    if not representation.prefix.shape[1]:
        raise LayerError("it has no class token; use tokens='mean' or 'locations', or probe other layers")
    return representation.prefix[:, :1]


def _gem(representation: Representation) -> Tensor:
    powers = representation.tokens.clamp(min=_GEM_SMALLEST).pow(_GEM_POWER)
    return powers.mean(dim=1, keepdim=True).pow(1 / _GEM_POWER)


# The kind of a layer's class token.
CLASS = "class"
# Name -> function of a representation of S locations, which returns vectors (N, 1, C).
TOKEN_KINDS: dict[str, Callable[[Representation], Tensor]] = {
    CLASS: _class_token,
    "mean": lambda representation: representation.tokens.mean(dim=1, keepdim=True),
    "max": lambda representation: representation.tokens.amax(dim=1, keepdim=True),
    "gem": _gem,
}
LOCATIONS = "locations"


def token_kinds(tokens: str | Sequence[str] | None) -> tuple[str, ...]:
    """Check names of kinds of tokens, and return them in the order given; None stands for locations.

    Raises:
        LayerError: a kind is unknown or named twice, or none is named.
    """
    kinds = (LOCATIONS,) if tokens is None else (tokens,) if isinstance(tokens, str) else tuple(tokens)
    known = (LOCATIONS, *TOKEN_KINDS)
    for kind in kinds:
        if kind not in known:
            raise LayerError(f"unknown tokens {kind!r}{did_you_mean(kind, known)}; tokens are: {', '.join(known)}")
    if not kinds or (twice := repeated(kinds)) is not None:
        raise LayerError("tokens= names no kind" if not kinds else f"tokens= names {twice!r} twice")
    return kinds


def of_kind(representation: Representation, kind: str) -> Representation:
    """The representation that a kind of tokens makes of a layer.

    Raises:
        LayerError: the layer has no such tokens.
    """
    if kind == LOCATIONS:
        return representation
    return Representation(TOKEN_KINDS[kind](representation), representation.prefix[:, :0], None, representation.input)


def kind_name(layer: str, kind: str) -> str:
    """The name in results of a layer read as a kind of tokens: `blocks.3`, `blocks.3@class`."""
    return layer if kind == LOCATIONS else f"{layer}{SEPARATOR}{kind}"
