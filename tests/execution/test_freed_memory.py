"""Memory that was freed is used again, without the system clearing its pages."""

import platform
import subprocess
import sys

import pytest

LOOP = """
import resource
from rsm_probe.execution.freed_memory import keep_freed_memory
kept = {keep}
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(25_000_000)  # 100 MB, about 24,000 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    faults()  # until free blocks of the right size lie in the heap
print(kept, faults())
"""


def measured(keep: str) -> tuple[str, int]:
    code = LOOP.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_blocks_that_were_freed_are_used_again():
    kept, few = measured("keep_freed_memory()")
    _, many = measured("None")
    assert kept == "True"
    assert few < many / 10


def test_other_systems_are_left_as_they_are(monkeypatch):
    from rsm_probe.execution.freed_memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
