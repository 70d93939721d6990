"""All private names of PyTorch that this package uses, and the few public methods of its private classes.

Any release of PyTorch may remove them. No other module uses them, and each has a test in
`tests/probe/test_torch_internals.py` that reports the name and the PyTorch version, so that a failure shows what to
replace.
"""

from __future__ import annotations

import functools
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
# Includes instance normalisation.
NORMS_WITH_STATISTICS = nn.modules.batchnorm._NormBase
DROPOUTS = nn.modules.dropout._DropoutNd
POOLINGS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)

# The attribute of a compiled module that holds the plain one, and the name component that it adds.
COMPILED_FROM = "_orig_mod"
# The attribute of a compiled function that holds the plain one.
COMPILED_FUNCTION = "_torchdynamo_orig_callable"
# The module with which an exported program checks its inputs.
EXPORT_GUARDS = "_guards_fn"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is wrapped by `torch.compile` or compiled in place."""
    return hasattr(module, COMPILED_FROM) or module._compiled_call_impl is not None


def pre_hooks_of(module: nn.Module) -> Iterable[Any]:
    """All forward pre-hooks of a module."""
    return module._forward_pre_hooks.values()


def hooks_of(module: nn.Module) -> tuple[int, int]:
    """The numbers of forward hooks and forward pre-hooks of a module."""
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def in_backward() -> bool:
    """Whether this thread is in a backward pass, where checkpointed layers run again on their old batch."""
    return torch._C._current_graph_task_id() != -1


def exchange_what_modes_restore(first: TorchDispatchMode, second: TorchDispatchMode) -> None:
    """Exchanges what two active modes found on entry, and restore in the end: whether PyTorch was in a mode before."""
    for name in vars(first):
        if name.startswith("old_") and name.endswith("_flags"):  # lists, longer within a mode that was entered again
            of_first, of_second = getattr(first, name), getattr(second, name)
            of_first[0], of_second[0] = of_second[0], of_first[0]


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which all its views share."""
    return int(tensor.untyped_storage()._cdata)


def name_of(operation: Any) -> str:
    """The name of an operation in a dispatch mode, without the `aten` namespace."""
    if isinstance(operation, OpOverload):
        return str(operation._schema.name).removeprefix("aten::")
    return str(operation.name())  # a higher-order operator


def is_composite(operation: Any) -> bool:
    """Whether an operation is made of others, into which `operation.decompose` splits it."""
    composite = DispatchKey.CompositeImplicitAutograd
    try:
        return isinstance(operation, OpOverload) and operation.has_kernel_for_dispatch_key(composite)
    except RuntimeError:  # PyTorch 2.10 does not register some, such as aten::dim, before TorchScript is used
        return False


def returns_view(operation: Any) -> bool:
    """Whether an operation returns a view of its input and writes nothing, according to its schema."""
    alias = operation._schema.returns[0].alias_info if isinstance(operation, OpOverload) else None
    return alias is not None and not alias.is_write


def reads_values(operation: Any, args: Iterable[Any]) -> bool:
    """Whether an operation turns values of its operands into Python numbers or into the shape of its result."""
    tags = _tags(operation)
    if torch.Tag.dynamic_output_shape in tags and name_of(operation) == "index":
        return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args))
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


@functools.cache
def is_elementwise(operation: Any) -> bool:
    """Whether PyTorch tags an operation as elementwise, or the one whose in-place form it is: `mish_` has no tag."""
    if torch.Tag.pointwise in _tags(operation):
        return True
    namespace, _, name = str(operation._schema.name).partition("::") if isinstance(operation, OpOverload) else ("",) * 3
    if not name.endswith("_"):
        return False
    forms = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return torch.Tag.pointwise in _tags(getattr(forms, operation._schema.overload_name or "default", None))


@functools.cache
def _tags(operation: Any) -> frozenset[Any]:
    return frozenset(operation.tags) if isinstance(operation, OpOverload) else frozenset()
