"""The two sides of an image-to-image set, resized: decoded at every draw (`none`) or once and kept (`ram`).

Both give the same bits: 8-bit RGB at the size that crops are taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.index import Index, Kind
from hpcdistill.data.read.augmentation import resized
from hpcdistill.data.read.cache import PackedImages, check_memory, load_all
from hpcdistill.errors import UserError

Rgb = NDArray[np.uint8]  # [H, W, 3]

_ROLES = ("a", "b", "ab")
_A, _B, _AB = range(3)


@dataclass(frozen=True)
class Domain:
    """The images of one side of the set, one after the other; of pairs, both sides have the same order."""

    role: Literal["a", "b"]
    images: NDArray[np.int64]  # position in `PackedImages.images`: where its pixels are, "ab" or the role itself
    rows: NDArray[np.int64]  # row in `PackedImages.images[...]`

    def __len__(self) -> int:
        return self.rows.size

    def place(self, number: int) -> tuple[int, int]:
        """Image and row, as `PackedImages.decode` takes them."""
        return int(self.images[number]), int(self.rows[number])


class DomainSource(Protocol):
    """Hands out the resized images of a set's two domains."""

    def both(self, first: int, second: int) -> tuple[Rgb, Rgb]:
        """Image `first` of what is translated and image `second` of what it is translated to: [L, L, 3] each."""


class DomainImages:
    """Packed image-to-image sets, joined: reads, decodes and resizes at every draw (cache `none`)."""

    def __init__(
        self, folders: Sequence[Path], indices: Sequence[Index], kind: Kind, direction: str, load_size: int
    ) -> None:
        """`direction` BtoA exchanges the domains. UserError when one is empty or what should be a pair is none."""
        self.packed = PackedImages(folders, indices, _ROLES, channels=3, everywhere=False)
        self.load_size = load_size
        self.paired = kind == "paired"
        one, other = _pairs(self.packed) if self.paired else (_whole(self.packed, "a"), _whole(self.packed, "b"))
        if not len(one) or not len(other):
            names = ", ".join(map(str, folders))
            raise UserError(f"{names}: no images of domain {'a' if not len(one) else 'b'}; pack the data set again")
        self.domains = (one, other) if direction == "AtoB" else (other, one)

    def both(self, first: int, second: int) -> tuple[Rgb, Rgb]:
        """Read, decode and resize; a side-by-side pair is decoded once. See `DomainSource`."""
        one, other = self.domains
        place, partner = one.place(first), other.place(second)
        pixels = self.packed.decode(*place)
        source = self._side(one, place, pixels)
        if partner != place:
            pixels = self.packed.decode(*partner)
        return source, self._side(other, partner, pixels)

    def load(self, domain: int, number: int) -> Rgb:
        """One image, [L, L, 3]: `domain` 0 is what is translated, 1 what it is translated to."""
        side = self.domains[domain]
        place = side.place(number)
        return self._side(side, place, self.packed.decode(*place))

    def _side(self, domain: Domain, place: tuple[int, int], pixels: Rgb) -> Rgb:
        if place[0] == _AB:
            half = pixels.shape[1] // 2
            pixels = pixels[:, :half] if domain.role == "a" else pixels[:, half:]
        return resized(pixels, self.load_size)


class ResizedImages:
    """All images decoded and resized once, one flat array for each domain (cache `ram`); forked workers share it."""

    def __init__(self, images: DomainImages) -> None:
        """Load everything. UserError, before anything is decoded, when it does not fit in memory."""
        side, sizes = images.load_size, [len(domain) for domain in images.domains]
        check_memory(sum(sizes) * side * side * 3, sum(sizes))
        # Colours apart, as in a batch: cutting a crop out takes 110 us instead of 160, over both flips.
        flat = [np.empty((size, 3, side, side), np.uint8) for size in sizes]
        self._views = tuple(array.transpose(0, 2, 3, 1) for array in flat)

        def load_pair(number: int) -> None:
            self._views[0][number], self._views[1][number] = images.both(number, number)

        def load_one(number: int) -> None:
            domain, place = (0, number) if number < sizes[0] else (1, number - sizes[0])
            self._views[domain][place] = images.load(domain, place)

        pixels = sum(sizes) * side * side
        if images.paired:
            load_all(load_pair, sizes[0], pixels)
        else:
            load_all(load_one, sum(sizes), pixels)
        images.packed.close()

    def both(self, first: int, second: int) -> tuple[Rgb, Rgb]:
        """Views into the kept images, no copy; see `DomainSource`."""
        return self._views[0][first], self._views[1][second]


def _whole(packed: PackedImages, role: Literal["a", "b"]) -> Domain:
    image = _ROLES.index(role)
    rows = np.arange(packed.images[image].samples.size)
    return Domain(role, np.full(rows.size, image), rows)


def _pairs(packed: PackedImages) -> tuple[Domain, Domain]:
    """Both sides of each sample; UserError where one is missing or they do not show the same place."""
    rows = np.full((3, len(packed.sources)), -1)
    for image, place in enumerate(packed.images):
        rows[image, place.samples] = np.arange(place.samples.size)
    _check_pairs(packed, rows)
    joined = rows[_AB] >= 0
    return (
        Domain("a", np.where(joined, _AB, _A), np.where(joined, rows[_AB], rows[_A])),
        Domain("b", np.where(joined, _AB, _B), np.where(joined, rows[_AB], rows[_B])),
    )


def _check_pairs(packed: PackedImages, rows: NDArray[np.int64]) -> None:
    remedy = "take it out of the source and pack the data set again"
    a, b, ab = packed.images
    for row in np.flatnonzero(ab.widths % 2).tolist():
        path, source = packed.sample(row, _AB)
        size = f"{ab.widths[row]}x{ab.heights[row]}"
        raise UserError(f"{path}: pair '{source}' is {size}, an odd width that has no two halves; {remedy}")
    for sample in np.flatnonzero(rows[_AB] < 0).tolist():
        one, other = int(rows[_A, sample]), int(rows[_B, sample])
        source = packed.sources[sample]
        if one < 0 or other < 0:
            missing = "a" if one < 0 else "b"
            raise UserError(f"{packed.paths[0].parent}: sample '{source}' has no image '{missing}'; {remedy}")
        sizes = [f"{place.widths[row]}x{place.heights[row]}" for place, row in ((a, one), (b, other))]
        if sizes[0] != sizes[1]:
            path, source = packed.sample(one, _A)
            raise UserError(f"{path}: pair '{source}' has a of {sizes[0]} and b of {sizes[1]}; {remedy}")
