"""What an index may say before anything is read or written by it: types, ranges, and names that stay in the folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hpcdistill.errors import UserError

if TYPE_CHECKING:
    from hpcdistill.data.index import Index, Sample, Shard

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a recipe or split; becomes part of a folder's name
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")
_KEY = re.compile(r"[^./\\\0\ud800-\udfff][^/\\\0\ud800-\udfff]*")  # names a file where enlarged images are saved
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # can be neither printed nor part of a path
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_PIXELS = 1 << 31  # of a side


def check_index(index: Index, name: str) -> None:
    """UserError when a value of `index` has another type, is out of range, or is a path that leads elsewhere.

    Called by `parse_index`, which checks which keys there are; a damaged index, or one from elsewhere, can hold
    anything in them. `name` is what the message calls the file.
    """
    fault = _fault(index)
    if fault:
        raise UserError(f"{name}: damaged ({fault}); copy it again, or pack the data set again")


def _fault(index: Index) -> str | None:
    for key in ("recipe", "split"):
        value = getattr(index, key)
        if not (isinstance(value, str) and _NAME.fullmatch(value)):
            return f"the {key} {value!a:.60} is no name"
    if not all(_is_count(scale, 1) for scale in index.scales):
        return f"the scales {index.scales!a:.60} are no factors"
    texts = (index.licence, index.origin, *index.skipped)
    if not (all(map(_is_text, texts)) and isinstance(index.notes, dict)):
        return "the licence, the origin, what was skipped or the notes are of another kind"
    names = set()
    for shard in index.shards:
        fault = _shard_fault(shard)
        if fault:
            return fault
        if shard.name in names:
            return f"shard {shard.name!a:.60} is listed twice"
        names.add(shard.name)
    return next(filter(None, (_sample_fault(sample, len(index.shards)) for sample in index.samples)), None)


def may_be_whole(shard: Shard, samples: Iterable[Sample]) -> bool:
    """Whether the values of a shard and its samples are of the right kind, as in an index."""
    return _shard_fault(shard) is None and not any(_sample_fault(sample) for sample in samples)


def _shard_fault(shard: Shard) -> str | None:
    if not (isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name)):
        return f"the shard name {shard.name!a:.60} is no file name ending in .tar"
    if not _is_count(shard.length):
        return f"{shard.name}: the length {shard.length!a:.60} is no number of bytes"
    if not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
        return f"{shard.name}: {shard.sha256!a:.60} is no sha256"
    return None


def _sample_fault(sample: Sample, shards: int | None = None) -> str | None:
    if not (isinstance(sample.key, str) and _KEY.fullmatch(sample.key) and _is_text(sample.source)):
        return f"the sample {sample.key!a:.60} of {sample.source!a:.60} has no names"
    if not _is_count(sample.shard):
        return f"sample {sample.key!a:.60}: its shard {sample.shard!a:.60} is no number"
    if shards is not None and sample.shard >= shards:
        return f"sample {sample.key!a:.60}: it lies in shard {sample.shard} of {shards}, counted from 0"
    for suffix, member in sample.members.items():
        place, size = (member.offset, member.length), (member.height, member.width)
        if not all(map(_is_count, place)) or not all(_is_count(side, 1) and side < _MOST_PIXELS for side in size):
            return f"{sample.key!a:.60} {suffix!a:.60}: the place {place!a:.60} or size {size!a:.60} is no such thing"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _NO_TEXT.search(value)


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63
