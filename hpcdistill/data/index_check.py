"""What an index may say before anything is read or written by it: types, ranges, and names that stay in the folder."""

from __future__ import annotations

import re

from hpcdistill.data.index import Index, Sample, Shard
from hpcdistill.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a recipe or split; becomes part of a folder's name
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_index(index: Index, name: str) -> None:
    """UserError when a value of `index` has another type, is out of range, or is a path that leads elsewhere.

    `parse_index` checks which keys there are; an index from elsewhere can hold anything in them. `name` is what the
    message calls the file.
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
    names = set()
    for shard in index.shards:
        fault = _shard_fault(shard)
        if fault:
            return fault
        if shard.name in names:
            return f"shard {shard.name!a:.60} is listed twice"
        names.add(shard.name)
    return next(filter(None, map(_sample_fault, index.samples)), None)


def _shard_fault(shard: Shard) -> str | None:
    if not (isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name)):
        return f"the shard name {shard.name!a:.60} is no file name ending in .tar"
    if not _is_count(shard.length):
        return f"{shard.name}: the length {shard.length!a:.60} is no number of bytes"
    if not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
        return f"{shard.name}: {shard.sha256!a:.60} is no sha256"
    return None


def _sample_fault(sample: Sample) -> str | None:
    if not (isinstance(sample.key, str) and isinstance(sample.source, str)):
        return f"the sample {sample.key!a:.60} of {sample.source!a:.60} has no names"
    if not isinstance(sample.shard, int) or isinstance(sample.shard, bool):
        return f"sample {sample.key!a:.60}: its shard {sample.shard!a:.60} is no number"
    for suffix, member in sample.members.items():
        place, size = (member.offset, member.length), (member.height, member.width)
        if not all(map(_is_count, place)) or not all(_is_count(side, 1) for side in size):
            return f"{sample.key!a:.60} {suffix!a:.60}: the place {place!a:.60} or size {size!a:.60} is no such thing"
    return None


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63
