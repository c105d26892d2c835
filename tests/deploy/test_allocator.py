"""Freed memory is kept: counted by the pages that the kernel has to hand out again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from hpcdistill.deploy.allocator import keep_freed_memory

FAULTS = """
import resource, sys
from hpcdistill.deploy.allocator import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
for number in range(40):
    bytearray(b"x") * (40 << 20)  # as large as the maps of a tile
    if number == 19:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment or None)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_pages_are_not_taken_anew() -> None:
    kept, few = faults("kept")
    assert kept == "True"
    _, many = faults("plain")
    assert few < many / 10


def test_who_has_settings_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not keep_freed_memory()
