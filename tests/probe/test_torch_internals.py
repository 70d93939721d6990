"""A canary for every private name of PyTorch that is used: a failure says which version of PyTorch took it away."""

import ast
import contextlib
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from torch import nn

NAMES = [
    "torch._C.DispatchKey.CompositeImplicitAutograd",
    "torch._C._current_graph_task_id",
    "torch._ops.OpOverload.decompose",
    "torch._ops.OpOverload.has_kernel_for_dispatch_key",
    "torch._ops.OpOverload.tags",
    "torch._ops.HigherOrderOperator.name",
    "torch.Tag.pointwise",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.nn.Module._compiled_call_impl",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.modules.pooling._MaxPoolNd",
    "torch.nn.modules.pooling._AvgPoolNd",
    "torch.nn.modules.pooling._AdaptiveMaxPoolNd",
    "torch.nn.modules.pooling._AdaptiveAvgPoolNd",
]
aten = torch.ops.aten


def resolved(name):
    module, _, rest = name.partition(".")
    value = import_module(module)
    for part in rest.split("."):
        if not hasattr(value, part) and inspect.ismodule(value):
            import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_name_is_still_there(name):
    try:
        resolved(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"PyTorch {torch.__version__} took {name} away: {error}; see rsm_probe/probe/torch_internals.py")


def attributes():
    """Private attributes of objects that PyTorch makes, by where they are looked for."""
    return {
        "_forward_hooks": nn.Identity(),
        "_forward_pre_hooks": nn.Identity(),
        "_cdata": torch.zeros(1).untyped_storage(),
        "_schema": aten.add.Tensor,
        "_orig_mod": torch.compile(nn.Identity()),
        "_compiled_call_impl": nn.Identity(),
        "_torchdynamo_orig_callable": torch.compile(lambda x: x),
    }


@pytest.mark.parametrize("name", attributes())
def test_attribute_is_still_there(name):
    holder = attributes()[name]
    assert hasattr(holder, name), f"PyTorch {torch.__version__} took {name} of {type(holder).__name__} away"


def test_the_guards_of_an_exported_program_are_still_called_so():
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)).module()
    called = {node.target for node in exported.graph.nodes if node.op == "call_module"}
    assert called <= {"_guards_fn"}, f"PyTorch {torch.__version__} calls the guards of exported programs {called}"


def test_every_private_name_has_a_canary():
    from rsm_probe.probe import torch_internals

    tree = ast.parse(inspect.getsource(torch_internals))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used |= {part for node in imported for part in (*node.module.split("."), *(alias.name for alias in node.names))}
    tested = {part for name in NAMES for part in name.split(".")} | attributes().keys()
    assert {name for name in used if name.startswith("_") and not name.endswith("__")} <= tested


def test_what_the_names_are_used_for():
    from rsm_probe.probe import torch_internals as internals

    x = torch.arange(6.0)
    assert internals.storage_of(x) == internals.storage_of(x.view(2, 3)) != internals.storage_of(x.clone())
    assert internals.name_of(aten.add_.Tensor) == "add_"
    assert [internals.returns_view(o) for o in (aten.view.default, aten.add_.Tensor, aten.add.Tensor)] == [True, 0, 0]
    assert [internals.is_composite(o) for o in (aten.linear.default, aten.mm.default)] == [True, False]
    assert [internals.is_elementwise(o) for o in (aten.relu.default, aten.mm.default)] == [True, False]
    layer = nn.ReLU()
    handle = layer.register_forward_pre_hook(hook := lambda module, args: None)
    assert list(internals.pre_hooks_of(layer)) == [hook]
    handle.remove()
    assert [internals.is_compiled(module) for module in (layer, torch.compile(layer))] == [False, True]
    layer.compile()
    assert internals.is_compiled(layer)


def test_a_backward_pass_is_noticed():
    from rsm_probe.probe.torch_internals import in_backward

    x = torch.ones(1, requires_grad=True)
    within = []
    x.register_hook(lambda gradient: within.append(in_backward()))
    (2 * x).sum().backward()
    assert [*within, in_backward()] == [True, False]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_pytorch_is_in_no_mode_after_those_of_several_threads(order):
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    from rsm_probe.probe.tracing.dispatch_modes import PassMode

    modes = [PassMode() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in modes]
        for thread, mode in zip(threads, modes, strict=True):
            thread.submit(mode.begin).result()
        for number in order:
            assert is_in_torch_dispatch_mode()
            threads[number].submit(modes[number].end).result()
    assert not is_in_torch_dispatch_mode(), f"PyTorch {torch.__version__} notes elsewhere that it is in a mode"


def test_operations_can_be_hidden_from_modes():
    from rsm_probe.probe.torch_internals import TorchDispatchMode, unobserved

    class Listening(TorchDispatchMode):
        heard = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.heard += 1
            return func(*args, **(kwargs or {}))

    with Listening() as mode:
        torch.ones(1)
        before = mode.heard
        with unobserved():
            torch.ones(1)
    assert before == mode.heard == 1
