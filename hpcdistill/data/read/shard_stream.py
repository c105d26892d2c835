"""A shard read from its first byte to its last and compared with the index on the way, from a folder or an address.

Webdataset's own tar reader is not used for this: it unpacks what is compressed and fills what is sparse before anybody
can ask how large that is, takes a damaged header for the end, and rewrites the text of errors (its tests would fail:
`test_a_shard_made_to_harm_is_refused_whatever_its_checksum`). Ours knows what must come: plain files, each of the
recorded name, place and length, with the shard's length and sha256 in the end.
"""

from __future__ import annotations

import hashlib
import shlex
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from hpcdistill.data.fetch.location import is_remote, join
from hpcdistill.data.fetch.transfer import open_stream, shown
from hpcdistill.data.images import MAX_PIXELS, read_packed
from hpcdistill.data.index import Index, Sample, Shard, role_of
from hpcdistill.data.read.augmentation import Rgb
from hpcdistill.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_MAX_LENGTH = 4 * MAX_PIXELS + (1 << 24)  # bytes of an image file that is held in memory, as in `images.read_file`


@dataclass(frozen=True)
class PlacedShard:
    """A shard, the data set it belongs to, and what lies in it."""

    place: str
    shard: Shard
    samples: tuple[Sample, ...]  # in the index's order
    usable: tuple[Sample, ...]  # those of them that are trained on

    @property
    def address(self) -> str:
        return join(self.place, self.shard.name)

    @property
    def label(self) -> str:
        """What messages call it."""
        return shown(self.address) if is_remote(self.place) else self.address

    @property
    def remedy(self) -> str:
        if is_remote(self.place):
            return "try again; if it stays so, check the folder that is served with `python shards/verify.py DIR`"
        place = shlex.quote(self.place)
        return f"find the damage with `python shards/verify.py {place}`, then fetch or pack the data set again"


@dataclass(frozen=True)
class ShardPart:
    """The part of a shard that one slot takes in one pass: every `stride`-th usable sample from number `first` on."""

    shard: PlacedShard
    first: int = 0
    stride: int = 1

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.shard.usable[self.first :: self.stride]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it came in: the files of the roles that are needed, not decoded yet."""

    sample: Sample
    shard: PlacedShard
    contents: dict[str, bytes]  # by role

    def image(self, role: str) -> Rgb:
        """Decode one; UserError when it cannot be, or has another size than in the index."""
        member = self.sample.member(role)
        assert member is not None
        label = f"{self.shard.label}: {role} of sample '{self.sample.source}'"
        return read_packed(self.contents[role], (member.height, member.width), label, self.shard.remedy)


def placed_shards(places: Sequence[str], indices: Sequence[Index], usable: Collection[int]) -> list[PlacedShard]:
    """The shards that hold one of the `usable` samples, numbered through all data sets.

    UserError when a sample is in no shard, or a local shard is missing or of another length.
    """
    placed: list[PlacedShard] = []
    samples_before = 0
    for place, index in zip(places, indices, strict=True):
        inside: list[list[Sample]] = [[] for _ in index.shards]
        chosen: list[list[Sample]] = [[] for _ in index.shards]
        for number, sample in enumerate(index.samples, start=samples_before):
            inside[sample.shard].append(sample)
            if number in usable:
                chosen[sample.shard].append(sample)
        samples_before += len(index.samples)
        lists = zip(index.shards, inside, chosen, strict=True)
        found = [PlacedShard(place, shard, tuple(every), tuple(some)) for shard, every, some in lists if some]
        if not is_remote(place):
            for shard in found:
                _check_file(shard)
        placed += found
    return placed


def read_samples(parts: Iterable[ShardPart], roles: Collection[str]) -> Iterator[EncodedSample]:
    """The samples of each part, with their files of `roles`, in the shard's order.

    UserError when the shard is not what the index says; only behind its last byte is the checksum known, and its last
    sample is given after that.
    """
    for part in parts:
        with closing(_Reading(part.shard)) as reading:
            last: EncodedSample | None = None
            for sample in _samples(reading, part, roles):
                if last:
                    yield last
                last = sample
            reading.finish()
        if last:
            yield last


def _samples(reading: _Reading, part: ShardPart, roles: Collection[str]) -> Iterator[EncodedSample]:
    samples = part.shard.samples
    listed = {f"{sample.key}.{suffix}": member for sample in samples for suffix, member in sample.members.items()}
    notes = {f"{sample.key}.json" for sample in samples}  # written by the packer, not in the index and not read
    wanted: dict[str, tuple[Sample, str]] = {}
    for sample in part.samples:
        first = {role_of(suffix): suffix for suffix in reversed(sample.members)}  # of a role, as `Sample.member` says
        wanted |= {f"{sample.key}.{suffix}": (sample, role) for role, suffix in first.items() if role in roles}
    needed = Counter(sample.key for sample, _ in wanted.values())
    seen = 0
    begun: Sample | None = None  # what `contents` are of
    contents: dict[str, bytes] = {}
    while (block := reading.read(_BLOCK)).strip(b"\0"):
        name, length = _header(reading, block)
        member = listed.get(name)
        if member:
            if (reading.position, length) != (member.offset, member.length):
                reading.fail(f"{name!a:.80} has another place or length than in the index")
            seen += 1
        elif name not in notes:
            reading.fail(f"holds {name!a:.80}, which the index does not know")
        if name in wanted:
            sample, role = wanted[name]
            if begun and sample is not begun:
                reading.fail(f"holds the files of {begun.key!a:.80} apart, not side by side as webdataset asks for")
            if length > _MAX_LENGTH:
                reading.fail(f"{name!a:.80} is far too large for an image")
            contents[role] = reading.read(length)
            begun = sample
            if len(contents) == needed[sample.key]:
                yield EncodedSample(sample, part.shard, contents)
                begun, contents = None, {}
        else:
            reading.skip(length)
        reading.skip(-length % _BLOCK)
    if seen != len(listed):
        reading.fail(f"holds {seen} of the index's {len(listed)} files")


def _header(reading: _Reading, block: bytes) -> tuple[str, int]:
    """Name and length of the file that a header block announces."""
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        reading.fail(f"is damaged at byte {reading.position - _BLOCK}, where a file should begin")
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.size < 0:
        reading.fail(f"holds {entry.name!a:.80}, which is no plain file")
    return entry.name, entry.size


class _Reading:
    """One shard being read: counts and digests every byte."""

    def __init__(self, shard: PlacedShard) -> None:
        self._shard = shard
        self._digest = hashlib.sha256()
        self.position = 0
        self._file = self._open()

    def read(self, count: int) -> bytes:
        """The next `count` bytes; UserError when the shard ends before."""
        return b"".join(self._pieces(count))

    def skip(self, count: int) -> None:
        """Read on without keeping anything."""
        for _ in self._pieces(count):
            pass

    def finish(self) -> None:
        """Read to the end; UserError unless the shard has the length and the sha256 of the index."""
        self.skip(max(0, self._shard.shard.length - self.position))
        if self._next(1):
            self.fail(f"is longer than the index's {self._shard.shard.length} bytes")
        if self._digest.hexdigest() != self._shard.shard.sha256:
            self.fail("has another sha256 than in the index")

    def fail(self, fault: str) -> NoReturn:
        raise UserError(f"{self._shard.label}: this shard {fault}; {self._shard.remedy}")

    def close(self) -> None:
        self._file.close()

    def _pieces(self, count: int) -> Iterator[bytes]:
        while count:
            # In pieces, so that no more is allocated than has come, whatever a header or an index claims.
            piece = self._next(min(count, _PIECE))
            if not piece:
                self.fail(f"ends after {self.position} bytes instead of the index's {self._shard.shard.length}")
            self.position += len(piece)
            self._digest.update(piece)
            if self.position > self._shard.shard.length:
                self.fail(f"is longer than the index's {self._shard.shard.length} bytes")
            count -= len(piece)
            yield piece

    def _next(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except OSError as error:
            self.fail(f"cannot be read ({error.strerror or type(error).__name__})")

    def _open(self) -> BinaryIO:
        if is_remote(self._shard.place):
            return cast(BinaryIO, open_stream(self._shard.address))
        try:
            return open(self._shard.address, "rb")
        except OSError as error:
            self.fail(f"cannot be read ({error.strerror})")


def _check_file(shard: PlacedShard) -> None:
    path = Path(shard.address)
    if not path.is_file():
        raise UserError(f"{path}: this shard of the data set is missing; {shard.remedy}")
    length = path.stat().st_size
    if length != shard.shard.length:
        raise UserError(
            f"{path}: this shard has {length} bytes instead of the index's {shard.shard.length}; {shard.remedy}"
        )
