"""Getting the right bytes once: resumed, tried again, from one mirror after the other, and verified.

A file grows as `.NAME.part` beside its place and is renamed there when size and checksum are right; nothing half or
wrong ever has the final name. `.NAME.part.json` says where the part comes from and which version of the file it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import AfterValidator, Field, TypeAdapter

from hpcdistill.console import warn
from hpcdistill.data.fetch.digests import RECORDED, file_digest, record, recorded, remember
from hpcdistill.data.fetch.disk import cannot_write, check_space, exclusive
from hpcdistill.data.fetch.transfer import (
    PIECE,
    RETRIES,
    TIMEOUT,
    Attempts,
    Changed,
    GaveUp,
    RemoteFile,
    TransferFailure,
    check_scheme,
    shown,
)
from hpcdistill.data.progress import BYTES, ProgressBar
from hpcdistill.errors import UserError
from hpcdistill.settings import LONGEST_NAME, Section
from hpcdistill.storage import parse_json, sha256_file, sync_file, sync_folder, write_json

LARGEST = 64 << 30  # bytes taken from a server that does not say how many there are
_REMEDY = "check the network, or give a copy with `--from FILE` or another address with `--mirror URL`"


def _address(address: str) -> str:
    check_scheme(address)
    return address


class Download(Section):
    """One file that a recipe, or a method's frozen network, needs."""

    file: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=LONGEST_NAME, description="its name in the cache folder"
    )
    addresses: tuple[Annotated[str, AfterValidator(_address)], ...] = Field(
        (), description="mirrors, tried in order; none: there is no public address, only a local copy"
    )
    bytes: int | None = Field(None, ge=1, le=1 << 60, description="size")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="null: nobody published it; recorded at the first fetch"
    )
    sha256_prefix: str | None = Field(
        None, pattern=r"^[0-9a-f]{8,64}$", description="its first hex digits, which weights carry in their file name"
    )
    md5_third_party: str | None = Field(
        None, pattern=r"^[0-9a-f]{32}$", description="somebody else's figure: a difference is only a warning"
    )
    optional: str | None = Field(None, description="the part of the data set it belongs to; null: always needed")


def fetch_file(
    download: Download,
    folder: Path,
    *,
    mirror: str | None = None,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
    pause: Callable[[float], None] = time.sleep,
) -> Path:
    """`folder/file`, whole and verified. Nothing is asked of the network when it is there already.

    `mirror` is tried before the recipe's addresses: the file's own address, or that of a folder that holds it.
    `timeout` is in seconds without a byte, `retries` counts tries without progress, `pause` waits between them.
    Raises UserError when no address gives the file, when it is not the one that is recorded, when the disk has no room
    for it or `folder` cannot be written.
    """
    path = folder / download.file
    if path.exists() and _wrong(download, path) is None:
        return path
    addresses = _addresses(download, mirror)
    if not addresses and not path.exists():
        raise UserError(f"{path}: missing, and has no public address; give a copy with `--from FILE` or `--mirror URL`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with exclusive(folder / f".{download.file}.lock", f"{path}: another process is fetching it; waiting"):
        problem = _wrong(download, path) if path.exists() else ""
        if problem is None:
            return path
        if problem:
            if not addresses:
                raise UserError(f"{path}: {problem}; there is no public address, give a whole copy with `--from FILE`")
            warn(f"{path}: {problem}; fetching it again")
        _Fetch(download, path, retries, timeout, pause).run(addresses)
    return path


def check_file(download: Download, path: Path, folder: Path) -> None:
    """UserError unless `path`, a copy from elsewhere, is what `download` should be, as far as that is known.

    An unknown digest is compared with what was recorded in `folder` (of the downloads), or recorded there.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check --from")
    size, digest = path.stat().st_size, file_digest(path, keep=False)
    problem = _mismatch(download, size, digest, folder / download.file)
    if problem:
        raise UserError(f"{path}: is not the {download.file} that is wanted: it {problem}; give a whole copy")
    _compare_md5(download, path)
    _record_local(download, folder / download.file, size, digest)


def _addresses(download: Download, mirror: str | None) -> list[str]:
    if mirror is None:
        return list(download.addresses)
    check_scheme(mirror)
    name = quote(download.file)
    own = mirror if mirror.rpartition("/")[2] == name else f"{mirror.rstrip('/')}/{name}"
    return [own, *(address for address in download.addresses if address != own)]


def _wrong(download: Download, path: Path) -> str | None:
    """What is wrong with the file that is there; None: nothing. An unknown digest is recorded."""
    if not path.is_file():
        raise UserError(f"{path}: a folder stands where the file is needed; move it away")
    size = path.stat().st_size
    if download.bytes is not None and size != download.bytes:
        return f"has {size} bytes instead of {download.bytes}"
    digest = file_digest(path)
    problem = _mismatch(download, size, digest, path)
    if problem is None:
        _record_local(download, path, size, digest)
    return problem


def _record_local(download: Download, path: Path, size: int, digest: str) -> None:
    """Record the digest of a file that the user brought, if nobody published one and none is recorded."""
    if download.sha256 is None and path.name not in recorded(path.parent):
        with contextlib.suppress(UserError, OSError):  # in a read-only folder it stays unrecorded
            path.parent.mkdir(parents=True, exist_ok=True)
            record(path.parent, path.name, {"bytes": size, "sha256": digest, "address": None})


def _mismatch(download: Download, size: int, digest: str, record_as: Path) -> str | None:
    """What is wrong with a file by what is published of it, else by what is recorded of it as `record_as`."""
    if download.bytes is not None and size != download.bytes:
        return f"has {size} bytes instead of {download.bytes}"
    if download.sha256 is not None and digest != download.sha256:
        return f"has the sha256 {digest} instead of {download.sha256}"
    if download.sha256_prefix is not None and not digest.startswith(download.sha256_prefix):
        return f"has the sha256 {digest}, which should begin with {download.sha256_prefix}"
    entry = recorded(record_as.parent).get(record_as.name) if download.sha256 is None else None
    if entry is None or entry["sha256"] == digest:
        return None
    return (
        f"has the sha256 {digest} instead of {entry['sha256']}, recorded on {entry.get('date')}; to accept the new one "
        f"remove the entry {record_as.name} from {record_as.parent / RECORDED}"
    )


def _compare_md5(download: Download, path: Path) -> None:
    if download.md5_third_party is None:
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != download.md5_third_party:
        warn(
            f"{download.file}: its md5 is {digest}, a third party gives {download.md5_third_party}; the file may have "
            "been published anew: look at its images before you rely on it"
        )


@dataclass(frozen=True)
class _Origin:
    """Where a part comes from; kept beside it."""

    address: str
    validator: str | None


_ORIGIN: TypeAdapter[_Origin] = TypeAdapter(_Origin)


class _PartFile:
    """`.NAME.part` and its sidecar."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.name}.part")
        self.sidecar = path.with_name(f".{path.name}.part.json")

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def origin(self) -> _Origin | None:
        try:
            return parse_json(self.sidecar.read_bytes(), _ORIGIN)
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        self.sidecar.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class _Fetch:
    """The download of one file; the caller holds its lock."""

    def __init__(
        self, download: Download, path: Path, retries: int, timeout: float, pause: Callable[[float], None]
    ) -> None:
        self.download, self.path = download, path
        self.retries, self.timeout, self.pause = retries, timeout, pause
        self.part = _PartFile(path)
        # With a digest to compare at the end, a part may be resumed on trust: from another mirror, without an ETag.
        known = download.sha256 or download.sha256_prefix or recorded(path.parent).get(path.name)
        self.has_digest = known is not None

    def run(self, addresses: list[str]) -> None:
        """Try the addresses in turn; UserError with each one's reason when none gave the file."""
        if self.download.bytes is not None:
            check_space(self.path.parent, self.download.bytes - self.part.size(), self.path.name)
        failures = []
        with ProgressBar(f"fetching {self.path.name}", total=self.download.bytes, unit=BYTES) as self.progress:
            for position, address in enumerate(addresses):
                try:
                    return self._from(address)
                except GaveUp as failure:
                    failures.append(f"{shown(address)}: {failure.reason}")
                    if position + 1 < len(addresses):
                        warn(f"{failures[-1]}; trying the next address")
        raise UserError(f"{self.path.name} could not be fetched from {'; '.join(failures)}; {_REMEDY}")

    def _from(self, address: str) -> None:
        """Bring the part to its end and verify it; GaveUp when this address does not give the file."""
        attempts = Attempts(shown(address), self.retries, self.pause)
        while True:
            origin, have = self.part.origin(), self.part.size()
            validator = origin.validator if origin and origin.address == address else None
            if not (validator or self.has_digest) or have > (self.download.bytes or LARGEST):
                self.part.remove()
                have, validator = 0, None
            try:
                if not have or have != self.download.bytes:
                    self._receive(address, have, validator, attempts)
            except GaveUp as error:
                if not isinstance(error.failure, Changed):
                    raise
                self.part.remove()
                attempts.again(TransferFailure(error.reason, again=True))
                continue
            problem = self._finish(address)
            if problem is None:
                return
            self.part.remove()
            # Bytes of an earlier call or another mirror may be to blame: once more, all from here.
            if not have:
                attempts.give_up(TransferFailure(problem))
            warn(f"{self.path}: {problem}; starting again from zero")

    def _receive(self, address: str, have: int, validator: str | None, attempts: Attempts) -> None:
        """Add what is behind the first `have` bytes to the part; GaveUp when it does not come, or too much of it."""
        size = self.download.bytes
        with RemoteFile(address, have, attempts, self.timeout, validator=validator, total=size) as source:
            if source.total is not None:
                check_space(self.path.parent, source.total - have, self.path.name)
            self.progress.restart(have, source.total)
            limit = LARGEST if source.total is None else source.total
            piece = source.read(PIECE)  # nothing is written before the first bytes have come
            try:
                write_json(self.part.sidecar, asdict(_Origin(address, source.validator)))
                with open(self.part.path, "ab", buffering=0) as file:
                    while piece and source.position <= limit:
                        view = memoryview(piece)
                        while view:
                            view = view[file.write(view) :]
                        self.progress.advance(len(piece))
                        piece = source.read(PIECE)
            except OSError as error:
                raise cannot_write(self.path, error, "; what has come is kept") from None
            if source.position > limit:
                self.part.remove()
                attempts.give_up(TransferFailure(f"sends more than the {limit} bytes expected"))

    def _finish(self, address: str) -> str | None:
        """Verify the part and give it its name; what is wrong with it, or None."""
        try:
            sync_file(self.part.path)
            size, digest = self.part.size(), sha256_file(self.part.path)
            problem = _mismatch(self.download, size, digest, self.path) if size else "is empty"
            if problem is None:
                if self.download.sha256 is None:
                    entry = {"bytes": size, "sha256": digest, "address": shown(address)}
                    record(self.path.parent, self.path.name, entry)
                _compare_md5(self.download, self.part.path)
                self.part.path.replace(self.path)
                remember(self.path, digest)
                self.part.sidecar.unlink(missing_ok=True)
                sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error, "; what has come is kept") from None
        return problem
