"""Whether images that choose a run's best weights are trained on as well, by the digests of the files they came from.

A packed sample has the sha256 of its source in the small JSON behind its images, so nothing is decoded and every start
of a training can afford it. Another file of the same picture is not found so; `shards/verify.py` compares pixels.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hpcdistill.data import held_out
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.index import INDEX_NAME, Index, Sample, load_index
from hpcdistill.data.test_sets import hr_files
from hpcdistill.storage import sha256_file

_BLOCK = tarfile.BLOCKSIZE
_LONGEST = 1 << 16  # bytes of the JSON of a sample that is looked at


def find_overlap(train: Sequence[str], held: int, name: str, place: str | None) -> str | None:
    """What to say of a set `name` of which an image is trained on as well; None when there is none.

    `train` are the packed training sets, of which `held` images are held out; `place` is where the set `name` lies,
    None for the images held out. Training sets at an address, and shards of another packer, have no digests to compare.
    """
    folders = [Path(folder) for folder in train if not is_remote(folder)]
    if len(folders) < len(train) and held:
        return None  # which samples are held out is not known without the others; the evaluation refuses it
    indices = [load_index(folder) for folder in folders]
    trained: dict[str, str] = {}  # digest -> the image that is trained on
    validating: list[tuple[str, str]] = []  # digest and source
    for folder, index, kept_out in zip(folders, indices, held_out.numbered(indices, held), strict=True):
        inside = frozenset(kept_out)
        for number, digest in _digests(folder, index):
            source = index.samples[number].source
            if number not in inside:
                trained.setdefault(digest, f"'{source}' of {folder}")
            elif place is None:
                validating.append((digest, source))
    if place is not None:
        validating = list(_digests_of_set(Path(place)))
    both = [(source, trained[digest]) for digest, source in validating if digest in trained]
    if not both:
        return None
    source, there = both[0]
    more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
    remedy = "hold out another number" if place is None else "name another under eval.select, or set data.held_out=10"
    return (
        f"{place or 'data.held_out'}: '{source}' of the set {name}, which chooses the best weights, is trained on as "
        f"well, as {there}{more}; {remedy}"
    )


def _digests_of_set(folder: Path) -> Iterable[tuple[str, str]]:
    """sha256 and name of every image of a packed set, or of a folder of images."""
    if not (folder / INDEX_NAME).is_file():
        return [(sha256_file(file), file.name) for file in hr_files(folder)]
    index = load_index(folder)
    return [(digest, index.samples[number].source) for number, digest in _digests(folder, index)]


def _digests(folder: Path, index: Index) -> Iterator[tuple[int, str]]:
    """The number of each sample that says which file it was made from, and that file's sha256."""
    by_shard: dict[int, list[int]] = {}
    for number, sample in enumerate(index.samples):
        by_shard.setdefault(sample.shard, []).append(number)
    for shard, inside in by_shard.items():
        try:
            file = os.open(folder / index.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # who trains on it says what is wrong
        try:
            for number in inside:
                if digest := _digest(file, index.samples[number]):
                    yield number, digest
        finally:
            os.close(file)


def _digest(file: int, sample: Sample) -> str | None:
    """The sha256 in the JSON behind the sample's last image; None where there is none."""
    last = max(sample.members.values(), key=lambda member: member.offset, default=None)
    if last is None:
        return None
    try:
        block = os.pread(file, _BLOCK + _LONGEST, last.offset + -(-last.length // _BLOCK) * _BLOCK)
        header = tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape")
        if header.name != f"{sample.key}.json":
            return None
        about = json.loads(block[_BLOCK : _BLOCK + header.size])
        # Of a sample with official LR images `sha256` is over the list of its files.
        digest = about["files"]["hr"]["sha256"] if "files" in about else about["sha256"]
    except (OSError, tarfile.HeaderError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) else None
