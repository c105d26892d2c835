"""Memory that a network frees and takes again in the next layer: kept, where the C library would give it back.

glibc returns blocks as large as feature maps to the kernel, which then clears each page anew: a quarter of what the x4
student takes on a CPU (docs/results/latency.md). For programs of ours only: how a process keeps memory is its owner's
business.
"""

from __future__ import annotations

import ctypes
import os

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
KEPT = 256 << 20  # bytes of free memory at the heap's end
_BLOCKS = (64 << 20, 32 << 20)  # bytes: a tile's largest map of FSRCNN has 62 MB; older versions of glibc take 32 MiB


def keep_freed_memory() -> bool:
    """Have this process keep what it frees; False where it has no glibc, or its user has set MALLOC_* otherwise."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have none, Windows takes no None
        return False
    return bool(mallopt(_TRIM, KEPT)) and any(mallopt(_MMAP, size) for size in _BLOCKS)
