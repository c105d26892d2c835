"""Checking a packed data set against its index, byte by byte and image by image; mending it from a copy of it.

The images are decoded once: the same pass gives the digests of their pixels, by which `duplicates` finds images that
are in a data set, or in two, more than once.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.location import called, copy_shard, digest_at, index_at, index_content
from hpcdistill.data.images import MAX_PIXELS, read_rgb
from hpcdistill.data.index import INDEX_NAME, Index, Kind, Member, Sample, Shard, index_digest, load_index, role_of
from hpcdistill.data.pack.pack_pool import available_cores
from hpcdistill.data.progress import ProgressBar
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import sha256_file, write_bytes

_REMEDY = "mend it with --repair, or pack the data set again with --overwrite"
# Threads, as Pillow and hashlib release Python's lock: B100 with its LRs on 2 cores takes 1.10 s with one, 0.57 s
# with two, and 0.76 to 1.1 s with two processes.
_THREADS = min(8, available_cores())
_SAMPLES_AT_ONCE = 4  # a task's worth: of a shard of few large images each thread has some
_LARGE_PIXELS = 16_000_000
_LISTED_FAULTS = 10  # of one kind in one shard

_LARGE = threading.Lock()  # one huge image is decoded at a time: 80 megapixels take half a gigabyte


@dataclass(frozen=True, slots=True)
class Pixels:
    """The digests of a sample's images: of `hr`; of `a` or `b`; of a pair's `a` and `b`, also as halves of `ab`."""

    sample: Sample
    digests: dict[str, bytes]  # role -> `pixel_digest`


@dataclass(frozen=True)
class ShardReport:
    """What was found in one shard; `faults` is empty when it is whole."""

    shard: str
    samples: int
    members: int  # images decoded
    length: int  # bytes, as the index says
    faults: tuple[str, ...]  # one line each, naming the shard and the remedy
    whole: bool  # the file has the length and sha256 that the index says


@dataclass(frozen=True)
class Report:
    """What was found in one packed data set."""

    folder: Path
    recipe: str
    split: str
    kind: Kind
    digest: str  # hex sha256 of index.json
    lr: str | None  # how its LR images were made: `Index.lr`
    shards: tuple[ShardReport, ...]
    images: dict[str, int]  # role -> how many the index lists
    faults: tuple[str, ...]  # of the folder as a whole, and of all shards
    pixels: tuple[Pixels, ...]  # of what could be decoded

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass
class _SamplesReport:
    """In a part of a shard."""

    decoded: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)  # the member's name, what is wrong with it
    pixels: list[Pixels] = field(default_factory=list)


def data_sets(folder: Path) -> list[Path]:
    """`folder` when it is a packed data set, else those in it, two levels deep; UserError when there is none."""
    if not (folder / INDEX_NAME).is_file():
        inside = sorted(path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/{INDEX_NAME}"))
        if inside:
            return inside
    load_index(folder)  # a clear error for what is no data set
    return [folder]


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """sha256 of height, width and pixels of `[H, W, 3]` 8-bit RGB, however the file was encoded."""
    digest = hashlib.sha256(b"%d %d " % image.shape[:2])
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def verify(folder: Path) -> Report:
    """Read every byte of a packed data set. Raises UserError only when there is no readable index."""
    index = load_index(folder)
    by_shard: list[list[Sample]] = [[] for _ in index.shards]
    for sample in index.samples:
        by_shard[sample.shard].append(sample)
    shards, pixels = [], []
    with (
        ProgressBar(f"verifying {folder}", total=len(index.shards), unit="shards") as progress,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool,
    ):
        try:
            for shard, samples in zip(index.shards, by_shard, strict=True):
                report, found = _verify_shard(pool, folder / shard.name, shard, samples, index.kind)
                shards.append(report)
                pixels += found
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest of a shard
    faults = [*_folder_faults(folder, index), *(fault for shard in shards for fault in shard.faults)]
    return Report(
        folder=folder,
        recipe=index.recipe,
        split=index.split,
        kind=index.kind,
        digest=index_digest(folder),
        lr=index.lr,
        shards=tuple(shards),
        images=dict(Counter(role_of(suffix) for sample in index.samples for suffix in sample.members)),
        faults=tuple(faults),
        pixels=tuple(pixels),
    )


def repair_index(folder: Path, place: str) -> None:
    """Give `folder` the index.json of its copy at `place` if its own is missing or cannot be read.

    Raises UserError when the copy has none either.
    """
    try:
        load_index(folder)
        return
    except UserError:
        index_at(place)
    content = index_content(place)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INDEX_NAME, content)
    digest = hashlib.sha256(content).hexdigest()
    say(f"{folder / INDEX_NAME}: taken from {called(place)}; its sha256 is {digest}")


def repair_shards(report: Report, place: str) -> list[str]:
    """Replace the damaged shards of a data set by those of its copy at `place`; returns the names of those mended.

    Only what is damaged is read there, and only the bytes that the index promises replace it. A shard that the copy
    does not have whole either is left, with a warning. Raises UserError when `place` holds another data set.
    """
    folder, theirs = report.folder, digest_at(place)
    if theirs != report.digest:
        raise UserError(
            f"{called(place)}: holds another data set than {folder} (index {theirs[:12]}, not {report.digest[:12]}); "
            f"give a copy of the same packed data set, or remove {folder / INDEX_NAME} to have it replaced too"
        )
    shards = {shard.name: shard for shard in load_index(folder).shards}
    mended = []
    for found in report.shards:
        if found.whole:
            continue
        try:
            copy_shard(place, shards[found.shard], folder / found.shard)
        except UserError as error:
            warn(str(error))
            continue
        say(f"{folder / found.shard}: mended from {called(place)}")
        mended.append(found.shard)
    return mended


def _folder_faults(folder: Path, index: Index) -> Iterator[str]:
    """What no single shard shows."""
    path = folder / INDEX_NAME
    listed = {shard.name for shard in index.shards}
    for extra in sorted(folder.glob("*.tar")):
        if extra.name not in listed:
            yield f"{extra}: not in {INDEX_NAME}, but webdataset would read it; remove it, or {_REMEDY}"
    if not index.samples:
        yield f"{path}: lists no samples; {_REMEDY}"
    keys = Counter(sample.key for sample in index.samples)
    again = [key for key, count in keys.items() if count > 1]
    if again:
        yield f"{path}: {len(again)} keys are listed more than once, first {again[0]}; {_REMEDY}"
    wrong = [(sample.key, fault) for sample in index.samples if (fault := _role_fault(sample, index))]
    if wrong:
        yield f"{path}: {len(wrong)} of {len(index.samples)} samples {wrong[0][1]}, first {wrong[0][0]}; {_REMEDY}"
    if index.kind == "unpaired":
        yield from (f"{path}: {fault}; {_REMEDY}" for fault in _domain_faults(index))


def _role_fault(sample: Sample, index: Index) -> str | None:
    """What is wrong with the roles of a sample's members."""
    expected = {
        "lr-hr": ({"hr", *(f"lr{scale}" for scale in index.scales)},),
        "paired": ({"a", "b"}, {"ab"}),
        "unpaired": ({"a"}, {"b"}),
    }[index.kind]
    roles = [role_of(suffix) for suffix in sample.members]
    if set(roles) in expected and len(roles) == len(set(roles)):
        return None
    wanted = ", or ".join(" and ".join(sorted(names)) for names in expected)
    return f"have the images {' and '.join(sorted(roles)) or 'none'} in place of {wanted}"


def _domain_faults(index: Index) -> Iterator[str]:
    """Each shard of an unpaired set holds one domain, and those of `a` come first."""
    domains: dict[int, set[str]] = defaultdict(set)
    for sample in index.samples:
        domains[sample.shard].update(map(role_of, sample.members))
    for shard in sorted(domains):
        if len(domains[shard] & {"a", "b"}) > 1:
            yield f"shard {shard} mixes the domains a and b"
    order = [min(domains[shard], default="") for shard in sorted(domains)]
    if order != sorted(order):
        yield "shards of the domain b come before shards of a"
    for domain in sorted({"a", "b"}.difference(*domains.values())):
        yield f"the domain {domain} has no images"


def _verify_shard(
    pool: Executor, path: Path, shard: Shard, samples: list[Sample], kind: Kind
) -> tuple[ShardReport, list[Pixels]]:
    """The checksum of one shard, and its images decoded side by side."""
    checksum = pool.submit(lambda: (path.stat().st_size, sha256_file(path)))
    parts = [samples[at : at + _SAMPLES_AT_ONCE] for at in range(0, len(samples), _SAMPLES_AT_ONCE)]
    looks = [pool.submit(_verify_samples, path, part, kind) for part in parts]
    found: list[_SamplesReport] = []
    length, sha256 = -1, ""
    try:
        length, sha256 = checksum.result()
        found = [look.result() for look in looks]
    except FileNotFoundError:
        faults = [f"missing; {_REMEDY}"]
    except OSError as error:
        faults = [f"cannot be read ({error.strerror}); check the disk, then {_REMEDY}"]
    else:
        damaged = [fault for part in found for fault in part.damaged]
        total = sum(len(sample.members) for sample in samples)
        faults = _shard_faults(shard, length, sha256, damaged, total)
    report = ShardReport(
        shard=shard.name,
        samples=len(samples),
        members=sum(part.decoded for part in found),
        length=shard.length,
        faults=tuple(f"{path}: {fault}" for fault in faults),
        whole=(length, sha256) == (shard.length, shard.sha256),
    )
    return report, [pixels for part in found for pixels in part.pixels]


def _shard_faults(shard: Shard, length: int, sha256: str, damaged: list[tuple[str, str]], total: int) -> list[str]:
    """One line for a damaged file, not one for each of its thousand images; else a line for each image, up to ten."""
    names = list(dict.fromkeys(name for name, _ in damaged))
    are = "is" if len(names) == 1 else "are"
    images = f"; {len(names)} of its {total} images {are} affected, first {names[0]}" if names else ""
    if length != shard.length:
        return [f"has {length} bytes instead of {shard.length}{images}; {_REMEDY}"]
    if sha256 != shard.sha256:
        return [f"its sha256 differs from the index{images}; {_REMEDY}"]
    faults = [f"{name}: {fault}; {_REMEDY}" for name, fault in damaged[:_LISTED_FAULTS]]
    if len(damaged) > _LISTED_FAULTS:
        faults.append(f"and {plural(len(damaged) - _LISTED_FAULTS, 'more such fault')}; {_REMEDY}")
    return faults


def _verify_samples(path: Path, samples: list[Sample], kind: Kind) -> _SamplesReport:
    found = _SamplesReport()
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        for sample in samples:
            good: set[str] = set()
            digests: dict[str, bytes] = {}
            for suffix, member in sample.members.items():
                name, role = f"{sample.key}.{suffix}", role_of(suffix)
                # Never ask for more than there is: Python would make room for it before it looks.
                first = max(0, member.offset - tarfile.BLOCKSIZE)
                content = b""
                if member.offset + member.length <= end:
                    file.seek(first)
                    content = file.read(tarfile.BLOCKSIZE + member.length)
                image = _member_image(name, content, member)
                if isinstance(image, str):
                    found.damaged.append((name, image))
                    continue
                found.decoded += 1
                good.add(suffix)
                digests |= _digests(role, image)
            if len(good) == len(sample.members):
                found.damaged += _unfitting_sizes(sample, kind)
            if digests:
                found.pixels.append(Pixels(sample, digests))
    return found


def _member_image(name: str, content: bytes, member: Member) -> NDArray[np.uint8] | str:
    """The decoded image, or what is wrong; `content` is the tar's header block of the member and what follows."""
    if len(content) != tarfile.BLOCKSIZE + member.length:
        return "lies beyond the end of the shard"
    try:
        header = tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return f"no member begins at the recorded offset {member.offset}"
    if (header.name, header.size) != (name, member.length):
        return f"the member at its offset is {header.name!a:.60} of {header.size} bytes"
    pixels = member.height * member.width
    try:
        with _LARGE if pixels > _LARGE_PIXELS else nullcontext():
            image = read_rgb(content[tarfile.BLOCKSIZE :], name, max_pixels=max(pixels, MAX_PIXELS))
    except UserError:
        return "cannot be decoded"
    height, width, _ = image.shape
    if (height, width) != (member.height, member.width):
        return f"is {width} x {height} pixels instead of {member.width} x {member.height}"
    return image


def _digests(role: str, image: NDArray[np.uint8]) -> dict[str, bytes]:
    """Digests of what an image is compared by; none for LRs, which HR decides."""
    if role == "ab":
        half = image.shape[1] // 2
        return {"a": pixel_digest(image[:, :half]), "b": pixel_digest(image[:, half:])} if half else {}
    return {role: pixel_digest(image)} if role in ("hr", "a", "b") else {}


def _unfitting_sizes(sample: Sample, kind: Kind) -> Iterator[tuple[str, str]]:
    """Members, each as the index says, whose sizes do not belong together."""
    sizes = {role_of(suffix): (member.height, member.width) for suffix, member in sample.members.items()}
    for suffix, member in sample.members.items():
        role = role_of(suffix)
        name, size = f"{sample.key}.{suffix}", f"is {member.width} x {member.height} pixels"
        if kind == "lr-hr" and role != "hr" and role[2:].isdecimal() and "hr" in sizes:
            scale = int(role[2:])
            height, width = sizes["hr"][0] // scale, sizes["hr"][1] // scale
            if sizes[role] != (height, width):
                yield name, f"{size}, HR down-sampled by {scale} is {width} x {height}"
        if kind == "paired" and role == "b" and sizes[role] != sizes.get("a", sizes[role]):
            yield name, f"{size}, a of this pair is {sizes['a'][1]} x {sizes['a'][0]}"
        if kind == "paired" and role == "ab" and member.width % 2:
            yield name, f"{size}, an odd width that has no two halves"
