"""Packing: images into shards of HR and down-sampled LR images, with the same bytes every time.

One sample is `<key>.hr.png` (the whole image), `<key>.lr2.png`, `.lr3.png`, `.lr4.png` (HR cropped at its top left
corner to a multiple of s, then MATLAB's resize) and `<key>.json`. A finished shard is renamed into place beside a
sidecar (`.shard-00000.json`) that says what went into it; a packer that was killed takes the shards whose sidecars
still fit the sources and does the rest again. index.json is written when all shards are there, and only then.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL
from PIL import features

from hpcdistill.console import say, warn
from hpcdistill.data.images import MAX_PIXELS, count_pixels
from hpcdistill.data.index import INDEX_NAME, Index, Member, Sample, Shard, load_index
from hpcdistill.data.packed_image import SCALES, PackedImage, pack_image, padded
from hpcdistill.data.progress import Progress
from hpcdistill.data.recipes import UNSPLIT, Recipe, Source, find_sources
from hpcdistill.data.sidecars import (
    Digest,
    FinishedShard,
    digest,
    matches,
    read_sidecars,
    remove,
    remove_sidecars,
    sidecar_path,
    write_sidecar,
)
from hpcdistill.errors import UserError
from hpcdistill.storage import replacing, sha256_file

PACKER = 1  # raised when the same sources would give other bytes
SHARD_SAMPLES = 256
SHARD_BYTES = 128 << 20
_PIXELS_IN_FLIGHT = 16_000_000  # decoded, resized and encoded side by side: about 20 bytes a pixel

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class _Outcome:
    """What became of one source: `packed` is None for an image that was skipped."""

    position: int  # in the list of sources
    digest: Digest
    packed: PackedImage | None


@dataclass
class _State:
    """What is in finished shards so far of one split."""

    shards: list[Shard] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)  # of every source looked at, skipped ones too
    skipped: list[str] = field(default_factory=list)

    def add(self, finished: FinishedShard) -> None:
        self.shards.append(finished.shard)
        self.samples += finished.samples
        self.digests += finished.digests
        self.skipped += finished.skipped


@dataclass(frozen=True)
class _Job:
    recipe: Recipe
    split: str
    folder: Path
    on_error: OnError
    max_pixels: int
    shard_samples: int
    shard_bytes: int

    def settings(self) -> dict[str, Any]:
        """What a finished shard's bytes depend on beside its sources."""
        return {
            "packer": PACKER,
            "recipe": self.recipe.name,
            "split": self.split,
            "scales": list(SCALES),
            "shard": [self.shard_samples, self.shard_bytes],
            "encoder": _encoder(),
        }


def pack(
    recipe: Recipe,
    source: Path | None,
    out: Path,
    *,
    on_error: OnError = "stop",
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Index]:
    """Pack `recipe` into `out`, or each of its splits into a folder of its own in `out`; return the indices by split.

    Goes on where a killed run stopped; a data set that is complete already is left alone. Raises UserError for bad
    images (unless `on_error` is "skip"), for an `out` that holds something else (unless `overwrite`), for a full disk.
    """
    by_split = find_sources(recipe, source)
    _check_layout(out, split=list(by_split) != [UNSPLIT])
    done = {}
    for split, sources in by_split.items():
        folder = out if split == UNSPLIT else out / split
        job = _Job(recipe, split, folder, on_error, max_pixels, shard_samples, shard_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            done[split] = _pack_split(job, sources, overwrite, workers or min(4, os.cpu_count() or 1))
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: is a file; choose another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{folder}: the disk is full; free some space and run the same command again (finished shards are kept)"
            ) from None
    return done


def _pack_split(job: _Job, sources: list[Source], overwrite: bool, workers: int) -> Index:
    folder = job.folder
    for leftover in (".shard-*.tar.*.tmp", "..shard-*.json.*.tmp", f".{INDEX_NAME}.*.tmp"):  # of a run that was killed
        remove(folder.glob(leftover))
    if (folder / INDEX_NAME).exists():
        complete = None if overwrite else _complete(job, sources)
        if complete is not None:
            remove_sidecars(folder)
            say(f"{folder}: already holds these {len(complete.samples)} images, nothing to do")
            return complete
        _clear(folder)
    state = _resume(job, sources, overwrite)
    started, kept = time.monotonic(), len(state.samples)
    label = f"packing {_title(job.recipe.name, job.split)}"
    with (
        Progress(label, total=len(sources), done=len(state.digests), unit="images") as progress,
        closing(_outcomes(job, sources, len(state.digests), workers, progress)) as outcomes,
    ):
        _write_shards(job, state, outcomes)
    if not state.samples:
        raise UserError(f"{folder}: none of the {len(sources)} images could be packed; see the warnings above")
    index = Index(
        recipe=job.recipe.name,
        split=job.split,
        kind="lr-hr",
        scales=SCALES,
        licence=job.recipe.licence,
        origin=job.recipe.origin,
        shards=tuple(state.shards),
        samples=tuple(state.samples),
        skipped=tuple(state.skipped),
        notes=_notes(state.digests),
    )
    index.save(folder)
    remove_sidecars(folder)
    _report(index, folder, kept, time.monotonic() - started)
    return index


def _outcomes(job: _Job, sources: list[Source], first: int, workers: int, progress: Progress) -> Generator[_Outcome]:
    """The sources from position `first` on, in order, made ahead by threads (PNG and resize release Python's lock)."""
    waiting: deque[tuple[Source, int, Future[PackedImage]]] = deque()
    ahead, in_flight, position = deque(sources[first:]), 0, first
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    try:
        while ahead or waiting:
            while ahead and len(waiting) < 2 * workers:
                pixels = count_pixels(ahead[0].path)
                pixels = 0 if pixels > job.max_pixels else pixels  # refused before it is decoded
                if waiting and in_flight + pixels > _PIXELS_IN_FLIGHT:
                    break
                source = ahead.popleft()
                waiting.append((source, pixels, pool.submit(pack_image, source, job.max_pixels)))
                in_flight += pixels
            source, pixels, future = waiting.popleft()
            try:
                packed = future.result()
                outcome = _Outcome(position, packed.digest, packed)
            except UserError as error:
                if job.on_error == "stop":
                    raise UserError(f"{error} (or leave such images out with --on-error skip)") from None
                warn(f"skipped {error}")
                outcome = _Outcome(position, digest(source), None)
            yield outcome
            in_flight -= pixels
            position += 1
            progress.advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_shards(job: _Job, state: _State, outcomes: Iterator[_Outcome]) -> None:
    """Collect outcomes, a shard at a time, and write each shard; the cuts depend on the sources alone."""
    taken: list[_Outcome] = []
    count = length = 0
    for outcome in outcomes:
        if outcome.packed is not None:
            more = outcome.packed.length
            if count and (count == job.shard_samples or length + more > job.shard_bytes):
                _write_shard(job, state, taken, outcome.digest)
                taken, count, length = [], 0, 0
            count, length = count + 1, length + more
        taken.append(outcome)
    if count:
        _write_shard(job, state, taken, None)
    else:  # skipped ones after the last shard
        state.digests += [outcome.digest for outcome in taken]
        state.skipped += [outcome.digest[0] for outcome in taken]


def _write_shard(job: _Job, state: _State, taken: list[_Outcome], following: Digest | None) -> None:
    number = len(state.shards)
    path = job.folder / _shard_name(number)
    samples = []
    with replacing(path) as temporary:
        # USTAR with every field fixed: the bytes depend on names and contents alone.
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            position = 0
            for outcome in taken:
                if outcome.packed is None:
                    continue
                key, members = f"{outcome.position:06d}", {}
                for suffix, content, height, width in outcome.packed.members:
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size, header.mode = len(content), 0o644
                    tar.addfile(header, io.BytesIO(content))
                    if suffix != "json":
                        members[suffix] = Member(position + tarfile.BLOCKSIZE, len(content), height, width)
                    position += tarfile.BLOCKSIZE + padded(len(content))
                samples.append(Sample(key, outcome.digest[0], number, members))
        finished = FinishedShard(
            settings=job.settings(),
            max_pixels=job.max_pixels,
            shard=Shard(path.name, temporary.stat().st_size, sha256_file(temporary)),
            samples=tuple(samples),
            digests=tuple(outcome.digest for outcome in taken),
            skipped=tuple(outcome.digest[0] for outcome in taken if outcome.packed is None),
            following=following,
        )
        # Before the shard has its name: a shard without a sidecar is then never one of ours.
        write_sidecar(job.folder, finished)
    state.add(finished)


def _resume(job: _Job, sources: list[Source], overwrite: bool) -> _State:
    """Take over the finished shards that still fit, remove the others; UserError when they are not this data set's."""
    state, folder = _State(), job.folder
    sidecars = read_sidecars(folder)
    foreign = sorted(path.name for path in folder.glob("*.tar") if path.name not in sidecars)
    theirs = {_title(str(done.settings["recipe"]), str(done.settings["split"])) for done in sidecars.values() if done}
    theirs.discard(_title(job.recipe.name, job.split))
    if (foreign or theirs) and not overwrite:
        holds = f"a tar file that was not packed here ({foreign[0]})" if foreign else f"half of {theirs.pop()}"
        raise UserError(f"{folder}: holds {holds}; choose another --out, or replace it with --overwrite")
    for finished in sidecars.values():
        if finished is None or not _fits(job, state, finished, sources):
            break
        state.add(finished)
    if state.shards:
        say(f"{folder}: going on after {len(state.shards)} finished shards with {len(state.samples)} images")
    kept = {shard.name for shard in state.shards}
    for path in folder.glob("shard-*.tar"):
        if path.name not in kept:
            remove([path, sidecar_path(folder, path.name)])
    return state


def _fits(job: _Job, state: _State, finished: FinishedShard, sources: list[Source]) -> bool:
    """True when the shard is whole and was made, with the same settings, of the sources that come next."""
    if finished.settings != job.settings() or finished.shard.name != _shard_name(len(state.shards)):
        return False
    if finished.skipped and (job.on_error == "stop" or finished.max_pixels != job.max_pixels):
        return False
    # The image after the shard decided where it was cut.
    expected = [*finished.digests, *([finished.following] if finished.following else [])]
    first = len(state.digests)
    coming = sources[first : first + len(expected)] if finished.following else sources[first:]
    if [source.name for source in coming] != [name for name, _, _ in expected]:
        return False
    return list(map(digest, coming)) == expected and finished.is_whole(job.folder)


def _complete(job: _Job, sources: list[Source]) -> Index | None:
    """The index of `job.folder` when it holds just these sources, whole; None when a shard of it is damaged."""
    try:
        index = load_index(job.folder)
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from None
    same = (index.recipe, index.split, index.scales) == (job.recipe.name, job.split, SCALES)
    if not same or index.notes != _notes([digest(source) for source in sources]):
        what = "the same recipe with other images or another version" if same else _title(index.recipe, index.split)
        raise UserError(
            f"{job.folder}: holds another data set, {what}; choose another --out, or replace it with --overwrite"
        )
    for shard in index.shards:
        path = job.folder / shard.name
        if not matches(path, shard):
            warn(f"{path}: is damaged or missing; packing the data set again")
            return None
    return index


def _notes(digests: list[Digest]) -> dict[str, Any]:
    listing = json.dumps(digests, ensure_ascii=False).encode()
    return {
        "packer": PACKER,
        "resize": "MATLAB bicubic, antialiased, rounded half up",
        "sources_sha256": hashlib.sha256(listing).hexdigest(),
    }


def _check_layout(out: Path, *, split: bool) -> None:
    """An unsplit data set and splits in the same folder would hide each other."""
    if split and (out / INDEX_NAME).exists():
        raise UserError(f"{out}: holds a data set without splits; choose another --out")
    inside = sorted(path.parent.name for path in out.glob(f"*/{INDEX_NAME}"))
    if not split and inside:
        raise UserError(f"{out}: holds the splits {', '.join(inside)} of another data set; choose another --out")


def _clear(folder: Path) -> None:
    """Remove a packed data set, its index first: without it nobody takes the rest for whole."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    remove(folder.glob("shard-*.tar"))
    remove_sidecars(folder)


def _title(recipe: str, split: str) -> str:
    return recipe if split == UNSPLIT else f"{recipe}/{split}"


def _report(index: Index, folder: Path, kept: int, seconds: float) -> None:
    size = sum(shard.length for shard in index.shards) / 1e6
    again = f" ({kept} of them by an earlier run)" if kept else ""
    say(
        f"{folder}: {len(index.samples)} images{again}, shards: {len(index.shards)}, {size:.1f} MB, {seconds:.1f} s; "
        f"licence: {index.licence}"
    )
    if index.skipped:
        warn(f"{len(index.skipped)} images were skipped: {', '.join(index.skipped)}")


def _encoder() -> str:
    """What PNG's bytes depend on; shards of one data set must not mix encoders."""
    return f"Pillow {PIL.__version__}, zlib {features.version('zlib')}, zlib-ng {features.version('zlib_ng')}"


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"
