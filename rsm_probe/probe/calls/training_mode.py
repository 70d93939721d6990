"""Finds modules whose output or state depends on training mode."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from torch import nn

from rsm_probe.probe.torch_internals import DROPOUTS, NORMS_WITH_STATISTICS, pre_hooks_of

# Attributes that set the strength of random changes in training: drop_prob, attention_dropout, layerdrop, noise_std, p.
_RATE = re.compile(r"drop|prob|rate|noise|^p$")
# PyTorch's own classes, each with a rule for whether training mode changes a module.
_RULES: tuple[tuple[Any, Callable[[Any], bool]], ...] = (
    (NORMS_WITH_STATISTICS, lambda norm: norm.track_running_stats),
    (DROPOUTS, lambda dropout: dropout.p > 0),
    (nn.RReLU, lambda slopes: slopes.lower < slopes.upper),
    (nn.MultiheadAttention, lambda attention: attention.dropout > 0),
    (nn.RNNBase, lambda recurrent: recurrent.dropout > 0 and recurrent.num_layers > 1),
)


def changed_by_training(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The named modules that compute differently, or update their state, in training mode.

    PyTorch's own classes follow fixed rules: normalisation by running statistics, dropout, randomised slopes. Any other
    class counts if its forward reads `self.training`, unless all its rates are zero.
    """
    reads_training: Callable[[type, str], bool] = functools.cache(_reads_training)

    def changes(module: nn.Module) -> bool:
        for kinds, rule in _RULES:
            if isinstance(module, kinds):
                return bool(rule(module))
        if any(reads_training(type(hook), "__call__") for hook in pre_hooks_of(module)):
            return True
        return reads_training(type(module), "forward") and any(rate > 0 for rate in _rates(module) or [1.0])

    return [(name, module) for name, module in modules if changes(module)]


def _rates(module: nn.Module) -> list[float]:
    """The rates of random changes in training, from a module's attributes, else from its configuration."""

    def numbers(holder: Any) -> list[float]:
        return [
            float(value)
            for name, value in getattr(holder, "__dict__", {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and _RATE.search(name)
        ]

    dropouts = [float(child.p) for child in module.children() if isinstance(child, DROPOUTS)]
    return dropouts + numbers(module) or numbers(getattr(module, "config", None))


def _reads_training(kind: type, method: str) -> bool:
    """Whether a method of a class, or a method that it calls, mentions `training`."""
    todo, seen = [method], set[str]()
    own = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn.modules.")]
    while todo:
        name = todo.pop()
        seen.add(name)
        for base in own:
            code = getattr(inspect.unwrap(vars(base).get(name, None)), "__code__", None)
            mentioned = _names(code) if code is not None else set()
            if "training" in mentioned:
                return True
            todo += [
                other
                for other in mentioned - seen
                if not hasattr(nn.Module, other) and any(inspect.isfunction(vars(b).get(other)) for b in own)
            ]
    return False


def _names(code: CodeType) -> set[str]:
    """The names that a function and its inner functions mention."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
