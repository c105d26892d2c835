"""Checking a packed data set against its index: lengths, checksums, and every image at its place."""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.data.images import read_rgb
from hpcdistill.data.index import INDEX_NAME, Index, Member, Sample, Shard, load_index
from hpcdistill.data.progress import Progress
from hpcdistill.errors import UserError
from hpcdistill.storage import sha256_file

_REMEDY = "pack the data set again with --overwrite"


@dataclass(frozen=True)
class ShardReport:
    """What was found in one shard; `faults` is empty when it is whole."""

    shard: str
    samples: int
    members: int  # images decoded
    length: int  # bytes, as the index says
    faults: tuple[str, ...]  # one line each, naming the shard and the remedy


@dataclass(frozen=True)
class Report:
    """What was found in one packed data set."""

    folder: Path
    recipe: str
    split: str
    shards: tuple[ShardReport, ...]
    faults: tuple[str, ...]  # of the folder as a whole, and of all shards

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def data_sets(folder: Path) -> list[Path]:
    """`folder` when it is a packed data set, else its splits; UserError when it is neither."""
    if not (folder / INDEX_NAME).is_file():
        splits = sorted(path.parent for path in folder.glob(f"*/{INDEX_NAME}"))
        if splits:
            return splits
    load_index(folder)  # a clear error for what is no data set
    return [folder]


def verify(folder: Path) -> Report:
    """Read every byte of a packed data set. Raises UserError only when there is no readable index."""
    index = load_index(folder)
    by_shard: dict[int, list[Sample]] = defaultdict(list)
    for sample in index.samples:
        by_shard[sample.shard].append(sample)
    with (
        Progress(f"verifying {folder}", total=len(index.shards), unit="shards") as progress,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="verify") as pool,
    ):
        shards = []
        futures = [pool.submit(_verify_shard, folder, shard, by_shard[n]) for n, shard in enumerate(index.shards)]
        for future in futures:
            shards.append(future.result())
            progress.advance()
    faults = [*_folder_faults(folder, index), *(fault for shard in shards for fault in shard.faults)]
    return Report(folder, index.recipe, index.split, tuple(shards), tuple(faults))


def _folder_faults(folder: Path, index: Index) -> Iterator[str]:
    """What no single shard shows."""
    listed = {shard.name for shard in index.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: not in {INDEX_NAME}, but webdataset would read it; remove it, or {_REMEDY}"
    for sample in index.samples:
        if not 0 <= sample.shard < len(index.shards):
            yield f"{folder / INDEX_NAME}: {sample.key} is in shard {sample.shard}, which there is not; {_REMEDY}"


def _verify_shard(folder: Path, shard: Shard, samples: list[Sample]) -> ShardReport:
    path = folder / shard.name
    total = sum(len(sample.members) for sample in samples)
    if not path.is_file():
        faults: tuple[str, ...] = (f"{path}: missing; {_REMEDY}",)
        return ShardReport(shard.name, len(samples), 0, shard.length, faults)
    try:
        length, sha256 = path.stat().st_size, sha256_file(path)
        damaged = list(_damaged_members(path, samples))
    except OSError as error:
        faults = (f"{path}: cannot be read ({error.strerror}); check the disk, then {_REMEDY}",)
        return ShardReport(shard.name, len(samples), 0, shard.length, faults)
    # One line for a damaged file, not one for each of its thousand images.
    images = f"; {len(damaged)} of its {total} images are affected, first {damaged[0][0]}" if damaged else ""
    if length != shard.length:
        faults = (f"{path}: has {length} bytes instead of {shard.length}{images}; {_REMEDY}",)
    elif sha256 != shard.sha256:
        faults = (f"{path}: its sha256 differs from the index{images}; {_REMEDY}",)
    else:
        faults = tuple(f"{path}: {name}: {fault}; {_REMEDY}" for name, fault in damaged)
    return ShardReport(shard.name, len(samples), total - len(damaged), shard.length, faults)


def _damaged_members(path: Path, samples: list[Sample]) -> Iterator[tuple[str, str]]:
    """The name of each image that is not what the index says, and what is wrong with it."""
    with open(path, "rb") as file:
        for sample in samples:
            for suffix, member in sample.members.items():
                name = f"{sample.key}.{suffix}"
                file.seek(max(0, member.offset - tarfile.BLOCKSIZE))
                content = file.read(tarfile.BLOCKSIZE + max(0, member.length))
                fault = _member_fault(name, content, member)
                if fault:
                    yield name, fault


def _member_fault(name: str, content: bytes, member: Member) -> str | None:
    """`content` is the tar's header block of the member and what follows."""
    if len(content) != tarfile.BLOCKSIZE + member.length:
        return "lies beyond the end of the shard"
    try:
        header = tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return f"no member begins at the recorded offset {member.offset}"
    if (header.name, header.size) != (name, member.length):
        return f"the member at its offset is {header.name} of {header.size} bytes"
    try:
        height, width, _ = read_rgb(content[tarfile.BLOCKSIZE :], name, max_pixels=1 << 31).shape
    except UserError:
        return "cannot be decoded"
    if (height, width) != (member.height, member.width):
        return f"is {width} x {height} pixels instead of {member.width} x {member.height}"
    return None
