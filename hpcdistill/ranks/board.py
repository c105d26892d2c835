"""What the ranks tell one another beside their collective calls: keys of the store by which they met."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from typing import Final

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from hpcdistill.ranks.failure import Failure

STORE_ERRORS: Final = (DistError, RuntimeError)
_STORE_LIMIT: Final = timedelta(seconds=20)


class Board:
    """The keys; `store` must be a client that nothing else uses. Every call may raise STORE_ERRORS: it is gone."""

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

    def await_all(self, keys: Iterable[str], seconds: float) -> None:
        """Return when all have been set, or so much later."""
        wanted, end = list(keys), time.monotonic() + seconds
        while wanted and time.monotonic() < end and not self.has(*wanted):
            time.sleep(0.05)

    def publish(self, failure: Failure) -> Failure:
        """The first words count: what fails afterwards is probably a consequence. Those that count."""
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
