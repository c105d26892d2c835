"""Unpacking archives safely: all of one or nothing, inside the folder, within limits.

An archive is unpacked into `.FOLDER.partial` beside its folder and moved into place when it is whole;
`FOLDER/.unpacked.json` lists the archives that are there. Several may share a folder.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from hpcdistill.console import say
from hpcdistill.data.fetch.archives import PIECE, Entry, Limits, declared_bytes, entries
from hpcdistill.data.fetch.digests import file_digest
from hpcdistill.data.fetch.disk import cannot_write, check_space, exclusive, sync_filesystem
from hpcdistill.data.progress import BYTES, Progress, megabytes
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import read_json, sync_folder, write_json

__all__ = ["MARKER", "Limits", "unpack"]

MARKER = ".unpacked.json"


class _Unpacked(BaseModel):
    """An archive in the marker, as far as it is asked about."""

    archive: str
    archive_bytes: int
    archive_mtime_ns: int
    sha256: str
    top: list[Annotated[str, Field(pattern=r"^[^/\x00]+$")]]


def _complete(marker: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    if "archives" not in marker:
        raise ValueError("archives: missing")
    for entry in marker["archives"]:
        _Unpacked.model_validate(entry, strict=True)
    return marker


_ARCHIVES: TypeAdapter[dict[str, list[dict[str, Any]]]] = TypeAdapter(
    Annotated[dict[str, list[dict[str, Any]]], AfterValidator(_complete)]
)


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
                    _remove(partial)  # of a run that was killed
                    _unpack(archive, folder, partial, limits or Limits(), wanted)
                finally:
                    _remove(partial)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _is_unpacked(archive: Path, folder: Path) -> bool:
    """True when the marker names this archive (by its bytes, not by its name) and its top entries are still there."""
    state = archive.stat()
    for entry in _marker(folder):
        if entry["archive_bytes"] != state.st_size or not all((folder / name).exists() for name in entry["top"]):
            continue
        same_file = entry["archive"] == archive.name and entry["archive_mtime_ns"] == state.st_mtime_ns
        if same_file or entry["sha256"] == file_digest(archive, keep=False):
            return True
    return False


def _marker(folder: Path) -> list[dict[str, Any]]:
    path = folder / MARKER
    try:
        return read_json(path, _ARCHIVES, "remove it, and the archives are unpacked again")["archives"]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unpack(archive: Path, folder: Path, partial: Path, limits: Limits, wanted: Callable[[str], bool] | None) -> None:
    needed = declared_bytes(archive)
    if needed > limits.bytes:
        raise UserError(f"{archive}: holds {megabytes(needed)}, more than the {megabytes(limits.bytes)} allowed")
    if wanted is None:
        check_space(folder, needed, f"unpacking {archive.name}")
    partial.mkdir()
    state = archive.stat()
    writer = _Writer(archive, partial, limits)
    with Progress(f"unpacking {archive.name}", total=state.st_size, unit=BYTES) as progress:
        consumed = 0
        for entry in entries(archive, limits):
            if wanted is None or wanted(entry.path):
                writer.write(entry)
            progress.advance(entry.consumed - consumed)
            consumed = entry.consumed
    if not writer.members:
        raise UserError(f"{archive}: has no file that is wanted; is it the right archive?")
    mark = {
        "archive": archive.name,
        "archive_bytes": state.st_size,
        "archive_mtime_ns": state.st_mtime_ns,
        "sha256": file_digest(archive, keep=False),
        "members": writer.members,
        "bytes": writer.written,
        "top": sorted(path.name for path in partial.iterdir()),
    }
    sync_filesystem(partial)  # before the marker says that it is whole
    if folder.exists():
        _check_conflicts(partial, folder, archive)
        _merge(partial, folder)
        others = [entry for entry in _marker(folder) if entry["sha256"] != mark["sha256"]]
        write_json(folder / MARKER, {"archives": [*others, mark]})
    else:
        write_json(partial / MARKER, {"archives": [mark]})
        partial.rename(folder)
        sync_folder(folder.parent)
    say(f"{folder}: {archive.name} unpacked, {plural(writer.members, 'file')}, {megabytes(writer.written)}")


class _Writer:
    """Writes entries below a folder and counts what really comes, whatever the archive declares."""

    def __init__(self, archive: Path, folder: Path, limits: Limits) -> None:
        self._archive, self._folder, self._limits = archive, folder, limits
        self._by_ratio = limits.by_ratio(archive)
        self._folders: set[Path] = set()
        self.members = self.written = 0

    def write(self, entry: Entry) -> None:
        path = self._folder / entry.path
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            while piece := entry.read(PIECE):
                self._count(len(piece), entry.path)
                view = memoryview(piece)
                while view:
                    view = view[os.write(file, view) :]
        finally:
            os.close(file)
        self.members += 1

    def _count(self, size: int, member: str) -> None:
        self.written += size
        if self.written > self._limits.bytes:
            limit = megabytes(self._limits.bytes)
            raise UserError(
                f"{self._archive}: member '{member}' exceeds the {limit} that are unpacked; nothing was kept"
            )
        if self.written > self._by_ratio:
            raise UserError(
                f"{self._archive}: member '{member}' unpacks to more than {self._limits.ratio:g} times the archive's "
                "size, as a bomb does and no images do; nothing was kept"
            )


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
