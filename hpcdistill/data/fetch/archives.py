"""The files of a zip or tar archive, each one checked: what may escape, bomb or hide is refused.

The kind is told from the content, not from the name: zip, tar, and tar under gzip, xz or bzip2. zipfile and tarfile
read it, but `extractall` does not do, filter="data" included: 71 of 85 tests of unpacking failed when it was tried.
Tarfile takes a tar that is cut off for a whole one, does not look at gzip's checksum and lets links, twins and hidden
files through; zipfile gives members that lead elsewhere another name; neither has limits.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hpcdistill.data.fetch.transfer import PIECE
from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError

_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_JUNK = "__MACOSX"  # what macOS puts beside the files; hidden files go the same way
_LONGEST_TAR_NOTE = 1 << 20  # bytes of a pax header or long name; tarfile reads them whole into memory
_TAR_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X")
_TAR_MEMBER = 4096  # bytes of headers and padding that are allowed a member, beside its content


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold. DIV2K has 900 members and 3.5 GB; edges2shoes 50,000 members and 2 GB."""

    members: int = 300_000
    bytes: int = 200 << 30  # unpacked
    depth: int = 16  # folders in a path
    ratio: float = 200.0  # unpacked bytes for a byte of the archive ...
    ratio_from: int = 64 << 20  # ... once there are more than this many

    def most(self, archive: Path) -> int:
        """Bytes that `archive` may unpack to."""
        return min(self.bytes, max(self.ratio_from, int(self.ratio * archive.stat().st_size)))


@dataclass(frozen=True)
class ArchiveFile:
    """One regular file of an archive; its content has to be taken before the next one is."""

    path: str  # its parts joined by "/", relative, harmless
    content: Iterator[bytes]
    consumed: int  # bytes of the archive read so far, for progress


_Member = ArchiveFile | None  # None: one that is skipped


def declared_bytes(archive: Path) -> int:
    """What unpacking will write, as far as the archive says so beforehand: exact for zip, at least that for tar."""
    with _damage_named(archive), open(archive, "rb") as file:
        if _is_zip(archive, file):
            with zipfile.ZipFile(file) as opened:
                return sum(info.file_size for info in opened.infolist())
        return archive.stat().st_size


def archive_files(archive: Path, limits: Limits) -> Iterator[ArchiveFile]:
    """The regular files of `archive` in its order, but hidden ones; UserError at the first thing that is refused."""
    with _damage_named(archive), open(archive, "rb") as file:
        members = _zip_files(archive, file, limits) if _is_zip(archive, file) else _tar_files(archive, file, limits)
        for number, member in enumerate(members, 1):
            if number > limits.members:
                raise UserError(f"{archive}: has more than the {limits.members} members allowed; nothing was kept")
            if member:
                yield member


def refused(archive: Path, name: str, problem: str) -> UserError:
    """The one line for a member that is not unpacked, and nothing with it."""
    return UserError(
        f"{archive}: member '{_printable(name)}' {problem}; nothing of it was kept; get the archive from its official "
        "address, or unpack it yourself and use `--from FOLDER`"
    )


def too_much(archive: Path, limit: int) -> UserError:
    """The one line for an archive that would unpack to more than `limit` bytes."""
    return UserError(
        f"{archive}: unpacks to more than the {megabytes(limit)} allowed for its size, as a bomb does and no images "
        "do; nothing of it was kept"
    )


def _content(archive: Path, member: IO[bytes]) -> Iterator[bytes]:
    with _damage_named(archive):
        while piece := member.read(PIECE):
            yield piece


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Turn whatever Python's readers raise for a damaged archive, which nobody has listed, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # gzip and bz2 raise OSErrors without a number; EINVAL: a seek before the beginning
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            why, remedy = f"cannot be read ({error.strerror})", "check the disk, or get the archive again"
        else:
            why = f"damaged ({_printable(str(error) or type(error).__name__)})"
            remedy = "get the archive again (a downloaded one: remove it first)"
        raise UserError(f"{archive}: {why}; {remedy}") from None


def _is_zip(archive: Path, file: IO[bytes]) -> bool:
    """True for a zip, False for a tar, compressed or not; UserError for anything else."""
    beginning = file.read(512)
    file.seek(0)
    if beginning.startswith((b"PK\3\4", b"PK\5\6")):
        return True
    if beginning.startswith(tuple(_COMPRESSIONS)) or beginning[257:262] == b"ustar":
        return False
    problem = "neither a zip nor a tar archive (its first bytes belong to neither)" if beginning else "empty"
    raise UserError(
        f"{archive}: {problem}; remove it and fetch it again, or unpack it yourself and use `--from FOLDER`"
    )


def _harmless(archive: Path, name: str, limits: Limits, *, folder: bool) -> str | None:
    """The path of member `name` inside of the folder; None for what is skipped: folders, hidden files."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise refused(archive, name, "leads out of the folder")
    if not name.isprintable():
        raise refused(archive, name, "has a name that is not printable text")
    if len(parts) > limits.depth + 1:
        raise refused(archive, name, f"lies more than {limits.depth} folders deep")
    if folder or any(part.startswith(".") or part == _JUNK for part in parts):
        return None  # also "./", with which `tar -C FOLDER .` begins
    if not parts:
        raise refused(archive, name, "has no name")
    return "/".join(parts)


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode()[:200]


def _zip_files(archive: Path, file: IO[bytes], limits: Limits) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as opened:
        consumed = 0
        for info in opened.infolist():
            consumed += info.compress_size
            name = info.orig_filename  # `filename` is cut at a NUL
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refused(archive, name, "is a link, or neither a file nor a folder")
            if info.flag_bits & 0x2041:  # strongly, or with masked headers
                raise refused(archive, name, "is encrypted")
            path = _harmless(archive, name, limits, folder=info.is_dir())
            if path is None:
                yield None
                continue
            with opened.open(info) as member:
                yield ArchiveFile(path, _content(archive, member), consumed)


class _StrictInfo(tarfile.TarInfo):
    """A tar header whose damage is an error. tarfile takes a bad one after the first for the archive's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what ends the archive
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            problem = "it is cut off" if len(buf) < tarfile.BLOCKSIZE else str(error)
            raise tarfile.ReadError(problem) from None
        if info.size < 0 or (info.type in _TAR_NOTES and info.size > _LONGEST_TAR_NOTE):
            raise tarfile.ReadError(f"a header of {info.size} bytes")
        return info


class _Bounded(io.RawIOBase):
    """Reads `file` up to `limit` bytes: headers and skipped members can be a bomb, too."""

    def __init__(self, file: IO[bytes], limit: int, archive: Path) -> None:
        self._file, self._left, self._limit, self._archive = file, limit, limit, archive

    def read(self, size: int | None = -1) -> bytes:
        piece = self._file.read(PIECE if size is None or size < 0 else size)
        self._left -= len(piece)
        if self._left < 0:
            raise too_much(self._archive, self._limit)
        return piece


def _tar_files(archive: Path, file: IO[bytes], limits: Limits) -> Iterator[_Member]:
    beginning = file.read(6)
    file.seek(0)
    plain = next((opened(file) for magic, opened in _COMPRESSIONS.items() if beginning.startswith(magic)), file)
    bounded = _Bounded(plain, limits.most(archive) + _TAR_MEMBER * limits.members, archive)
    with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|", tarinfo=_StrictInfo, bufsize=PIECE) as opened:
        while (info := opened.next()) is not None:
            opened.members.clear()  # type: ignore[attr-defined]  # what tarfile has seen, and a stream never needs
            if info.issparse() or not (info.isfile() or info.isdir()):
                raise refused(archive, info.name, "is a link, or neither a plain file nor a folder")
            path = _harmless(archive, info.name, limits, folder=info.isdir())
            if path is None:
                yield None
                continue
            member = opened.extractfile(info)
            assert member is not None, "a regular file has content"
            yield ArchiveFile(path, _content(archive, member), file.tell())
    while bounded.read(PIECE):  # to the end: the checksum of gzip, xz and bzip2 is there
        pass
