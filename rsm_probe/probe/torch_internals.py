"""Every private name of PyTorch that this package uses, and the few public methods of its private classes.

A release of PyTorch may take any of them away. Each has a test in `tests/probe/test_torch_internals.py` that names it
together with the version of PyTorch, so that a failure says at once what has to be replaced. No other module touches
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as unobserved
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map", "unobserved"]

CONVOLUTIONS = nn.modules.conv._ConvNd
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
# Also instance normalisation.
NORMS_WITH_STATISTICS = nn.modules.batchnorm._NormBase
DROPOUTS = nn.modules.dropout._DropoutNd
POOLINGS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)

# The attribute in which a compiled module holds the plain one, and the name component that it adds.
COMPILED_FROM = "_orig_mod"
# The module by which an exported program checks its inputs.
EXPORT_GUARDS = "_guards_fn"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is wrapped by `torch.compile` or was compiled in place."""
    return hasattr(module, COMPILED_FROM) or module._compiled_call_impl is not None


def pre_hooks_of(module: nn.Module) -> Iterable[Any]:
    """The forward pre-hooks that anybody has registered on a module."""
    return module._forward_pre_hooks.values()


def in_backward() -> bool:
    """Whether a backward pass runs in this thread: checkpointed layers run again in it, on the batch that they had."""
    return torch._C._current_graph_task_id() != -1


def storage_of(tensor: Tensor) -> int:
    """A number that identifies the memory of a tensor: all its views share it."""
    return int(tensor.untyped_storage()._cdata)


def name_of(operation: Any) -> str:
    """The name of an operation as a dispatch mode sees it, without the namespace of PyTorch's own."""
    if isinstance(operation, OpOverload):
        return str(operation._schema.name).removeprefix("aten::")
    return str(operation.name())  # a higher-order operator


def is_composite(operation: Any) -> bool:
    """Whether an operation consists of others, into which `operation.decompose` takes it apart."""
    composite = DispatchKey.CompositeImplicitAutograd
    return isinstance(operation, OpOverload) and operation.has_kernel_for_dispatch_key(composite)


def returns_view(operation: Any) -> bool:
    """Whether an operation returns a view of its input, as its schema declares, and writes nothing."""
    alias = operation._schema.returns[0].alias_info if isinstance(operation, OpOverload) else None
    return alias is not None and not alias.is_write


def is_elementwise(operation: Any) -> bool:
    """Whether PyTorch tags an operation as computing element by element."""
    return isinstance(operation, OpOverload) and torch.Tag.pointwise in operation.tags
