"""What the reader `stream` makes of the samples as they come in: the same batches as the indexed readers."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, below, draw
from hpcdistill.data.images import read_packed
from hpcdistill.data.index import Member, Sample
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.augmentation import OPERATIONS, place_crop, place_patch, resized, scratch
from hpcdistill.data.read.checks import check_crop
from hpcdistill.data.read.loader import Batch
from hpcdistill.data.read.reader import check_patch, usable_samples
from hpcdistill.data.read.shard_stream import PlacedShard
from hpcdistill.errors import UserError
from hpcdistill.ops.colour import luma_uint8

Rgb = NDArray[np.uint8]  # [H, W, 3]
Listed = Sequence[tuple[str, Sample]]  # all samples of the joined data sets: (the data set, the sample)


@dataclass(frozen=True)
class Taken:
    """A sample as it came in: the files of the roles that are needed, not decoded yet."""

    sample: Sample
    shard: PlacedShard
    contents: dict[str, bytes]  # by role

    def image(self, role: str) -> Rgb:
        """Decode one; UserError when it cannot be, or has another size than in the index."""
        label = f"{self.shard.label}: {role} of sample '{self.sample.source}'"
        content, member = self.contents[role], _member(self.shard.place, self.sample, role)
        return read_packed(content, (member.height, member.width), label, self.shard.remedy)


class BatchMaker(Protocol):
    """Which samples are streamed, and what a batch of them is."""

    @property
    def domains(self) -> Sequence[tuple[Set[str], Set[int]]]:
        """Of each stream that is read side by side: the roles that are needed, and the samples by position."""
        ...

    def batch(self, first: int, taken: Sequence[Sequence[Taken]]) -> Batch:
        """Draws `first`, `first` + 1, ... made of `taken`, one sequence for each of `domains`."""
        ...


class PatchMaker:
    """lr-hr: patches at the same place of HR and its LR images; see `data.read.reader.PatchReader`."""

    def __init__(self, listed: Listed, needs: Needs, config: DataConfig, seed: int) -> None:
        """UserError when a patch does not fit, unless such images are to be left out."""
        self._side = config.patch
        self._grid = math.lcm(needs.scale, *needs.lr_scales)
        check_patch(config.patch, self._grid)
        self._names = ("hr", *(f"lr{scale}" for scale in needs.lr_scales))
        self._scales = (1, *needs.lr_scales)
        sizes = np.array([self._size(place, sample) for place, sample in listed], np.int64)
        sources = [sample.source for _, sample in listed]
        usable = usable_samples(lambda n: listed[n][0], sources, sizes[:, 0], sizes[:, 1], config, self._grid)
        self.domains = [(frozenset(self._names), frozenset(usable.tolist()))]
        self._seed = seed
        self._channels = needs.channels
        self._operations = OPERATIONS[config.flip, config.rotate]
        self._scratch = scratch(needs.channels, config.patch)

    def batch(self, first: int, taken: Sequence[Sequence[Taken]]) -> Batch:
        (samples,) = taken
        words = draw(self._seed, AUGMENTATION, np.arange(first, first + len(samples)))
        sizes = np.array([self._size(one.shard.place, one.sample) for one in samples], np.int64)
        starts = (sizes - self._side) // self._grid + 1
        tops = (below(words[0], starts[:, 0]) * self._grid).tolist()
        lefts = (below(words[1], starts[:, 1]) * self._grid).tolist()
        operations = [self._operations[n] for n in below(words[2], len(self._operations)).tolist()]
        batch: Batch = {}
        for name, scale in zip(self._names, self._scales, strict=True):
            side = self._side // scale
            batch[name] = torch.empty(len(samples), self._channels, side, side)
            space = self._scratch[:, :side, :side]
            for target, one, top, left, operation in zip(
                batch[name].numpy(), samples, tops, lefts, operations, strict=True
            ):
                rgb = one.image(name)[top // scale : top // scale + side, left // scale : left // scale + side]
                pixels = luma_uint8(rgb)[None] if self._channels == 1 else rgb.transpose(2, 0, 1)
                place_patch(pixels, operation, space, target)
        return batch

    def _size(self, place: str, sample: Sample) -> tuple[int, int]:
        """Height and width that all images of a sample cover, HR pixels."""
        members = [_member(place, sample, name) for name in self._names]
        scaled = list(zip(members, self._scales, strict=True))
        return min(m.height * scale for m, scale in scaled), min(m.width * scale for m, scale in scaled)


class CropMaker:
    """paired, unpaired: crops of resized images; see `data.read.translation.TranslationReader`."""

    def __init__(self, listed: Listed, needs: Needs, config: DataConfig, seed: int) -> None:
        """UserError when the crop does not fit, a domain is empty, or what should be a pair is none."""
        check_crop(config.load_size, config.crop)
        self._roles = ("a", "b") if config.direction == "AtoB" else ("b", "a")
        self._paired = needs.kind == "paired"
        if self._paired:
            for place, sample in listed:
                _check_pair(place, sample)
            self.domains = [(frozenset(("a", "b", "ab")), frozenset(range(len(listed))))]
        else:
            self.domains = [
                (frozenset((role,)), frozenset(n for n, (_, sample) in enumerate(listed) if sample.member(role)))
                for role in self._roles
            ]
            for (role,), members in self.domains:
                if not members:
                    names = ", ".join(dict.fromkeys(place for place, _ in listed))
                    raise UserError(f"{names}: no images of domain {role}; pack the data set again")
        self._seed = seed
        self._load_size = config.load_size
        self._crop = config.crop
        self._flips = 2 if config.flip else 1

    def batch(self, first: int, taken: Sequence[Sequence[Taken]]) -> Batch:
        count = len(taken[0])
        if self._paired:
            pairs = [self._halves(one) for one in taken[0]]
            images = [[pair[side] for pair in pairs] for side in range(2)]
        else:
            images = [[one.image(role) for one in of] for role, of in zip(self._roles, taken, strict=True)]
        batch: Batch = {}
        for part, name in enumerate(("a", "b")):
            # A pair is cropped and mirrored together, two unpaired images each for itself.
            words = draw(self._seed, AUGMENTATION, np.arange(first, first + count), part=0 if self._paired else part)
            starts = self._load_size - self._crop + 1
            tops, lefts = below(words[0], starts).tolist(), below(words[1], starts).tolist()
            flips = below(words[2], self._flips).tolist()
            batch[name] = torch.empty(count, 3, self._crop, self._crop)
            for target, rgb, top, left, flip in zip(batch[name].numpy(), images[part], tops, lefts, flips, strict=True):
                place_crop(resized(rgb, self._load_size), top, left, bool(flip), target)
        return batch

    def _halves(self, one: Taken) -> tuple[Rgb, Rgb]:
        """What is translated and what it is translated to."""
        if "ab" not in one.contents:
            return one.image(self._roles[0]), one.image(self._roles[1])
        both = one.image("ab")
        half = both.shape[1] // 2
        sides = {"a": both[:, :half], "b": both[:, half:]}
        return sides[self._roles[0]], sides[self._roles[1]]


def _member(place: str, sample: Sample, role: str) -> Member:
    member = sample.member(role)
    if member is None:
        raise UserError(f"{place}: sample '{sample.source}' has no image '{role}'; pack the data set again")
    return member


def _check_pair(place: str, sample: Sample) -> None:
    remedy = "take it out of the source and pack the data set again"
    both = sample.member("ab")
    if both is None:
        sizes = [f"{m.width}x{m.height}" for m in (_member(place, sample, role) for role in ("a", "b"))]
        if sizes[0] != sizes[1]:
            raise UserError(f"{place}: pair '{sample.source}' has a of {sizes[0]} and b of {sizes[1]}; {remedy}")
    elif both.width % 2:
        size = f"{both.width}x{both.height}"
        raise UserError(f"{place}: pair '{sample.source}' is {size}, an odd width that has no two halves; {remedy}")
