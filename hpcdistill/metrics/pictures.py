"""A folder of pictures that some program has made of a test set's images: which is whose, and read to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcdistill.data.folders import list_images
from hpcdistill.data.images import Colour, is_gray, read_rgb
from hpcdistill.errors import UserError, plural

_NAMED = 5  # images that a message names


class Pictures:
    """The picture of each of `names`, by the rule of `matched`: 8 bits, gray made RGB, opaque.

    UserError when one is missing, or not certain.
    """

    def __init__(self, folder: Path, names: Sequence[str], background: Colour | None = None) -> None:
        self.folder = folder
        self._names = tuple(names)
        self._files = matched(folder, list_images(folder), names)
        self._background = background

    def read(self, number: int, height: int, width: int, wanted: str) -> Tensor:
        """The picture of image `number`, uint8 `[3, height, width]`.

        UserError for one that cannot be read, has 16 bits a channel, or another size: `wanted` says why this one.
        """
        file = self._files[number]
        pixels = read_rgb(file, str(file), background=self._background)
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"{file}: is {pixels.shape[1]}x{pixels.shape[0]}, not {width}x{height}, as {self._names[number]} is "
                f"{wanted}"
            )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def is_gray(self, number: int) -> bool:
        """Whether the file of that picture stores gray."""
        return is_gray(self._files[number])


def first_side(folder: Path) -> int:
    """Height and width of the first picture in `folder`; UserError when it is no square."""
    file = list_images(folder)[0]
    height, width, _ = read_rgb(file, str(file)).shape
    if height != width:
        raise UserError(
            f"{file}: is {width}x{height}; translations are measured as squares, as networks make them of the test "
            "images: give such pictures"
        )
    return int(height)


def matched(folder: Path, files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The file of each image: that of its name or, where there is none, the only one whose name goes on with an affix.

    An affix begins with neither a letter nor a digit (`baby_x4`, `baby-ours`), or is `x` and a digit (`babyx4`). A file
    belongs to the longest name that it fits. UserError, with the images, where a picture is missing or not certain.
    """
    found: dict[str, list[Path]] = {name: [] for name in names}
    longer: dict[str, list[Path]] = {name: [] for name in names}
    for file in files:
        if file.stem in found:
            found[file.stem].append(file)
            continue
        fits = [name for name in names if file.stem.startswith(name) and _is_affix(file.stem[len(name) :])]
        if fits:
            longer[max(fits, key=len)].append(file)
    chosen = {name: found[name] or longer[name] for name in names}
    if missing := [name for name in names if not chosen[name]]:
        few = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise UserError(
            f"{folder}: no picture of {len(missing)} of {plural(len(names), 'image')} ({few}); give each the name of "
            "its image, e.g. baby.png or baby_x4.png"
        )
    for name, candidates in chosen.items():
        if len(candidates) > 1:
            those = ", ".join(file.name for file in candidates[:_NAMED])
            raise UserError(f"{folder}: several pictures of {name} ({those}); leave one of them in the folder")
    return [chosen[name][0] for name in names]


def _is_affix(rest: str) -> bool:
    return not rest[0].isalnum() or (rest[0] in "xX" and rest[1:2].isdigit())
