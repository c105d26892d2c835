"""Unpacking archives safely: all of one or nothing, inside the folder, within limits.

An archive is unpacked into `.FOLDER.partial` beside its folder and moved into place when it is whole;
`FOLDER/.unpacked.json` lists the archives that are there. Several may share a folder.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field, TypeAdapter

from hpcdistill.console import say
from hpcdistill.data.fetch.archives import Limits, archive_files, declared_bytes, refused, too_much
from hpcdistill.data.fetch.digests import file_digest
from hpcdistill.data.fetch.disk import cannot_write, check_space, exclusive, sync_filesystem
from hpcdistill.data.progress import BYTES, ProgressBar, megabytes
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import read_json, sync_folder, write_json

MARKER = ".unpacked.json"


@dataclass(frozen=True)
class _Unpacked:
    """An archive whose files are in the folder."""

    archive: str  # its name
    archive_bytes: int
    archive_mtime_ns: int
    sha256: str
    members: int  # files that were unpacked
    bytes: int
    top: list[Annotated[str, Field(pattern=r"^[^/\x00]+$")]]  # names of what lies directly in the folder


@dataclass(frozen=True)
class _UnpackedArchives:
    """What `.unpacked.json` says."""

    archives: list[_Unpacked]


_MARKER: TypeAdapter[_UnpackedArchives] = TypeAdapter(_UnpackedArchives)


def unpack(
    archive: Path, folder: Path, *, limits: Limits | None = None, wanted: Callable[[str], bool] | None = None
) -> Path:
    """Unpack `archive` (zip, tar, tar.gz, .xz, .bz2) into `folder` and return `folder`; nothing to do if it was before.

    `wanted` picks members by their path; an archive that was unpacked once is not looked at again, whatever `wanted`
    says then. Hidden files and `__MACOSX` are left out. Files of other archives in `folder` stay; an equal file may be
    there already, a different one of the same name is an error.
    Raises UserError for a damaged archive, a member that is refused (see `archives`), more than `limits` allow, and a
    disk without room; `folder` is then as it was before.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: no such archive; fetch it first")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file stands where the folder for {archive.name} is needed; choose another folder")
    if _is_unpacked(archive, folder):
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with exclusive(lock, f"{folder}: another process is unpacking into it; waiting"):
            if not _is_unpacked(archive, folder):
                try:
                    if partial.exists():  # of a run that was killed
                        shutil.rmtree(partial)
                    _unpack(archive, folder, partial, limits or Limits(), wanted)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def _is_unpacked(archive: Path, folder: Path) -> bool:
    """True when the marker names this archive (by its bytes, not by its name) and its top entries are still there."""
    state = archive.stat()
    for entry in _marked(folder):
        if entry.archive_bytes != state.st_size or not all((folder / name).exists() for name in entry.top):
            continue
        same_file = (entry.archive, entry.archive_mtime_ns) == (archive.name, state.st_mtime_ns)
        if same_file or entry.sha256 == file_digest(archive, keep=False):
            return True
    return False


def _marked(folder: Path) -> list[_Unpacked]:
    try:
        return read_json(folder / MARKER, _MARKER, "remove it, and the archives are unpacked again").archives
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unpack(archive: Path, folder: Path, partial: Path, limits: Limits, wanted: Callable[[str], bool] | None) -> None:
    """Unpack `archive` into `partial`, and move what is there into `folder` when it is whole."""
    needed = declared_bytes(archive)
    if needed > limits.bytes:
        raise too_much(archive, limits.bytes)
    if wanted is None:
        check_space(folder, needed, f"unpacking {archive.name}")
    partial.mkdir()
    state = archive.stat()
    members, written = _write_members(archive, partial, limits, wanted)
    if not members:
        raise UserError(f"{archive}: has no file that is wanted; is it the right archive?")
    entry = _Unpacked(
        archive=archive.name,
        archive_bytes=state.st_size,
        archive_mtime_ns=state.st_mtime_ns,
        sha256=file_digest(archive, keep=False),
        members=members,
        bytes=written,
        top=sorted(path.name for path in partial.iterdir()),
    )
    sync_filesystem(partial)  # before the marker says that it is whole
    if folder.exists():
        _check_conflicts(partial, folder, archive)
        _merge(partial, folder)
        others = [other for other in _marked(folder) if other.sha256 != entry.sha256]
        write_json(folder / MARKER, asdict(_UnpackedArchives([*others, entry])))
    else:
        write_json(partial / MARKER, asdict(_UnpackedArchives([entry])))
        partial.rename(folder)
        sync_folder(folder.parent)
    say(f"{folder}: {archive.name} unpacked, {plural(members, 'file')}, {megabytes(written)}")


def _write_members(
    archive: Path, folder: Path, limits: Limits, wanted: Callable[[str], bool] | None
) -> tuple[int, int]:
    """Write the members of `archive` below `folder`; their number and bytes, counted whatever the archive declares."""
    most = limits.most(archive)
    members = written = consumed = 0
    with ProgressBar(f"unpacking {archive.name}", total=archive.stat().st_size, unit=BYTES) as progress:
        for entry in archive_files(archive, limits):
            if wanted is None or wanted(entry.path):
                path = folder / entry.path
                with _new_file(archive, entry.path, path) as file:
                    for piece in entry.content:
                        written += len(piece)
                        if written > most:
                            raise too_much(archive, most)
                        file.write(piece)
                members += 1
            progress.advance(entry.consumed - consumed)
            consumed = entry.consumed
    return members, written


def _new_file(archive: Path, name: str, path: Path) -> BinaryIO:
    """Open `path` for the member `name`; UserError when another member has it, on this disk, or has it as a folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb", opener=_not_for_others_to_write)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        raise refused(archive, name, "is there twice, as a file and as a folder, or has too long a name") from None


def _not_for_others_to_write(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def _check_conflicts(partial: Path, folder: Path, archive: Path) -> None:
    """UserError when `folder` holds something else under a name that is to be moved in."""
    for parent, folders, files in os.walk(partial):
        place = folder / Path(parent).relative_to(partial)
        for name in folders:
            if (place / name).exists() and not (place / name).is_dir():
                raise UserError(f"{place / name}: is no folder, {archive.name} has one of this name; move it away")
        for name in files:
            if (place / name).exists() and not filecmp.cmp(Path(parent) / name, place / name, shallow=False):
                raise UserError(
                    f"{place / name}: differs from the file of this name in {archive.name}; move it away, or unpack "
                    "into another folder"
                )
        folders[:] = [name for name in folders if (place / name).exists()]  # what is new as a whole needs no look


def _merge(partial: Path, folder: Path) -> None:
    """Move everything into `folder`: what is new as a whole by one rename, for a reader at one moment."""
    for entry in sorted(partial.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and place.exists():
            _merge(entry, place)
        elif not place.exists():
            entry.rename(place)
    sync_folder(folder)
