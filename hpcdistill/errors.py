"""Errors a user can mend: one clear line that names the file or key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

# How commands end. The last two say that the same command goes on from the checkpoint: a job may requeue itself.
EXIT_CRASHED: Final = 1
EXIT_FAILED: Final = 1  # the command itself has done its work, but a run of it has failed
EXIT_USER_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, the shell's convention
EXIT_RANK_LOST: Final = 71  # EX_OSERR of sysexits.h: a rank, or a process that a run needs, died or hangs
EXIT_STOPPED: Final = 75  # EX_TEMPFAIL: stopped on request, and saved


class UserError(ValueError):
    """Something the user can mend; commands print its message as one line and end with `code`."""

    code: int = EXIT_USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # libraries quote over several lines; one is promised


class LostProcess(UserError):
    """A process that a run needs was killed or hangs; the same command goes on from the checkpoint."""

    code = EXIT_RANK_LOST


class Crowded(UserError):
    """What a run may not meet when it has the process to itself: beside others it is tried once more, alone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on a CPU or torch on a GPU had no memory left."""
    name, words = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "DefaultCPUAllocator" in words


def plural(count: int, noun: str, several: str = "") -> str:
    """`1 image`, `2 images`: a number with its noun, which takes an s in the plural unless `several` is it."""
    return f"{count} {noun}" if count == 1 else f"{count} {several or noun + 's'}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: `did you mean 'x'?`, or the valid names when none is close, or that none is."""
    names = sorted(valid)
    if not names:
        return "there is none to choose"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"
