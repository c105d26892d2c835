"""Folders of images: which files are taken for images, and one line about those that are not read.

Reading a configuration looks into them: neither NumPy nor Pillow is imported for that.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from hpcdistill.errors import UserError, plural

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp")
# Images to most people, but not read here: a folder's are counted and named.
UNREAD = (
    ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".apng", ".dib", ".ico", ".tga",
    ".psd", ".svg", ".exr", ".hdr", ".pbm", ".pgm", ".ppm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
    ".raf", ".rw2", ".npy", ".npz", ".mat",
)  # fmt: skip
_FOLDERS = 1000  # below a folder that are looked into for images that nobody asked for


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The images in `folder`, in natural order (`img2` before `img10`), the same on every machine.

    `recursive`: those of all folders below it too. Hidden files and folders and other suffixes are left out (see
    `left_out`). Raises UserError when there is no such folder or no image in it.
    """
    if not folder.is_dir():
        state = "is a file, not a folder of images" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {state}; check the path")
    found = list(entries(folder, recursive))
    named = [entry for entry in found if entry.suffix.lower() in SUFFIXES]
    images = [entry for entry in named if entry.is_file()]
    for entry in named:
        if entry.is_symlink() and not entry.exists():
            raise UserError(f"{entry}: is a link to a file that is not there; mend or remove it")
    if not images:
        hint = f"expected files ending in {', '.join(SUFFIXES)}"
        folders = sorted(entry.name for entry in found if has_images(entry))
        other = other_suffixes(folder)
        if folders:
            hint = f"its folders {', '.join(folders[:5])} have some: name one of them"
        elif other:
            hint = f"{hint}, found {', '.join(sorted(other))}: convert them to PNG"
        raise UserError(f"{folder}: no images in this folder; {hint}")
    names = {path: path.relative_to(folder).as_posix() for path in images}
    for name in names.values():
        if not name.isprintable() or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{folder}: the file name {name!a} cannot be written as text; rename the file")
    return sorted(images, key=lambda path: _natural(names[path]))


def other_suffixes(folder: Path, *, recursive: bool = False) -> dict[str, int]:
    """Suffixes of the files in `folder` that are images to most people but are not read here, with their counts."""
    return dict(Counter(e.suffix.lower() for e in entries(folder, recursive) if e.suffix.lower() in UNREAD))


def has_images(folder: Path, *, recursive: bool = False) -> bool:
    """True for a folder with an image in it, or below it."""
    return folder.is_dir() and any(map(_is_image, entries(folder, recursive)))


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


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


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
