"""What big files ask of a disk: room checked beforehand, one writer at a time, one clear line when it fails."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpcdistill.console import warn
from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError
from hpcdistill.file_lock import locked


def check_space(folder: Path, needed: int, what: str) -> None:
    """UserError when the file system of `folder` (or of the nearest parent that exists) has not `needed` bytes free."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {megabytes(needed)}, {megabytes(free)} are free; free some space or choose a "
            "folder on another disk"
        )


def cannot_write(path: Path, error: OSError, kept: str = "") -> UserError:
    """The one line for an `error` while `path` was written; `kept` says what is left for the next try."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return UserError(f"{path}: {problem}; free some space and run the same command again{kept}")
    if error.errno == errno.EFBIG:
        return UserError(f"{path}: the file is larger than this file system or `ulimit -f` allows; choose another disk")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: a file stands where a folder is needed; choose another folder")
    reason = error.strerror or type(error).__name__
    return UserError(f"{path}: cannot be written ({reason}); choose a folder that this machine and user may write to")


@contextmanager
def exclusive(lock: Path, waiting: str) -> Iterator[None]:
    """Hold the file `lock`, alone among all threads and processes; say `waiting` when another holds it, and wait.

    The file is removed at the end. UserError when it cannot be written.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(locked(lock, math.inf, waiting, remove=True))
        except OSError as error:
            raise cannot_write(lock.parent, error) from None
        if held is None:
            warn(f"{lock.parent}: this file system has no locks; do not fetch the same file twice at once")
        yield


def sync_filesystem(folder: Path) -> None:
    """Flush all that was written to the file system of `folder`: one call where 50,000 files would need as many."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            os.sync()
    except AttributeError:  # not Linux
        os.sync()
    finally:
        os.close(handle)
