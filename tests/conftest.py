"""Shared by all tests: bounded threads, small networks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

# Without a device, its kernels run in Triton's interpreter, which must be known before they are loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The networks are tiny: more threads gain nothing, and lose much where other work shares the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: they take minutes, for which one process would have nothing else to do at the end."""
    items.sort(key=lambda item: item.path.name != "test_documents.py")


@pytest.fixture
def small_resnet() -> nn.Module:
    """A ResNet of four stages with one block each and random weights: 32 x 32 images give S = 256, 64, 16, 4."""
    from rsm_probe.sources.training.train import NetworkConfig, build_network

    torch.manual_seed(0)
    return build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
