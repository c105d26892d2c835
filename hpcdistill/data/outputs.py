"""Folders that commands write to, looked at before anything is written: nobody's files are written over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcdistill.data.folders import SUFFIXES
from hpcdistill.data.images import encode_png
from hpcdistill.data.index import INDEX_NAME, load_index
from hpcdistill.errors import UserError
from hpcdistill.storage import write_bytes

_SOFTWARE = "hpcdistill"  # what a PNG that was saved here says; it may be replaced


def check_apart(out: Path, inputs: Iterable[Path], what: str, option: str) -> None:
    """UserError when `out` is one of the folders `inputs`, whatever links lead there.

    Messages say that it is `what`, and to name another `option`.
    """
    real = os.path.realpath(out)
    if any(real == os.path.realpath(path) for path in inputs):
        raise UserError(f"{option} {out}: is {what}; name another folder, nothing is written there")


def check_packing(
    out: Path, folders: Sequence[Path], inputs: Sequence[Path], *, splits: bool, overwrite: bool = False
) -> None:
    """UserError when the `folders` in `out`, one for each of the `splits`, cannot be packed into from `inputs`."""
    if splits and (out / INDEX_NAME).exists():
        raise UserError(f"{out}: holds a data set without splits; choose another --out")
    inside = sorted(path.parent.name for path in out.glob(f"*/{INDEX_NAME}"))
    if not splits and inside:  # they and an unsplit set in one folder would hide each other
        raise UserError(f"{out}: holds the splits {', '.join(inside)} of another data set; choose another --out")
    for folder in dict.fromkeys([out, *folders]):
        check_apart(folder, inputs, "where the images are that are packed", "--out")
    for folder in folders:
        check_unoccupied(folder, overwrite=overwrite)


def check_unoccupied(folder: Path, *, overwrite: bool = False) -> None:
    """UserError when `folder`, which is to be packed into, holds something else than what packing makes.

    Images are in the way even with `overwrite`; tar files and an index are `packing`'s to judge.
    """
    if not folder.is_dir() or any(folder.glob(".shard-*.json")) or _is_packed(folder):
        return
    entries = [path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".tar"]
    entries = [path for path in entries if path.name != INDEX_NAME]
    images = sorted(path.name for path in entries if path.suffix.lower() in SUFFIXES)
    if images:
        raise UserError(f"{folder}: holds images ({images[0]}), which are not packed among; choose another --out")
    if entries and not overwrite:
        name = min(path.name for path in entries)
        raise UserError(f"{folder}: holds {name}, which was not packed here; choose another --out, or add --overwrite")


def check_page(page: Path, option: str = "--out") -> None:
    """UserError when the web page that a report is to be written to is somebody else's."""
    if page.is_file() and b"hpcdistill" not in page.read_bytes():
        raise UserError(f"{option} {page.parent}: its {page.name} is not a report of hpcdistill; name another folder")


def check_images_out(folder: Path, names: Iterable[str], inputs: Iterable[Path], option: str = "--save-images") -> None:
    """UserError when images saved in `folder` under `names` would lie among the `inputs`, or replace foreign ones.

    `option` says in messages what named the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; name a folder")
    check_apart(folder, inputs, "where the images are that are evaluated", option)
    if (folder / INDEX_NAME).exists():
        raise UserError(f"{option} {folder}: is a packed data set; name another folder")
    for name in names:
        check_picture(image_path(folder, name), f"{option} {folder}")


def check_picture(path: Path, option: str) -> None:
    """UserError, which begins with the `option`, when there is a file at `path` that `save_image` did not write."""
    if path.exists() and not is_ours(path):
        raise UserError(f"{option}: {path.name} is there, and was not saved by this command; name another")


def save_image(folder: Path, name: str, image: NDArray[np.uint8]) -> None:
    """Write `[H, W, 3]` 8-bit RGB as a PNG that says where it comes from, once `check_images_out` has passed."""
    write_bytes(image_path(folder, name), encode_png(image, _SOFTWARE))


def image_path(folder: Path, name: str) -> Path:
    """Where `save_image` puts the image called `name`."""
    return folder / f"{name}.png"


def _is_packed(folder: Path) -> bool:
    """True for an index of ours: a gallery of photographs may have an index.json as well."""
    try:
        return bool(load_index(folder))
    except UserError:
        return False


def is_ours(path: Path) -> bool:
    """Whether it is a PNG that hpcdistill saved, which may be replaced."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False
