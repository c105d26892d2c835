"""Keeping freed memory: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from hpcdistill.training.accelerator import keep_freed_memory
def faults():
    for _ in range(10):
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
default = faults()
assert keep_freed_memory()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_reuse_their_pages() -> None:
    # 10 tensors of 64 MB, more than glibc ever keeps by itself: 156,250 pages of 4 KiB when each is mapped anew.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    default, kept = map(int, done.stdout.split())
    assert kept < 100
    assert default > 10 * max(kept, 1)
