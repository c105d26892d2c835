"""Folders of images: which files are taken for images, and one line about those that are not read."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from hpcdistill.errors import plural

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp")
# Images to most people, but not read here: a folder's are counted and named.
UNREAD = (
    ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".apng", ".dib", ".ico", ".tga",
    ".psd", ".svg", ".exr", ".hdr", ".pbm", ".pgm", ".ppm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
    ".raf", ".rw2", ".npy", ".npz", ".mat",
)  # fmt: skip
_FOLDERS = 1000  # below a folder that are looked into for images that nobody asked for


def other_suffixes(folder: Path, *, recursive: bool = False) -> dict[str, int]:
    """Suffixes of the files in `folder` that are images to most people but are not read here, with their counts."""
    return dict(Counter(e.suffix.lower() for e in entries(folder, recursive) if e.suffix.lower() in UNREAD))


def left_out(folder: Path, take_folders: str, *, recursive: bool = False, apart: Collection[Path] = ()) -> str | None:
    """One line about images below `folder` that are not read as its own, with the remedies; None when there are none.

    They are in folders in it, which `take_folders` says how to have read, or of other formats. `apart` are folders
    that are read by themselves.
    """
    parts, remedies = [], []
    # Only what is not called an image is asked what it is: that would be a look at the disk for each of thousands.
    others = (entry for entry in entries(folder) if entry.suffix.lower() not in SUFFIXES)
    for inner in [] if recursive else sorted(filter(Path.is_dir, others)):
        if any(other == inner or inner in other.parents for other in apart):
            continue
        if count := _images_below(inner):
            parts.append(f"{inner.name}/ ({plural(count, 'image')})")
            remedies = [take_folders]
    if counts := other_suffixes(folder, recursive=recursive):
        parts += [plural(count, f"{suffix} file") for suffix, count in sorted(counts.items())]
        remedies.append("convert files to PNG")
    return f"{folder}: not read: {', '.join(parts)}; {', '.join(remedies)}" if parts else None


def beside(folder: Path, taken: Path) -> str | None:
    """One line about images in `folder` itself, where those of its folder `taken` are read; None for none."""
    if taken == folder:
        return None
    count = sum(map(_is_image, entries(folder)))
    return f"{folder}: not read: {plural(count, 'image')} beside {taken.name}/" if count else None


def _images_below(folder: Path) -> int:
    """How many images there are in `folder` and below it; 0 when it is locked."""
    try:
        several = list(itertools.islice(folders_below(folder), _FOLDERS))
        return sum(_is_image(entry) for one in several for entry in entries(one))
    except PermissionError:
        return 0


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in SUFFIXES and entry.is_file()


def entries(folder: Path, recursive: bool = False) -> Iterator[Path]:
    """What is in `folder`, or in it and all folders below, without what is hidden."""
    for one in folders_below(folder) if recursive else (folder,):
        yield from (entry for entry in one.iterdir() if not entry.name.startswith("."))


def folders_below(folder: Path) -> Iterator[Path]:
    """`folder` and all below it, each once, however links lead around; hidden and locked ones are left out."""
    seen, waiting = set(), [folder]
    while waiting:
        one = waiting.pop()
        if (real := os.path.realpath(one)) in seen:
            continue
        seen.add(real)
        try:
            inner = [entry for entry in entries(one) if entry.is_dir()]
        except PermissionError:
            if one == folder:
                raise
            continue
        yield one
        waiting += sorted(inner, reverse=True)
