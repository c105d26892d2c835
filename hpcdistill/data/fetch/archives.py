"""The files of a zip or tar archive, each one checked: what may escape, bomb or hide is refused.

The kind is told from the content, not from the name: zip, tar, and tar under gzip, xz or bzip2. zipfile and tarfile
read it, but `extractall` does not do, filter="data" included: 71 of the 85 tests in test_unpacking.py failed with it.
Tarfile takes a tar that is cut off for a whole one, does not look at gzip's checksum and lets links, twins and hidden
files through; zipfile gives members that lead elsewhere another name; neither has limits.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError

_PIECE = 1 << 20
_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_DRIVE = re.compile(r"^[A-Za-z]:")
_JUNK = "__MACOSX"  # what macOS puts beside the files; hidden files go the same way
_LONGEST_TAR_NOTE = 1 << 20  # bytes of a pax header or long name; tarfile reads them whole into memory
_TAR_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X")
_TAR_MEMBER = 4096  # bytes of headers and padding that are allowed a member, beside its content


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold. DIV2K has 900 members and 3.5 GB; edges2shoes 50,000 members and 2 GB."""

    members: int = 300_000
    bytes: int = 200 << 30  # unpacked
    ratio: float = 200.0  # unpacked bytes for a byte of the archive ...
    ratio_from: int = 64 << 20  # ... once there are more than this many
    depth: int = 16  # folders in a path
    name: int = 255  # bytes in one name of a path, as file systems have it

    def most(self, archive: Path) -> int:
        """Bytes that `archive` may unpack to."""
        return min(self.bytes, max(self.ratio_from, int(self.ratio * archive.stat().st_size)))


@dataclass(frozen=True)
class ArchiveFile:
    """One regular file of an archive; its content has to be taken before the next one is."""

    path: str  # its parts joined by "/", relative, harmless
    content: Iterator[bytes]
    consumed: int  # bytes of the archive read so far, for progress


def declared_bytes(archive: Path) -> int:
    """What unpacking will write, as far as the archive says so beforehand: exact for zip, at least that for tar."""
    with _damage_named(archive), open(archive, "rb") as file:
        if _is_zip(archive, file):
            with zipfile.ZipFile(file) as opened:
                return sum(info.file_size for info in opened.infolist())
        return archive.stat().st_size


def archive_files(archive: Path, limits: Limits) -> Iterator[ArchiveFile]:
    """The regular files of `archive` in its order, without hidden ones; UserError at the first thing that is refused.

    A zip's names are all checked before its first file is given, a tar's as they come.
    """
    with _damage_named(archive), open(archive, "rb") as file:
        yield from (_zip_files if _is_zip(archive, file) else _tar_files)(archive, file, limits)


def too_much(archive: Path, limit: int) -> UserError:
    """The one line for an archive that would unpack to more than `limit` bytes."""
    return UserError(
        f"{archive}: unpacks to more than the {megabytes(limit)} allowed for its size, as a bomb does and no images "
        "do; nothing of it was kept"
    )


def _content(archive: Path, member: IO[bytes]) -> Iterator[bytes]:
    with _damage_named(archive):
        while piece := member.read(_PIECE):
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


class _Names:
    """Checks the members' names and sees that no two of them meet in one file."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self._archive, self._limits = archive, limits
        self._claimed: dict[str, str] = {}  # path as disks compare it -> as it is written
        self._members = 0

    def refuse(self, name: str, problem: str) -> UserError:
        return UserError(
            f"{self._archive}: member '{_printable(name)}' {problem}; nothing of it was kept; get the archive from "
            "its official address, or unpack it yourself and use `--from FOLDER`"
        )

    def check(self, name: str, *, folder: bool) -> str | None:
        """The harmless path of member `name`; None for what is skipped: folders, hidden files."""
        self._members += 1
        if self._members > self._limits.members:
            raise self.refuse(name, f"is one more than the {self._limits.members} members allowed")
        if not name or not name.isprintable():
            raise self.refuse(name, "has a name that is not printable text")
        if "\\" in name or _DRIVE.match(name) or name.startswith("/"):
            raise self.refuse(name, "has an absolute path, a drive letter or a backslash in its name")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise self.refuse(name, "leads out of the folder ('..')")
        if len(parts) > self._limits.depth + 1 or any(len(part.encode()) > self._limits.name for part in parts):
            raise self.refuse(name, "has too long a name or lies in too many folders")
        if folder or any(part.startswith(".") or part == _JUNK for part in parts):
            return None
        if not parts or name.endswith("/"):
            raise self.refuse(name, "is a file with the name of a folder")
        for depth in range(1, len(parts)):
            self._claim(name, "/".join(parts[:depth]) + "/")
        self._claim(name, "/".join(parts))
        return "/".join(parts)

    def _claim(self, name: str, path: str) -> None:
        """Take `path`, which ends in a slash for a folder: several members may lie in one, if they call it the same."""
        # Names that differ in case or Unicode form only are one file on some disks (macOS, exFAT): which of the two
        # survived would depend on the machine.
        folded = unicodedata.normalize("NFC", path.removesuffix("/")).casefold()
        known = self._claimed.setdefault(folded, path)
        if known is not path and not (known == path and path.endswith("/")):
            raise self.refuse(name, "is there twice, or again but for its case, or as a file and as a folder")


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode()[:200]


def _zip_files(archive: Path, file: IO[bytes], limits: Limits) -> Iterator[ArchiveFile]:
    names = _Names(archive, limits)
    with zipfile.ZipFile(file) as opened:
        taken = [(info, path) for info in opened.infolist() if (path := _check_zip_member(info, names)) is not None]
        consumed = 0
        for info, path in taken:
            consumed += info.compress_size
            with opened.open(info) as member:
                yield ArchiveFile(path, _content(archive, member), consumed)


def _check_zip_member(info: zipfile.ZipInfo, names: _Names) -> str | None:
    name = info.orig_filename  # `filename` is cut at a NUL
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise names.refuse(name, "is a link" if kind == stat.S_IFLNK else "is neither a file nor a folder")
    if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, masked headers
        raise names.refuse(name, "is encrypted")
    return names.check(name, folder=info.is_dir())


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
        piece = self._file.read(_PIECE if size is None or size < 0 else size)
        self._left -= len(piece)
        if self._left < 0:
            raise too_much(self._archive, self._limit)
        return piece


def _tar_files(archive: Path, file: IO[bytes], limits: Limits) -> Iterator[ArchiveFile]:
    names = _Names(archive, limits)
    beginning = file.read(6)
    file.seek(0)
    plain = next((opened(file) for magic, opened in _COMPRESSIONS.items() if beginning.startswith(magic)), file)
    bounded = _Bounded(plain, limits.most(archive) + _TAR_MEMBER * limits.members, archive)
    with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|", tarinfo=_StrictInfo, bufsize=_PIECE) as opened:
        while (info := opened.next()) is not None:
            opened.members.clear()  # type: ignore[attr-defined]  # what tarfile has seen, and a stream never needs
            if info.islnk() or info.issym():
                raise names.refuse(info.name, "is a link")
            if info.issparse() or not (info.isfile() or info.isdir()):
                raise names.refuse(info.name, "is neither a plain file nor a folder")
            path = names.check(info.name, folder=info.isdir())
            if path is not None:
                member = opened.extractfile(info)
                assert member is not None, "a regular file has content"
                yield ArchiveFile(path, _content(archive, member), file.tell())
    while bounded.read(_PIECE):  # to the end: the checksum of gzip, xz and bzip2 is there
        pass
