"""How the C library hands out memory, for trainings on CPUs."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Let glibc keep the pages of freed feature maps instead of returning them to the system; True when it could.

    By default it maps every large tensor anew and the kernel zeroes its pages: two fifths of a super-resolution
    step's processor time. The process then keeps the most it has ever used, a twelfth more at its peak.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
