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
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import cast, get_args

from hpcdistill.console import say, warn
from hpcdistill.data.fetch.disk import exclusive
from hpcdistill.data.images import MAX_PIXELS, Colour
from hpcdistill.data.index import INDEX_NAME, Index, Kind, load_index
from hpcdistill.data.outputs import check_packing
from hpcdistill.data.pack.pack_pool import packed_ahead
from hpcdistill.data.pack.packed_before import resume, whole_set
from hpcdistill.data.pack.packed_image import SCALES
from hpcdistill.data.pack.recipes import UNSPLIT, Recipe
from hpcdistill.data.pack.shard_files import (
    PackedSource,
    remove,
    remove_sidecars,
    write_shard,
)
from hpcdistill.data.pack.sources import Digest, Source, find_sources, image_folders, source_digest, unread
from hpcdistill.data.pack.split import FIRST_PACKER, PACKER, OnError, SplitPacking, State, lr_said, notes_of, title_of
from hpcdistill.data.progress import ProgressBar
from hpcdistill.errors import UserError, plural
from hpcdistill.ops.downsampling import ResizeRule

SHARD_SAMPLES = 256
SHARD_BYTES = 128 << 20


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
        job = SplitPacking(
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


def _pack_split(job: SplitPacking, sources: list[Source], overwrite: bool) -> Index:
    folder = job.folder
    for leftover in (".shard-*.tar.*.tmp", "..shard-*.json.*.tmp", f".{INDEX_NAME}.*.tmp"):  # of a run that was killed
        remove(folder.glob(leftover))
    if (folder / INDEX_NAME).exists():
        complete = None if overwrite else whole_set(job, sources)
        if complete is not None:
            remove_sidecars(folder)
            count = len(complete.samples)
            these = "this image" if count == 1 else f"these {count} images"
            say(f"{folder}: already holds {these}{lr_said(complete)}, nothing to do")
            return complete
        (folder / INDEX_NAME).unlink(missing_ok=True)  # first: without it nobody takes the rest for whole
        remove(folder.glob("shard-*.tar"))
        remove_sidecars(folder)
    state = resume(job, sources, overwrite)
    started, kept = time.monotonic(), len(state.samples)
    label = f"packing {title_of(job.recipe.name, job.split)}"
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
        notes=notes_of(job, sources, state.digests),
    )
    index.save(folder)
    remove_sidecars(folder)
    _report(index, folder, kept, time.monotonic() - started)
    return index


def _outcomes(job: SplitPacking, sources: list[Source], first: int, progress: ProgressBar) -> Generator[PackedSource]:
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


def _write_shards(job: SplitPacking, state: State, outcomes: Iterator[PackedSource]) -> None:
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


def _write(job: SplitPacking, state: State, taken: list[PackedSource], following: Digest | None) -> None:
    state.add(write_shard(job.folder, len(state.shards), job.settings(), job.max_pixels, taken, following))


def _scales(sources: list[Source]) -> tuple[int, ...]:
    """The scales of the LR images: the official ones that there are, or those that are computed."""
    roles = sources[0].roles
    if roles[0] != "hr":
        return ()
    return tuple(sorted(int(role.removeprefix("lr")) for role in roles[1:])) or SCALES


def _report(index: Index, folder: Path, kept: int, seconds: float) -> None:
    size = sum(shard.length for shard in index.shards) / 1e6
    again = f" ({kept} of them by an earlier run)" if kept else ""
    say(
        f"{folder}: {plural(len(index.samples), 'image')}{again}, shards: {len(index.shards)}, {size:.1f} MB, "
        f"{seconds:.1f} s{lr_said(index)}; licence: {index.licence}"
    )
    if index.skipped:
        were = "was" if len(index.skipped) == 1 else "were"
        warn(f"{plural(len(index.skipped), 'image')} {were} skipped: {', '.join(index.skipped)}")
