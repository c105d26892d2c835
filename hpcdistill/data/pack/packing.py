"""Packing: images into shards, with the same bytes every time, however many processes do it.

One sample of single images is `<key>.hr.png` (the whole image), `<key>.lr2.png`, `.lr3.png`, `.lr4.png` (HR cropped at
its top left corner to a multiple of s, then MATLAB's resize by one of its rules, or the official files) and
`<key>.json`. A sample of a paired or unpaired set is `<key>.a.*`, `<key>.b.*`, or `<key>.ab.*`, the source's own files,
and `<key>.json`; a shard of an unpaired set holds one side only. A finished shard is renamed into place beside a
sidecar (`.shard-00000.json`) that says what went into it; a packer that was killed takes the shards whose sidecars
still fit the sources and does the rest again. index.json is written when all shards are there, and only then.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import PIL
from PIL import features

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.disk import exclusive
from hpcdistill.data.fetch.location import is_whole
from hpcdistill.data.images import MAX_PIXELS, Colour
from hpcdistill.data.index import INDEX_NAME, Index, Kind, Sample, Shard, load_index, role_of
from hpcdistill.data.outputs import check_packing
from hpcdistill.data.pack.pack_pool import packed_ahead
from hpcdistill.data.pack.packed_image import SCALES, Form
from hpcdistill.data.pack.recipes import UNSPLIT, Recipe
from hpcdistill.data.pack.shard_files import (
    FinishedShard,
    PackedSource,
    read_sidecars,
    remove,
    remove_sidecars,
    shard_name,
    sidecar_path,
    write_shard,
)
from hpcdistill.data.pack.sources import Digest, Source, find_sources, image_folders, source_digest, unread
from hpcdistill.data.progress import ProgressBar
from hpcdistill.errors import UserError, plural
from hpcdistill.ops.downsampling import ResizeRule

# Raised when the same sources would give other bytes. A set that is there is completed, and mended, by its own packer.
FIRST_PACKER = 1  # all but super-resolution; there: LR images of rule `exact` or official ones, a gray HR made RGB
PACKER = 2  # of super-resolution: the rule of the LR images stands in the index, a gray HR stays gray
SHARD_SAMPLES = 256
SHARD_BYTES = 128 << 20

OnError = Literal["stop", "skip"]


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
class _SplitPacking:
    recipe: Recipe
    split: str
    folder: Path
    on_error: OnError
    max_pixels: int
    processes: int | None
    shard_samples: int
    shard_bytes: int
    official_lr: bool
    packer: int
    resize: ResizeRule  # of LR images that are computed
    flatten: Colour | None

    @property
    def kind(self) -> Kind:
        return self.recipe.kind

    @property
    def form(self) -> Form:
        return Form(self.resize, keeps_gray=self.packer >= PACKER)

    @property
    def lr(self) -> str | None:
        """As `Index.lr` will have it."""
        if self.kind != "lr-hr":
            return None
        return "official" if self.official_lr else self.resize

    def settings(self) -> dict[str, Any]:
        """What a finished shard's bytes depend on beside its sources."""
        settings = {
            "packer": self.packer,
            "recipe": self.recipe.name,
            "split": self.split,
            "kind": self.kind,
            "official_lr": self.official_lr,
            "shard": [self.shard_samples, self.shard_bytes],
            # What PNG's bytes depend on; shards of one data set must not mix encoders.
            "encoder": f"Pillow {PIL.__version__}, zlib {features.version('zlib')}, "
            f"zlib-ng {features.version('zlib_ng')}",
        }
        return settings | self.resized() | self.flattened()

    def resized(self) -> dict[str, Any]:
        """The rule of the LR images; nothing where the packer has but one, or they are the official ones."""
        return {"lr": self.resize} if self.packer >= PACKER and not self.official_lr else {}

    def flattened(self) -> dict[str, Any]:
        """What transparent pixels were laid over; nothing where they are refused."""
        return {"flatten": "#{:02x}{:02x}{:02x}".format(*self.flatten)} if self.flatten else {}


def pack(
    recipe: Recipe,
    source: Path | None,
    out: Path,
    *,
    on_error: OnError = "stop",
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    official_lr: bool = False,
    resize: ResizeRule | None = None,
    recursive: bool = False,
    flatten: Colour | None = None,
    processes: int | None = None,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Index]:
    """Pack `recipe` into `out`, or each of its splits into a folder of its own in `out`; return the indices by split.

    Goes on where a killed run stopped; a data set that is complete already is left alone. `official_lr` packs the LR
    images that came with the set in place of computed ones, whose rule is `resize` (None: that of the set or of another
    split in `out`, unless `overwrite`, else `newer`); `recursive` packs those in folders below, too; `flatten` lays
    transparent pixels over that colour. `processes`: see `pack_pool.packed_ahead`; a training process passes 1. Raises
    UserError for bad images (unless `on_error` is "skip"), for an `out` that holds something else (unless `overwrite`)
    or the images themselves (always), for a full disk.
    """
    by_split = find_sources(recipe, source, official_lr=official_lr, recursive=recursive, background=flatten)
    folders = {split: out if split == UNSPLIT else out / split for split in by_split}
    root, inputs = image_folders(recipe, source, recursive=recursive)
    check_packing(
        out, [*folders.values()], [source or root, root, *inputs], splits=UNSPLIT not in folders, overwrite=overwrite
    )
    for line in unread(recipe, source, recursive=recursive):
        warn(line)
    done = {}
    for split, sources in by_split.items():
        folder = folders[split]
        there = None if overwrite else _there([folder, *folders.values()])
        packer, rule = _packer(recipe.kind, official_lr, resize, there)
        job = _SplitPacking(
            recipe,
            split,
            folder,
            on_error,
            max_pixels,
            processes,
            shard_samples,
            shard_bytes,
            official_lr,
            packer,
            rule,
            flatten,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Two first runs of an array both find that a set is missing: the second then finds it whole.
            with exclusive(folder / ".packing.lock", f"{folder}: another process is packing into it; waiting"):
                done[split] = _pack_split(job, sources, overwrite)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: is a file; choose another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{folder}: the disk is full; free some space and run the same command again (finished shards are kept)"
            ) from None
    return done


def _there(folders: Iterable[Path]) -> Index | None:
    """The first of these packed sets that there is and that can be read."""
    for folder in folders:
        with suppress(UserError):
            return load_index(folder)
    return None


def _packer(kind: Kind, official_lr: bool, resize: ResizeRule | None, there: Index | None) -> tuple[int, ResizeRule]:
    """The packer for a set, and the rule of its LR images; `there`: what is to be completed, or is beside it."""
    if kind != "lr-hr":
        return FIRST_PACKER, "newer"
    rule: ResizeRule = resize or "newer"
    if resize is None and there is not None and there.lr in get_args(ResizeRule):
        rule = cast(ResizeRule, there.lr)
    if official_lr:
        first = there is not None and there.lr == "official" and there.notes.get("packer") == FIRST_PACKER
    else:
        first = rule == "exact"
    return FIRST_PACKER if first else PACKER, rule


def _pack_split(job: _SplitPacking, sources: list[Source], overwrite: bool) -> Index:
    folder = job.folder
    for leftover in (".shard-*.tar.*.tmp", "..shard-*.json.*.tmp", f".{INDEX_NAME}.*.tmp"):  # of a run that was killed
        remove(folder.glob(leftover))
    if (folder / INDEX_NAME).exists():
        complete = None if overwrite else _complete(job, sources)
        if complete is not None:
            remove_sidecars(folder)
            count = len(complete.samples)
            these = "this image" if count == 1 else f"these {count} images"
            say(f"{folder}: already holds {these}{_lr_said(complete)}, nothing to do")
            return complete
        (folder / INDEX_NAME).unlink(missing_ok=True)  # first: without it nobody takes the rest for whole
        remove(folder.glob("shard-*.tar"))
        remove_sidecars(folder)
    state = _resume(job, sources, overwrite)
    started, kept = time.monotonic(), len(state.samples)
    label = f"packing {_title(job.recipe.name, job.split)}"
    with (
        ProgressBar(label, total=len(sources), done=len(state.digests), unit="images") as progress,
        closing(_outcomes(job, sources, len(state.digests), progress)) as outcomes,
    ):
        _write_shards(job, state, outcomes)
    if not state.samples:
        raise UserError(f"{folder}: none of the {len(sources)} images could be packed; see the warnings above")
    index = Index(
        recipe=job.recipe.name,
        split=job.split,
        kind=job.kind,
        scales=_scales(sources),
        licence=job.recipe.licence,
        origin=job.recipe.origin,
        shards=tuple(state.shards),
        samples=tuple(state.samples),
        skipped=tuple(state.skipped),
        notes=_notes(job, sources, state.digests),
    )
    index.save(folder)
    remove_sidecars(folder)
    _report(index, folder, kept, time.monotonic() - started)
    return index


def _outcomes(job: _SplitPacking, sources: list[Source], first: int, progress: ProgressBar) -> Generator[PackedSource]:
    """What becomes of the sources from position `first` on, in order."""
    with closing(packed_ahead(sources[first:], job.kind, job.max_pixels, job.processes, job.form)) as made:
        for position, packed in enumerate(made, first):
            if isinstance(packed, UserError):
                if job.on_error == "stop":
                    raise UserError(f"{packed} (or leave such images out with --on-error skip)")
                warn(f"skipped {packed}")
                yield PackedSource(position, source_digest(sources[position]), None)
            else:
                yield PackedSource(position, packed.digest, packed)
            progress.advance()


def _write_shards(job: _SplitPacking, state: _State, outcomes: Iterator[PackedSource]) -> None:
    """Collect outcomes, a shard at a time, and write each shard; the cuts depend on the sources alone.

    A shard holds one combination of roles, so that the sides of an unpaired set can be read by themselves.
    """
    taken: list[PackedSource] = []
    roles: tuple[str, ...] = ()
    count = length = 0
    for outcome in outcomes:
        if outcome.packed is not None:
            more = outcome.packed.length
            full = count == job.shard_samples or length + more > job.shard_bytes
            if count and (full or outcome.packed.roles != roles):
                _write(job, state, taken, outcome.digest)
                taken, count, length = [], 0, 0
            count, length, roles = count + 1, length + more, outcome.packed.roles
        taken.append(outcome)
    if count:
        _write(job, state, taken, None)
    else:  # skipped ones after the last shard
        state.digests += [outcome.digest for outcome in taken]
        state.skipped += [outcome.digest[0] for outcome in taken]


def _write(job: _SplitPacking, state: _State, taken: list[PackedSource], following: Digest | None) -> None:
    state.add(write_shard(job.folder, len(state.shards), job.settings(), job.max_pixels, taken, following))


def _resume(job: _SplitPacking, sources: list[Source], overwrite: bool) -> _State:
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
        say(
            f"{folder}: going on after {plural(len(state.shards), 'finished shard')} with "
            f"{plural(len(state.samples), 'image')}"
        )
    kept = {shard.name for shard in state.shards}
    for path in folder.glob("shard-*.tar"):
        if path.name not in kept:
            remove([path, sidecar_path(folder, path.name)])
    return state


def _fits(job: _SplitPacking, state: _State, finished: FinishedShard, sources: list[Source]) -> bool:
    """True when the shard is whole and was made, with the same settings, of the sources that come next."""
    if finished.settings != job.settings() or finished.shard.name != shard_name(len(state.shards)):
        return False
    if finished.skipped and (job.on_error == "stop" or finished.max_pixels != job.max_pixels):
        return False
    # The image after the shard decided where it was cut.
    expected = [*finished.digests, *([finished.following] if finished.following else [])]
    first = len(state.digests)
    coming = sources[first : first + len(expected)] if finished.following else sources[first:]
    if [source.name for source in coming] != [name for name, _, _ in expected]:
        return False
    packed = [source for source in coming[: len(finished.digests)] if source.name not in finished.skipped]
    if len(packed) != len(finished.samples) or not all(map(_has_roles, finished.samples, packed)):
        return False
    return list(map(source_digest, coming)) == expected and is_whole(job.folder / finished.shard.name, finished.shard)


def _has_roles(sample: Sample, source: Source) -> bool:
    """True when the sample was made of a source of the same side: A and B may have been swapped since."""
    return set(source.roles) <= {role_of(suffix) for suffix in sample.members}


def _complete(job: _SplitPacking, sources: list[Source]) -> Index | None:
    """The index of `job.folder` when it holds just these sources, whole; None when a shard of it is damaged."""
    try:
        index = load_index(job.folder)
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from None
    same = (index.recipe, index.split, index.kind) == (job.recipe.name, job.split, job.kind)
    if not same or index.notes != _notes(job, sources, [source_digest(source) for source in sources]):
        what = "the same recipe with other images or another version" if same else _title(index.recipe, index.split)
        if same and index.lr != job.lr:
            what = f"the same recipe with LR images of rule {index.lr}, not {job.lr}"
        raise UserError(
            f"{job.folder}: holds another data set, {what}; choose another --out, or replace it with --overwrite"
        )
    for shard in index.shards:
        if not is_whole(job.folder / shard.name, shard):
            warn(f"{job.folder / shard.name}: is damaged or missing; packing the data set again")
            return None
    return index


def _notes(job: _SplitPacking, sources: list[Source], digests: list[Digest]) -> dict[str, Any]:
    listing: list[Any] = list(digests)
    if job.kind == "unpaired":  # a digest does not say which side its image is on
        listing = [(*source.roles, *listed) for source, listed in zip(sources, digests, strict=True)]
    notes: dict[str, Any] = {"packer": job.packer}
    if job.kind == "lr-hr":
        each = "" if job.resize == "exact" else " after each pass"
        notes["resize"] = "official" if job.official_lr else f"MATLAB bicubic, antialiased, rounded half up{each}"
        notes |= job.resized()
    notes |= job.flattened()
    notes["sources_sha256"] = hashlib.sha256(json.dumps(listing, ensure_ascii=False).encode()).hexdigest()
    return notes


def _scales(sources: list[Source]) -> tuple[int, ...]:
    """The scales of the LR images: the official ones that there are, or those that are computed."""
    roles = sources[0].roles
    if roles[0] != "hr":
        return ()
    return tuple(sorted(int(role.removeprefix("lr")) for role in roles[1:])) or SCALES


def _title(recipe: str, split: str) -> str:
    return recipe if split == UNSPLIT else f"{recipe}/{split}"


def _lr_said(index: Index) -> str:
    return f", LR images {index.lr}" if index.lr else ""


def _report(index: Index, folder: Path, kept: int, seconds: float) -> None:
    size = sum(shard.length for shard in index.shards) / 1e6
    again = f" ({kept} of them by an earlier run)" if kept else ""
    say(
        f"{folder}: {plural(len(index.samples), 'image')}{again}, shards: {len(index.shards)}, {size:.1f} MB, "
        f"{seconds:.1f} s{_lr_said(index)}; licence: {index.licence}"
    )
    if index.skipped:
        were = "was" if len(index.skipped) == 1 else "were"
        warn(f"{plural(len(index.skipped), 'image')} {were} skipped: {', '.join(index.skipped)}")
