"""Keeping freed memory: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from hpcdistill.training.accelerator import keep_freed_memory
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
before = faults()
for _ in range(10):
    torch.ones(16_000_000)
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_reuse_their_pages() -> None:
    # 10 tensors of 64 MB, more than glibc ever keeps by itself: 156,250 pages of 4 KiB when each is mapped anew.
    kept, default = page_faults("kept"), page_faults("default")
    assert kept < 100
    assert default > 10 * max(kept, 1)
