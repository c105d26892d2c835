"""Staging: a packed data set on node-local scratch, copied and verified once a node.

A staged set is the folder `<recipe>-<split>-<12 hex digits of the index digest>` with the shards and, written last, an
index.json with the bytes of the source's. `.staged.json` holds the size and modification time that each shard had when
its sha256 was right: while both are the same, the shard is not read again. Of `.staged.lock`, the one process that
copies locks the first byte; each process that uses the set locks the second byte until it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from pydantic import TypeAdapter

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.location import (
    Stopped,
    called,
    copy_shard,
    index_at,
    index_content,
    is_remote,
    is_whole,
)
from hpcdistill.data.index import INDEX_NAME, SHARD_NAME, Index, Shard
from hpcdistill.data.outputs import check_apart
from hpcdistill.data.progress import Progress, megabytes
from hpcdistill.errors import UserError
from hpcdistill.file_lock import NO_LOCKS, is_at, try_lock, unlock
from hpcdistill.storage import json_object, parse_json, write_bytes, write_json

MARKER = ".staged.json"
LOCK = ".staged.lock"

_THREADS = 4
_COPYING, _IN_USE = 0, 1  # bytes of the lock file
_LOOK = 0.2  # seconds between two looks at a lock that another process holds
_REMEDY = "choose another folder (data.stage=DIR, or --to DIR), or read the data where they are"
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REASONS = {
    errno.EROFS: "is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "is a file, not a folder",
    errno.ENOTDIR: "is a file, not a folder",
    **dict.fromkeys(NO_LOCKS, "its file system has no locks"),
}

T = TypeVar("T")
Stamps = dict[str, tuple[int, int] | None]  # shard -> size and mtime in ns once verified, None before


@dataclass(frozen=True)
class _Marker:
    """What `.staged.json` says."""

    index: str  # digest of the index that the shards are of
    shards: Stamps


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
    with _ONE_THREAD, _one_line(scratch, folder), _exclusive(folder, stopping):
        stamps = _read_stamps(folder, digest)
        suspects = [shard for shard in index.shards if not _is_unchanged(folder, shard, stamps)]
        if suspects or not _has_bytes(folder / INDEX_NAME, content):
            _complete(place, folder, index, content, digest, stamps, suspects, stopping)
    return folder


def release(folder: Path) -> None:
    """Say that this process no longer uses the staged set `folder`."""
    handle = _HELD.pop(_key(folder), None)
    if handle is not None:
        handle.close()


def clean(scratch: Path) -> list[Path]:
    """Remove the staged sets in `scratch` that no running process uses, and nothing else; returns their folders.

    A set is recognised by its name and its marker. Files in its folder that staging did not make are left and named.
    """
    if not scratch.is_dir():
        raise UserError(f"{scratch}: no such folder; name the one that was given as data.stage or --to")
    with _ONE_THREAD:
        return [folder for folder in sorted(scratch.iterdir()) if _is_staged(folder) and _removed(folder)]


def _complete(
    place: str,
    folder: Path,
    index: Index,
    content: bytes,
    digest: str,
    stamps: Stamps,
    suspects: Sequence[Shard],
    stopping: Callable[[], bool],
) -> None:
    """Verify `suspects`, copy those that are not whole, and write the index when all are."""
    started = time.monotonic()
    for leftover in folder.glob(".*.tmp"):  # of a copy that was killed
        leftover.unlink(missing_ok=True)
    stamps = {shard.name: stamps.get(shard.name) for shard in index.shards}
    for shard in suspects:
        stamps[shard.name] = None
    _write_stamps(folder, digest, stamps)  # from now on clean() knows the folder

    def look(shard: Shard) -> tuple[Shard, bool]:
        return shard, is_whole(folder / shard.name, shard)

    def copy(shard: Shard) -> Shard:
        copy_shard(place, shard, folder / shard.name, lambda: stop.is_set() or stopping())
        return shard

    stop = threading.Event()
    there = [shard for shard in suspects if (folder / shard.name).exists()]
    try:
        with closing(_in_threads(look, there, stop, f"checking {folder.name}")) as looks:
            for shard, whole in looks:
                if whole:
                    stamps[shard.name] = _stamp(folder / shard.name)
                else:
                    warn(f"{folder / shard.name}: is damaged; copying it again")
        missing = [shard for shard in suspects if stamps[shard.name] is None]
        needed = sum(shard.length for shard in missing) + len(content)
        if missing:
            free = shutil.disk_usage(folder).free
            if needed > free:
                room = f"staging needs {megabytes(needed)}, {megabytes(free)} are free"
                raise UserError(f"{folder}: {room}; free some space, {_REMEDY}")
            size = f"{len(missing)} of {len(index.shards)} shards, {megabytes(needed)}"
            say(f"{folder}: staging {size}, from {called(place)}")
        with closing(_in_threads(copy, missing, stop, f"staging {folder.name}")) as copied:
            for shard in copied:
                stamps[shard.name] = _stamp(folder / shard.name)
        if stopping() and any(stamps[shard.name] is None for shard in missing):
            raise StagingStopped
    except BaseException:
        with suppress(OSError):  # the disk may be full; then the next one verifies these shards again
            _write_stamps(folder, digest, stamps)
        raise
    write_bytes(folder / INDEX_NAME, content)
    _write_stamps(folder, digest, stamps)
    seconds = time.monotonic() - started
    say(f"{folder}: staged, {len(missing)} of {len(index.shards)} shards copied, {seconds:.1f} s")


def _in_threads(work: Callable[[Shard], T], shards: Sequence[Shard], stop: threading.Event, label: str) -> Generator[T]:
    """`work` of each shard as it ends; the first error, or an interruption, ends the others too."""

    def guarded(shard: Shard) -> T:
        if stop.is_set():
            raise Stopped
        try:
            return work(shard)
        except BaseException:
            stop.set()
            raise

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stage")
    try:
        with Progress(label, total=len(shards), unit="shards") as progress:
            for future in as_completed([pool.submit(guarded, shard) for shard in shards]):
                with suppress(Stopped):  # what made it stop comes as another future's error
                    yield future.result()
                progress.advance()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _exclusive(folder: Path, stopping: Callable[[], bool]) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made; afterwards this process still counts as its user."""
    before = _HELD.get(_key(folder))
    handle = _locked(folder, stopping)
    try:
        while not try_lock(handle.fileno(), _IN_USE, shared=True):  # clean() holds it, and only for a moment
            time.sleep(_LOOK)
        yield
    except BaseException:
        if handle is not before:
            release(folder)
        raise
    finally:
        if not handle.closed:
            unlock(handle.fileno(), _COPYING)


def _locked(folder: Path, stopping: Callable[[], bool]) -> TextIO:
    path, key = folder / LOCK, _key(folder)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            inside = set(os.listdir(folder))  # noqa: PTH208 - one look: a set in the making begins with its lock
            if inside and not inside & {LOCK, MARKER}:
                raise UserError(f"{folder}: was not made by staging; move it away, or {_REMEDY}")
            # One handle a set: closing any gives up all locks of this process on the file.
            handle = _HELD.get(key) or path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # clean() was faster
            continue
        _HELD[key] = handle
        try:
            waited = False
            while not try_lock(handle.fileno(), _COPYING):  # not one waiting call, which no signal could end
                if not waited:
                    say(f"{folder}: waiting for {_holder(handle)}, which stages it")
                waited = True
                if stopping():
                    raise StagingStopped
                time.sleep(_LOOK)
            if is_at(path, handle.fileno()):
                handle.seek(0)
                handle.truncate()
                json.dump({"process": os.getpid(), "host": socket.gethostname()}, handle)
                handle.flush()
                return handle
        except BaseException:
            release(folder)
            raise
        release(folder)  # removed by clean() in the meantime: this is the lock of nothing


def _holder(handle: TextIO) -> str:
    handle.seek(0)
    try:
        return "process {process} on {host}".format(**parse_json(handle.read().encode(), json_object))
    except (ValueError, KeyError):  # it is just being written
        return "another process"


def _key(folder: Path) -> Path:
    return folder.absolute()


@contextmanager
def _one_line(scratch: Path, folder: Path) -> Iterator[None]:
    """Turn what the disk says into one line with the remedy."""
    try:
        yield
    except OSError as error:
        full = _FULL.get(error.errno or 0)
        if full:
            raise UserError(
                f"{folder}: {full}; free some space (the shards that are whole are kept), {_REMEDY}"
            ) from None
        reason = _REASONS.get(error.errno or 0) or f"cannot be used ({error.strerror})"
        raise UserError(f"{scratch}: {reason}; {_REMEDY}") from None


def _is_unchanged(folder: Path, shard: Shard, stamps: Stamps) -> bool:
    stamp = stamps.get(shard.name)
    try:
        return stamp is not None and stamp == _stamp(folder / shard.name)
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _has_bytes(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _write_stamps(folder: Path, digest: str, stamps: Stamps) -> None:
    write_json(folder / MARKER, {"index": digest, "shards": stamps})


def _read_stamps(folder: Path, digest: str) -> Stamps:
    """What the marker says of the index `digest`; nothing when it is missing, damaged or of another one."""
    try:
        marker = parse_json((folder / MARKER).read_bytes(), _MARKER)
    except (OSError, ValueError):
        return {}
    return marker.shards if marker.index == digest else {}


def _is_staged(folder: Path) -> bool:
    """True for a folder that stage() made, even if it got no further than the lock."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r".+-[0-9a-f]{12}", folder.name):
        return False
    try:
        inside = {path.name for path in folder.iterdir()}
    except OSError:  # of another user
        return False
    return MARKER in inside or inside == {LOCK}


def _removed(folder: Path) -> bool:
    """`_remove`, with what the disk says as one line."""
    try:
        return _remove(folder)
    except FileNotFoundError:  # another process removes it at the same time
        return False
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or f"cannot be removed ({error.strerror})"
        # Without locks nothing tells whether a run is reading it at this moment.
        raise UserError(f"{folder}: {reason}; remove the folder by hand when no run uses it") from None


def _remove(folder: Path) -> bool:
    """Remove a staged set; False, having said why, when it has to stay."""
    if _key(folder) in _HELD:
        say(f"{folder}: in use by this process, left")
        return False
    if not os.access(folder, os.W_OK):
        say(f"{folder}: of another user, left")
        return False
    with (folder / LOCK).open("a+", encoding="utf-8") as handle:
        if not all(try_lock(handle.fileno(), byte) for byte in (_COPYING, _IN_USE)):
            say(f"{folder}: in use by a running process, left")
            return False
        names = _made(folder)
        if names is None:
            warn(f"{folder}: its {MARKER} is damaged, so what staging made is not known; remove the folder by hand")
            return False
        # The index first, without which nobody takes the rest for whole; the lock last.
        for name in (INDEX_NAME, *names, MARKER):
            _unlink(folder, name)
        foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        (folder / LOCK).unlink()
        if foreign:
            warn(f"{folder}: left, as staging did not make {', '.join(foreign[:5])}{' ...' * (len(foreign) > 5)}")
        else:
            folder.rmdir()
        return not foreign


def _made(folder: Path) -> Iterable[str] | None:
    """The shards that staging put, or meant to put, into `folder`; None when that is not known."""
    if not (folder / MARKER).exists():
        return ()
    try:
        marker = parse_json((folder / MARKER).read_bytes(), _MARKER)
    except ValueError:
        return None
    names = list(marker.shards)
    return names if marker.index.startswith(folder.name[-12:]) and all(map(SHARD_NAME.fullmatch, names)) else None


def _unlink(folder: Path, name: str) -> None:
    """Remove a file and what killed processes left of earlier attempts to write it."""
    for leftover in folder.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", leftover.name):
            leftover.unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
