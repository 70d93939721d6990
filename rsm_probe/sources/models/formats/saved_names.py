"""Weights of transformers under the names of its files, which differ from those of its modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.sources.models.checkpoints import Entry

# Smaller mappings of a checkpoint are not the weights of the model.
_LEAST_SHARE = 0.5


def with_own_names(module: nn.Module, entries: Sequence[Entry]) -> list[Entry]:
    """Give weights that `save_pretrained` wrote the names of a module of transformers, by its own rules.

    Args:
        module: the module. It does not change.
        entries: the values of a checkpoint.

    Returns:
        The values of every mapping that is large enough for the module, under the module's names. Where shapes differ,
        a tensor without memory shows that of the checkpoint. Empty if the module is not of transformers, or has no such
        rules.
    """
    transformers = sys.modules.get("transformers")  # a module of it cannot exist before
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return []
    renamed: list[Entry] = []
    size = len(module.state_dict())
    for keys in dict.fromkeys(entry.keys for entry in entries):
        state = {e.name: e.value for e in entries if e.keys == keys and isinstance(e.value, Tensor)}
        if len(state) >= size * _LEAST_SHARE:
            renamed += [Entry(keys, name, value) for name, value in _converted(transformers, module, state).items()]
    return renamed


def _converted(transformers: Any, module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    with _silent(transformers), torch.random.fork_rng(devices=[]):  # missing weights would be drawn
        try:
            other, report = type(module).from_pretrained(
                None, config=module.config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
            )
        # A module may differ from what its configuration describes.
        except (AttributeError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError):
            return {}
    given = {name: value for name, value in other.state_dict().items() if name not in report["missing_keys"]}
    given |= {name: torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
    return given | {name: torch.empty(0) for name in report["unexpected_keys"]}


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without the library's report and progress bar: this project reports what does not fit."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
