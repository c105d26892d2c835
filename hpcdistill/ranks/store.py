"""What the ranks tell one another beside their collective calls: keys in the store of their rendezvous."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final, NoReturn

from torch._C._distributed_c10d import Store

from hpcdistill.console import err

STORE_ERRORS: Final = (RuntimeError,)  # torch's DistError is one
_STORE_LIMIT: Final = timedelta(seconds=20)


@dataclass(frozen=True)
class Failure:
    """Why the ranks end; the first that is published counts."""

    rank: int  # -1: nobody's own words
    host: str
    message: str
    code: int
    lost: Sequence[int] = ()  # ranks that cannot hear of it
    published: bool = True  # False: the store is gone, each rank speaks for itself

    def seen_by(self, rank: int) -> str:
        """The line for rank `rank` to print."""
        return self.message if self.rank in (-1, rank) else f"rank {self.rank} ({self.host}): {self.message}"


class RankStore:
    """torch's `store` with text values; it must be a client that nothing else uses.

    Every call may raise STORE_ERRORS: the store is gone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        store.set_timeout(_STORE_LIMIT)
        self._lock = threading.Lock()

    def set(self, key: str, value: str = "1") -> None:
        with self._lock:
            self._store.set(key, value)

    def get(self, key: str) -> str:
        """Its value, waiting for it for some seconds."""
        with self._lock:
            content: bytes = self._store.get(key)
            return content.decode()

    def has(self, *keys: str) -> bool:
        """Whether all of them have been set."""
        with self._lock:
            return bool(self._store.check(list(keys)))

    def wait(self, keys: Iterable[str], seconds: float) -> None:
        """Return when all have been set, or so much later."""
        wanted, end = list(keys), time.monotonic() + seconds
        while wanted and time.monotonic() < end and not self.has(*wanted):
            time.sleep(0.05)

    def publish(self, failure: Failure) -> Failure:
        """Publish why the ranks end; returns what counts, the first that was published.

        What fails afterwards is probably a consequence.
        """
        with self._lock:
            found: bytes = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        return Failure(**json.loads(found))

    def failure(self, seconds: float = 0.0) -> Failure | None:
        """What has been published, waiting for it at most so long."""
        end = time.monotonic() + seconds
        while not self.has("failure"):
            if time.monotonic() >= end:
                return None
            time.sleep(0.2)
        return Failure(**json.loads(self.get("failure")))


def leave_at_once(code: int) -> NoReturn:
    """End without the clean-up of torch.distributed, which would wait for ranks that are no more."""
    with contextlib.suppress(OSError, ValueError):
        err.show_cursor(True)  # a progress display hides it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
