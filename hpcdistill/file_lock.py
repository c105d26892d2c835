"""The lock between processes that all of the package uses: POSIX byte locks (`fcntl.lockf`) on a file of their own.

The system gives such a lock up with its process, however that ends: none is ever stale. It reaches the other nodes that
mount the file system as far as that passes locks on. Who uses it, and for what:

- `data.fetch.disk.exclusive`, to fetch or pack a file once: waits, and goes on with a warning where there are no locks;
- `data.read.staging`, on two bytes: one process copies a set, many use it. Refuses where there are no locks;
- `sweep.submit`, so that two submissions do not submit the same runs: refuses at once;
- `training.lock`, for the moment in which lock.json is replaced. lock.json itself is no such lock: it has to name its
  holder, and to hold and be taken over where the nodes of a cluster share no locks.

Not the library filelock: it has no lock on a part of a file, nor a shared one, which staging needs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hpcdistill.console import say

NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Lustre mounted without `flock`, some NFS servers
_LONGEST_PAUSE: Final = 0.2  # seconds between two looks at a lock that another process holds

# A POSIX lock is the process's: threads of one process need one of their own.
_threads: dict[str, threading.Lock] = {}
_threads_lock = threading.Lock()


def try_lock(file: int, byte: int = 0, *, shared: bool = False) -> bool:
    """Lock one byte of an open file; False while another process holds it. OSError, as of NO_LOCKS, is passed on.

    Closing any handle of the file gives up all locks that the process has on it.
    """
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EPERM is another thing: some file systems refuse all locks
            return False
        raise
    return True


def unlock(file: int, byte: int = 0) -> None:
    """Give up the lock on one byte of an open file."""
    fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


def is_at(path: Path, file: int) -> bool:
    """Whether the open file is still the one at `path`. A holder may have removed it: a lock on it is worthless."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, seconds: float = 0.0, waiting: str = "", *, remove: bool = False) -> Iterator[bool | None]:
    """Try for `seconds` to hold the file `path`, made where it is missing, alone among all threads and processes.

    Yields True while it is held, False when another holds it, None where the file system has no locks. `waiting` is
    said when there is somebody to wait for; `remove`: the file goes at the end. OSError when it cannot be made.
    """
    with _threads_lock:
        thread = _threads.setdefault(str(path.absolute()), threading.Lock())
    end = time.monotonic() + seconds
    if not thread.acquire(blocking=False):
        if waiting:
            say(waiting)
        if not thread.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            yield False
            return
    try:
        file, held = _lock(path, end, waiting)
        try:
            yield held
        finally:
            if remove and held is not False:
                path.unlink(missing_ok=True)  # still held: who waits for this file sees that it is gone
            os.close(file)
    finally:
        thread.release()


def _lock(path: Path, end: float, waiting: str) -> tuple[int, bool | None]:
    pause = 0.002
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not try_lock(file):  # not one waiting call, which no signal could end
                if waiting:
                    say(waiting)
                    waiting = ""
                if time.monotonic() >= end:
                    return file, False
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            if is_at(path, file):
                return file, True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file, None
            os.close(file)
            raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the lock of nothing: make the file anew


def _forked() -> None:
    """A child has none of its parent's file locks, so it must not keep those of its threads either."""
    global _threads_lock
    _threads.clear()
    _threads_lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)
