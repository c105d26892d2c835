"""Why the ranks of a run end, as one of them tells the others."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from torch.distributed import DistError

from hpcdistill.console import err

EXIT_STOPPED: Final = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command goes on from here


@dataclass(frozen=True)
class Failure:
    """Why the ranks end; the first that is published counts."""

    rank: int  # -1: nobody's own words
    host: str
    message: str
    code: int
    lost: Sequence[int] = ()  # ranks that cannot hear of it
    told: bool = True  # False: the store is gone, each rank speaks for itself

    def seen_by(self, rank: int) -> str:
        """The line for rank `rank` to print."""
        return self.message if self.rank in (-1, rank) else f"rank {self.rank} ({self.host}): {self.message}"


def leave_at_once(code: int) -> NoReturn:
    """End without the clean-up of torch.distributed, which would wait for ranks that are no more."""
    with contextlib.suppress(OSError, ValueError):
        err.show_cursor(True)  # a progress display hides it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether `error` comes out of torch.distributed: gloo raises plain RuntimeErrors."""
    if isinstance(error, DistError):
        return True
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
