"""Staging: a packed data set on node-local scratch, copied and verified once a node.

A staged set is the folder `<recipe>-<split>-<12 hex digits of the index digest>` with the shards and, written last, an
index.json with the bytes of the source's. `.staged.json` holds the size and modification time that each shard had when
its sha256 was right: while both are the same, the shard is not read again. Of `.staged.lock`, the one process that
copies locks the first byte; each process that uses the set locks the second byte until it ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.location import Stopped, called, copy_shard, index_at, index_content, is_remote, is_whole
from hpcdistill.data.index import INDEX_NAME, SHARD_NAME, Index, Shard
from hpcdistill.data.outputs import check_apart
from hpcdistill.data.progress import ProgressBar, megabytes
from hpcdistill.errors import UserError
from hpcdistill.file_lock import NO_LOCKS, is_at, try_lock, unlock
from hpcdistill.storage import parse_json, write_bytes, write_json

MARKER = ".staged.json"
LOCK = ".staged.lock"

_THREADS = 4
_COPYING, _IN_USE = 0, 1  # bytes of the lock file
_LOOK = 0.2  # seconds between two looks at a lock that another process holds
_REMEDY = "choose another folder (data.stage=DIR, or --to DIR), or read the data where they are"
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space (the shards that are whole are kept)",
    errno.EDQUOT: "the disk quota is used up; free some space (the shards that are whole are kept)",
    errno.EROFS: "is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "is a file, not a folder",
    errno.ENOTDIR: "is a file, not a folder",
    **dict.fromkeys(NO_LOCKS, "its file system has no locks"),
}

Stamp = tuple[int, int]  # size and modification time in ns of a shard that was verified


@dataclass(frozen=True)
class _Marker:
    """What `.staged.json` says."""

    index: str  # digest of the index that the shards are of
    shards: dict[str, Stamp | None]  # by name; None before the shard was verified


_MARKER: TypeAdapter[_Marker] = TypeAdapter(_Marker)
_HELD: dict[Path, TextIO] = {}  # the lock files of the sets that this process uses
_ONE_THREAD = threading.Lock()  # a file lock is the process's, it keeps no thread out


class StagingStopped(Exception):
    """The caller asked to stop; the shards that are whole are kept."""


def stage(place: str, scratch: Path, stopping: Callable[[], bool] = lambda: False) -> Path:
    """Copy the packed data set at `place`, a folder or an http(s) address, to `scratch`; returns the copy's folder.

    Of several processes one copies, the others wait and find the set whole. What is there and intact is not copied
    again, what is damaged is; a copy that was stopped or killed goes on. This process counts as a user of the set, so
    that `clean` leaves it, until it ends or calls `release`. Raises UserError when the source cannot be read or has
    other bytes than its index says, and when `scratch` cannot be written or has no room; StagingStopped soon after
    `stopping` has become true.
    """
    if not is_remote(place):
        check_apart(scratch, [Path(place)], "the data set itself", "staging to")
    index = index_at(place)
    content = index_content(place)
    digest = hashlib.sha256(content).hexdigest()
    folder = scratch / f"{index.recipe}-{index.split}-{digest[:12]}"
    try:
        with _ONE_THREAD, _exclusive(folder, stopping):
            known = _verified_stamps(folder, digest)
            suspects = [shard for shard in index.shards if not _is_unchanged(folder / shard.name, known)]
            if suspects or not _holds(folder / INDEX_NAME, content):
                _complete(place, folder, index, digest, suspects, stopping)
                write_bytes(folder / INDEX_NAME, content)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"cannot be used ({error.strerror})")
        raise UserError(f"{folder}: {reason}; {_REMEDY}") from None
    return folder


def release(folder: Path) -> None:
    """Say that this process no longer uses the staged set `folder`."""
    handle = _HELD.pop(folder.absolute(), None)
    if handle is not None:
        handle.close()


def clean(scratch: Path) -> list[Path]:
    """Remove the staged sets in `scratch` that no running process uses, and nothing else; returns their folders.

    A set is recognised by its name and its marker. Files in its folder that staging did not make are left and named.
    """
    if not scratch.is_dir():
        raise UserError(f"{scratch}: no such folder; name the one that was given as data.stage or --to")
    removed = []
    with _ONE_THREAD:
        for folder in filter(_is_staged, sorted(scratch.iterdir())):
            try:
                if _remove(folder):
                    removed.append(folder)
            except FileNotFoundError:  # another process removes it at the same time
                continue
            except OSError as error:
                reason = _REASONS.get(error.errno or 0, f"cannot be removed ({error.strerror})")
                # Without locks nothing tells whether a run is reading it at this moment.
                raise UserError(f"{folder}: {reason}; remove the folder by hand when no run uses it") from None
    return removed


def _complete(
    place: str, folder: Path, index: Index, digest: str, suspects: Sequence[Shard], stopping: Callable[[], bool]
) -> None:
    """Verify `suspects`, copy those that are not whole, and note in the marker what is."""
    started, copied = time.monotonic(), 0
    for leftover in folder.glob(".*.tmp"):  # of a copy that was killed
        leftover.unlink(missing_ok=True)
    stamps = {shard.name: None if shard in suspects else _stamp(folder / shard.name) for shard in index.shards}
    _write_marker(folder, digest, stamps)  # from now on clean() knows the folder
    _check_room(folder, suspects)
    failed = threading.Event()
    errors: list[BaseException] = []

    def stop() -> bool:
        return failed.is_set() or stopping()

    def bring(shard: Shard) -> tuple[Shard, bool]:
        """The shard, and whether it had to be copied."""
        target = folder / shard.name
        if stop():
            raise Stopped
        if target.exists():
            if is_whole(target, shard):
                return shard, False
            warn(f"{target}: is damaged; copying it again")
        try:
            copy_shard(place, shard, target, stop)
        except Stopped:
            raise
        except BaseException as error:
            # Told at once, by the thread that met it: a thread that is free would begin with the next shard.
            errors.append(error)
            failed.set()
            raise
        return shard, True

    if suspects:
        say(f"{folder}: staging {len(suspects)} of {len(index.shards)} shards from {called(place)}")
    with (
        ProgressBar(f"staging {folder.name}", total=len(suspects), unit="shards") as progress,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="stage") as pool,
    ):
        try:
            for future in as_completed([pool.submit(bring, shard) for shard in suspects]):
                shard, new = future.result()
                stamps[shard.name] = _stamp(folder / shard.name)
                copied += new
                progress.advance()
        except Stopped:
            if errors:  # it came first, whichever thread is heard first
                raise errors[0] from None
            raise StagingStopped from None
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
            with suppress(OSError):  # the disk may be full; then the next one verifies these shards again
                _write_marker(folder, digest, stamps)
    seconds = time.monotonic() - started
    say(f"{folder}: staged, {copied} of {len(index.shards)} shards copied, {seconds:.1f} s")


def _check_room(folder: Path, shards: Sequence[Shard]) -> None:
    """UserError when those of `shards` that are not there in full length do not fit on the disk."""
    stamps = {shard.name: _stamp(folder / shard.name) for shard in shards}
    needed = sum(shard.length for shard in shards if (stamps[shard.name] or (0, 0))[0] != shard.length)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: staging needs {megabytes(needed)}, {megabytes(free)} are free; free some space, {_REMEDY}"
        )


@contextmanager
def _exclusive(folder: Path, stopping: Callable[[], bool]) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made; afterwards this process still counts as its user."""
    key = folder.absolute()
    before = _HELD.get(key)
    try:
        while not _lock(folder, stopping):
            release(folder)  # removed by clean() in the meantime: this is the lock of nothing
        yield
    except BaseException:
        if _HELD.get(key) is not before:
            release(folder)
        raise
    finally:
        if key in _HELD:
            unlock(_HELD[key].fileno(), _COPYING)


def _lock(folder: Path, stopping: Callable[[], bool]) -> bool:
    """Lock both bytes of the lock file in `folder`; False when that was removed while another process held it."""
    path, key = folder / LOCK, folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        inside = set(os.listdir(folder))  # noqa: PTH208 - one look: a set in the making begins with its lock
        if inside and not inside & {LOCK, MARKER}:
            raise UserError(f"{folder}: was not made by staging; move it away, or {_REMEDY}")
        if key not in _HELD:  # one handle a set: closing any gives up all locks of this process on the file
            _HELD[key] = path.open("a+", encoding="utf-8")
    except FileNotFoundError:  # clean() was faster
        return False
    file = _HELD[key].fileno()
    waited = False
    while not try_lock(file, _COPYING):  # not one waiting call, which no signal could end
        if not waited:
            say(f"{folder}: another process stages it; waiting")
            waited = True
        if stopping():
            raise StagingStopped
        time.sleep(_LOOK)
    while not try_lock(file, _IN_USE, shared=True):  # clean() holds it, and only for a moment
        time.sleep(_LOOK)
    return is_at(path, file)


def _is_unchanged(shard: Path, known: dict[str, Stamp]) -> bool:
    return shard.name in known and known[shard.name] == _stamp(shard)


def _stamp(path: Path) -> Stamp | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _write_marker(folder: Path, digest: str, stamps: dict[str, Stamp | None]) -> None:
    write_json(folder / MARKER, {"index": digest, "shards": stamps})


def _verified_stamps(folder: Path, digest: str) -> dict[str, Stamp]:
    """What the marker says of the index `digest`; nothing when it is missing, damaged or of another one."""
    try:
        marker = parse_json((folder / MARKER).read_bytes(), _MARKER)
    except (OSError, ValueError):
        return {}
    return {name: stamp for name, stamp in marker.shards.items() if stamp and marker.index == digest}


def _is_staged(folder: Path) -> bool:
    """True for a folder that stage() made, even if it got no further than the lock."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r".+-[0-9a-f]{12}", folder.name):
        return False
    try:
        inside = {path.name for path in folder.iterdir()}
    except OSError:  # of another user
        return False
    return MARKER in inside or inside == {LOCK}


def _remove(folder: Path) -> bool:
    """Remove a staged set; False, having said why, when it has to stay."""
    if folder.absolute() in _HELD:
        say(f"{folder}: in use by this process, left")
        return False
    if not os.access(folder, os.W_OK):
        say(f"{folder}: of another user, left")
        return False
    with (folder / LOCK).open("a+", encoding="utf-8") as handle:
        if not all(try_lock(handle.fileno(), byte) for byte in (_COPYING, _IN_USE)):
            say(f"{folder}: in use by a running process, left")
            return False
        shards = _shards_of(folder)
        if shards is None:
            warn(f"{folder}: its {MARKER} is damaged, so what staging made is not known; remove the folder by hand")
            return False
        # The index first, without which nobody takes the rest for whole; the lock last.
        made = [INDEX_NAME, *shards, MARKER]
        temporary = [
            path.name
            for path in folder.glob(".*.tmp")
            if any(re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", path.name) for name in made)
        ]
        for name in (*made, *temporary):
            (folder / name).unlink(missing_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        (folder / LOCK).unlink()
        if foreign:
            warn(f"{folder}: left, as staging did not make {', '.join(foreign[:5])}{' ...' * (len(foreign) > 5)}")
        else:
            folder.rmdir()
        return not foreign


def _shards_of(folder: Path) -> Sequence[str] | None:
    """The shards that staging put, or meant to put, into `folder`; None when that is not known."""
    if not (folder / MARKER).exists():
        return ()
    try:
        marker = parse_json((folder / MARKER).read_bytes(), _MARKER)
    except ValueError:
        return None
    names = list(marker.shards)
    return names if marker.index.startswith(folder.name[-12:]) and all(map(SHARD_NAME.fullmatch, names)) else None
