"""Shared by all tests: bounded threads, small networks."""

import os
from collections.abc import Callable
from pathlib import Path

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


# The files that take longest come first: at the end, one process would have nothing else to do.
LONGEST = [
    "test_spread_sweeps.py", "test_tutorials.py", "test_documents.py", "test_on_device.py", "test_experiments.py",
    "test_allpairs.py", "test_cli.py", "test_device.py", "test_nearest.py", "test_continued_pairs.py", "test_simd.py",
]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Has pytest-xdist, where it is used, keep the order of the files; by itself it begins with those of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def memory_is(monkeypatch) -> Callable[..., None]:
    """A function that sets the bytes free to the system, in a container and under a limit; None where none is known."""
    resource = pytest.importorskip("resource")
    read, ask = Path.read_text, os.sysconf
    answers: dict[str, str] = {}

    def read_text(path: Path, *arguments, **options) -> str:
        if str(path) in answers:
            return answers[str(path)]
        if path.parts[1:3] in (("proc", "meminfo"), ("sys", "fs")):
            raise FileNotFoundError(path)
        return read(path, *arguments, **options)

    def sysconf(name: str) -> int:
        if name == "SC_PHYS_PAGES":
            raise ValueError(name)
        return ask(name)

    def set_free(system: int | None = None, container: int | None = None, limit: int | None = None) -> None:
        answers.clear()
        if system is not None:
            answers["/proc/meminfo"] = f"MemTotal: 9999999999 kB\nMemAvailable: {system >> 10} kB\n"
        if container is not None:
            group = "/sys/fs/cgroup/memory."
            answers.update({f"{group}max": str(container + 7), f"{group}current": "10"})
            answers[f"{group}stat"] = "anon 5\ninactive_file 3\n"
        allowed = resource.RLIM_INFINITY
        if limit is not None:
            answers["/proc/self/statm"] = "2 1 1 1 0 1 0"
            allowed = limit + 2 * resource.getpagesize()
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(os, "sysconf", sysconf)

    return set_free


@pytest.fixture
def small_resnet() -> nn.Module:
    """A ResNet of four stages with one block each and random weights: 32 x 32 images give S = 256, 64, 16, 4."""
    from rsm_probe.sources import NetworkConfig, build_network

    torch.manual_seed(0)
    return build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
