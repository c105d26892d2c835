"""The two sides of an image-to-image set, resized: decoded at every draw (`none`) or once and kept (`ram`).

Both give the same bits: 8-bit RGB at the size that crops are taken from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.fetch.location import join
from hpcdistill.data.index import Index, Kind, Sample, Shard
from hpcdistill.data.read.augmentation import Rgb, resized
from hpcdistill.data.read.cache import PackedImages, check_memory, load_all
from hpcdistill.errors import UserError

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
        check_sides([str(folder) for folder in folders], indices, kind)
        self.packed = PackedImages(folders, indices, _ROLES, channels=3)
        self.load_size = load_size
        self.paired = kind == "paired"
        one, other = _pairs(self.packed) if self.paired else (_whole(self.packed, "a"), _whole(self.packed, "b"))
        self.domains = (one, other) if direction == "AtoB" else (other, one)

    @property
    def bytes(self) -> int:
        """What all resized images take, as 8-bit RGB."""
        return sum(len(domain) for domain in self.domains) * self.load_size**2 * 3

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
        return resized(self.stored(domain, number), self.load_size)

    def stored(self, domain: int, number: int) -> Rgb:
        """That image in the size that it has, [H, W, 3]."""
        side = self.domains[domain]
        place = side.place(number)
        pixels = self.packed.decode(*place)
        return half(pixels, side.role) if place[0] == _AB else pixels

    def name(self, domain: int, number: int) -> str:
        """The file that an image came from, without its suffix."""
        place, row = self.domains[domain].place(number)
        return Path(self.packed.sample(row, place)[1]).stem

    def names(self, domain: int) -> list[str]:
        """What images of a domain, or made of them, are saved as: with their numbers first where two share a name."""
        names = [self.name(domain, number) for number in range(len(self.domains[domain]))]
        if len(set(names)) == len(names):
            return names
        return [f"{number:06d}-{name}" for number, name in enumerate(names)]

    def _side(self, domain: Domain, place: tuple[int, int], pixels: Rgb) -> Rgb:
        if place[0] == _AB:
            pixels = half(pixels, domain.role)
        return resized(pixels, self.load_size)


class ResizedImages:
    """All images decoded and resized once, one flat array for each domain (cache `ram`); forked workers share it."""

    def __init__(self, images: DomainImages) -> None:
        """Load everything. UserError, before anything is decoded, when it does not fit in memory."""
        side, sizes = images.load_size, [len(domain) for domain in images.domains]
        check_memory(images.bytes, sum(sizes))
        # Colours apart, as in a batch: cutting a crop out takes 110 us instead of 160, over both flips.
        flat = [np.empty((size, 3, side, side), np.uint8) for size in sizes]
        self._views = tuple(array.transpose(0, 2, 3, 1) for array in flat)

        def keep(domain: int, number: int, rgb: Rgb) -> None:
            self._views[domain][number] = rgb

        resize_all(images, keep)

    def both(self, first: int, second: int) -> tuple[Rgb, Rgb]:
        """Views into the kept images, no copy; see `DomainSource`."""
        return self._views[0][first], self._views[1][second]


def resize_all(images: DomainImages, keep: Callable[[int, int, Rgb], None]) -> None:
    """`keep(domain, number, rgb [L, L, 3])` of all images, from several threads; closes the shards."""
    size, other = (len(domain) for domain in images.domains)

    def load_pair(number: int) -> None:
        for domain, rgb in enumerate(images.both(number, number)):
            keep(domain, number, rgb)

    def load_one(number: int) -> None:
        domain, place = (0, number) if number < size else (1, number - size)
        keep(domain, place, images.load(domain, place))

    pixels = images.bytes // 3
    if images.paired:
        load_all(load_pair, size, pixels)
    else:
        load_all(load_one, size + other, pixels)
    images.packed.close()


def half(pixels: Rgb, role: str) -> Rgb:
    """The side `role` ("a" or "b") of a pair that is one image, side by side."""
    middle = pixels.shape[1] // 2
    return pixels[:, :middle] if role == "a" else pixels[:, middle:]


def _whole(packed: PackedImages, role: Literal["a", "b"]) -> Domain:
    image = _ROLES.index(role)
    rows = np.arange(packed.images[image].samples.size)
    return Domain(role, np.full(rows.size, image), rows)


def _pairs(packed: PackedImages) -> tuple[Domain, Domain]:
    """Both sides of each sample."""
    rows = np.full((3, len(packed.sources)), -1)
    for image, place in enumerate(packed.images):
        rows[image, place.samples] = np.arange(place.samples.size)
    joined = rows[_AB] >= 0
    return (
        Domain("a", np.where(joined, _AB, _A), np.where(joined, rows[_AB], rows[_A])),
        Domain("b", np.where(joined, _AB, _B), np.where(joined, rows[_AB], rows[_B])),
    )


def check_sides(places: Sequence[str], indices: Sequence[Index], kind: Kind) -> None:
    """UserError when a domain of an unpaired set is empty, or what should be a pair is none."""
    if kind == "paired":
        for place, index in zip(places, indices, strict=True):
            for sample in index.samples:
                _check_pair(place, index.shards[sample.shard], sample)
        return
    for role in ("a", "b"):
        if not any(sample.member(role) for index in indices for sample in index.samples):
            raise UserError(f"{', '.join(places)}: no images of domain {role}; pack the data set again")


def _check_pair(place: str, shard: Shard, sample: Sample) -> None:
    remedy = "take it out of the source and pack the data set again"
    label = f"{join(place, shard.name)}: pair '{sample.source}'"
    a, b, both = (sample.member(role) for role in _ROLES)
    if both:
        if both.width % 2:
            size = f"{both.width}x{both.height}"
            raise UserError(f"{label} is {size}, an odd width that has no two halves; {remedy}")
    elif not a or not b:
        raise UserError(f"{place}: sample '{sample.source}' has no image '{'b' if a else 'a'}'; {remedy}")
    elif (a.width, a.height) != (b.width, b.height):
        raise UserError(f"{label} has a of {a.width}x{a.height} and b of {b.width}x{b.height}; {remedy}")
