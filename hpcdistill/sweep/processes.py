"""Processes of this host, by the numbers that a sweep's files have of them."""

from __future__ import annotations

START_S = 60.0  # between a time that was noted and the start of the process that it is about


def is_alive(process: int, started: float | None) -> bool:
    """Whether a process of this host runs, and is not a later one with the same number."""
    import psutil  # a third of the time that status takes to start, and runs of a cluster need none of it

    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or found.create_time() <= started + START_S
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # another user's


def parent_of(process: int) -> int | None:
    """The number of the process that started it; None when it is gone."""
    import psutil

    try:
        return int(psutil.Process(process).ppid())
    except psutil.Error:
        return None
