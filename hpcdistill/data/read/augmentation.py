"""Crops, flips and rotations: what a draw's random words make of images, and the batches that come of it.

`Patches` are those of `lr-hr` sets, `PairCrops` those of image-to-image sets, for the indexed readers and the stream:
what a draw does depends on the seed and its number alone, and not on how its images are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpcdistill.console import warn
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, below, draw
from hpcdistill.data.index import Index, Sample
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.ops.colour import luma_uint8

Rgb = NDArray[np.uint8]  # [H, W, 3]
Planes = NDArray[Any]  # [C, H, W]: float32 luma (C = 1) or uint8 RGB (C = 3)
Draws = NDArray[np.int64]  # [numbers of a draw, draws]

# An element of the square's symmetry group: transpose first, then reverse rows, then reverse columns.
TRANSPOSE, REVERSE_ROWS, REVERSE_COLUMNS = 1, 2, 4
_HALF_TURN = REVERSE_ROWS | REVERSE_COLUMNS
OPERATIONS: dict[tuple[bool, bool], tuple[int, ...]] = {  # (flip, rotate) -> what a draw chooses from
    (False, False): (0,),
    (True, False): (0, REVERSE_COLUMNS),
    (False, True): (0, TRANSPOSE | REVERSE_ROWS, _HALF_TURN, TRANSPOSE | REVERSE_COLUMNS),
    (True, True): tuple(range(8)),
}


class Patches:
    """Augmented square patches of `lr-hr` sets, at the same place of HR and its LR images."""

    def __init__(
        self, places: Sequence[str], indices: Sequence[Index], needs: Needs, config: DataConfig, seed: int
    ) -> None:
        """Of the data sets at `places`, joined. UserError when an image is missing, or a patch does not fit.

        `data.on_error=skip` leaves out, and names, the images that are smaller than the patch.
        """
        self.side = config.patch
        # Patches start on this grid, so that they lie at the same place of HR and of every LR image.
        self._grid = math.lcm(needs.scale, *needs.lr_scales)
        if config.patch % self._grid:
            valid = max(1, round(config.patch / self._grid)) * self._grid
            raise UserError(
                f"data.patch={config.patch} is not a multiple of {self._grid} (the scales of the images read); "
                f"use {valid}"
            )
        self.names = ("hr", *(f"lr{scale}" for scale in needs.lr_scales))
        self.scales = (1, *needs.lr_scales)
        self.channels = needs.channels
        self._seed = seed
        self._operations = np.array(OPERATIONS[config.flip, config.rotate])
        self._scratch = _scratch(needs.channels, config.patch)
        samples = [(place, sample) for place, index in zip(places, indices, strict=True) for sample in index.samples]
        self.sizes = np.array([self.size(place, sample) for place, sample in samples], np.int64)  # [N, 2]
        fits = self.sizes.min(axis=1) >= config.patch
        self.usable = np.flatnonzero(fits)  # int64: the samples that are trained on
        if not fits.all():
            self._leave_out([samples[number] for number in np.flatnonzero(~fits)], config.on_error)

    def size(self, place: str, sample: Sample) -> tuple[int, int]:
        """Height and width that all images of a sample of the set `place` cover, HR pixels."""
        sides = []
        for name, scale in zip(self.names, self.scales, strict=True):
            member = sample.member(name)
            if member is None:
                raise UserError(f"{place}: sample '{sample.source}' has no image '{name}'; pack the data set again")
            sides.append((member.height * scale, member.width * scale))
        return min(height for height, _ in sides), min(width for _, width in sides)

    def draws(self, first: int, sizes: NDArray[np.int64]) -> Draws:
        """Top, left (HR pixels) and operation of draws `first`, `first` + 1, ..., of samples of `sizes` [N, 2]."""
        rows, columns, operations, _ = draw(self._seed, AUGMENTATION, np.arange(first, first + len(sizes)))
        starts = (sizes - self.side) // self._grid + 1  # how many places on the grid a patch can start at
        tops, lefts = below(rows, starts[:, 0]) * self._grid, below(columns, starts[:, 1]) * self._grid
        return np.stack((tops, lefts, self._operations[below(operations, len(self._operations))]))

    def batch(self, draws: Draws, cut: Callable[[int, int, int, int, int], Planes]) -> dict[str, Tensor]:
        """Patches `[N, C, P, P]` of each of `names`, in [0, 1]; `draws` are the sample, top, left and operation.

        `cut(image, sample, top, left, side)` gives the pixels of image number `image` of `names`.
        """
        samples, tops, lefts, operations = draws.tolist()
        batch: dict[str, Tensor] = {}
        for image, (name, scale) in enumerate(zip(self.names, self.scales, strict=True)):
            side = self.side // scale
            batch[name] = torch.empty(len(samples), self.channels, side, side)
            space = self._scratch[:, :side, :side]
            for target, sample, top, left, operation in zip(
                batch[name].numpy(), samples, tops, lefts, operations, strict=True
            ):
                place_patch(cut(image, sample, top // scale, left // scale, side), operation, space, target)
        return batch

    def _leave_out(self, small: Sequence[tuple[str, Sample]], on_error: str) -> None:
        """Name the samples that are smaller than the patch; UserError unless they may be skipped."""
        if on_error == "skip" and self.usable.size:
            names = ", ".join(sample.source for _, sample in small)
            are = f"{len(small)} of {len(self.sizes)} images {'is' if len(small) == 1 else 'are'}"
            warn(f"data.on_error=skip: {are} smaller than the patch, left out: {names}")
            return
        place, first = small[0]
        height, width = self.size(place, first)
        others = f" (and {len(small) - 1} more)" if len(small) > 1 else ""
        fitting = int(self.sizes.min()) // self._grid * self._grid
        remedy = f"use data.patch={fitting} or less" if fitting else "leave such images out of the data set"
        if self.usable.size:
            remedy += ", or data.on_error=skip to train without them"
        raise UserError(
            f"{place}: image '{first.source}' is {width}x{height}{others}, smaller than data.patch={self.side}; "
            f"{remedy}"
        )


class PairCrops:
    """Random crops of images that are resized to a square; a pair is cropped and mirrored together."""

    def __init__(self, config: DataConfig, seed: int, paired: bool) -> None:
        """UserError when the crop is larger than what the images are resized to."""
        if config.crop > config.load_size:
            raise UserError(
                f"data.crop={config.crop} is larger than data.load_size={config.load_size}; "
                f"use data.crop={config.load_size}, or resize to more"
            )
        self._load_size, self.crop = config.load_size, config.crop
        self._flips = 2 if config.flip else 1
        self._seed = seed
        self._paired = paired

    def draws(self, first: int, count: int) -> tuple[Draws, Draws]:
        """Top, left (pixels of the resized image) and flip (0 or 1) of both images of `count` draws: [3, N] each."""
        a = self._one(first, count, 0)
        return a, a if self._paired else self._one(first, count, 1)

    def _one(self, first: int, count: int, part: int) -> Draws:
        rows, columns, flips, _ = draw(self._seed, AUGMENTATION, np.arange(first, first + count), part)
        starts = self._load_size - self.crop + 1  # rows, or columns, that a crop can start at
        return np.stack((below(rows, starts), below(columns, starts), below(flips, self._flips)))

    def batch(self, images: Iterable[tuple[Rgb, Rgb]], a: Draws, b: Draws) -> dict[str, Tensor]:
        """`{"a": ..., "b": ...}`, `[N, 3, crop, crop]` in [-1, 1], of N `images` and what `draws` says of them."""
        batch = {name: torch.empty(a.shape[1], 3, self.crop, self.crop) for name in ("a", "b")}
        targets = batch["a"].numpy(), batch["b"].numpy()
        for number, (both, *drawn) in enumerate(zip(images, a.T.tolist(), b.T.tolist(), strict=True)):
            for target, rgb, (top, left, flip) in zip(targets, both, drawn, strict=True):
                place_crop(resized(rgb, self._load_size), top, left, bool(flip), target[number])
        return batch


def planes_of(rgb: Rgb, channels: int) -> Planes:
    """`[H, W, 3]` as what patches are cut from: luma without rounding (`ops.colour`) for 1 channel, RGB for 3."""
    return luma_uint8(rgb)[None] if channels == 1 else rgb.transpose(2, 0, 1)


def _scratch(channels: int, side: int) -> Planes:
    """Space for one patch; its rows are an odd number of cache lines apart, so that a column spreads over the cache."""
    dtype = np.dtype(np.float32 if channels == 1 else np.uint8)
    lines = math.ceil(side * dtype.itemsize / 64) | 1
    return np.empty((channels, side, lines * 64 // dtype.itemsize), dtype)


def place_patch(pixels: Planes, operation: int, scratch: Planes, target: NDArray[np.float32]) -> None:
    """Write `pixels` [C, P, P], turned by `operation` and scaled to [0, 1], to `target` [C, P, P].

    `scratch` is [C, P, P], of the pixels' type.
    """
    if operation & ~REVERSE_ROWS:
        # Reading columns or backwards is slow from the image, whose rows are far apart, and fast from the scratch that
        # the processor's cache holds: 38 us instead of 61 to 141 for a luma patch of 192.
        np.copyto(scratch, pixels)
        pixels = scratch
    if operation & TRANSPOSE:
        pixels = pixels.transpose(0, 2, 1)
    if operation & REVERSE_ROWS:
        pixels = pixels[:, ::-1]
    if operation & REVERSE_COLUMNS:
        pixels = pixels[:, :, ::-1]
    if pixels.dtype == np.uint8:
        np.divide(pixels, 255, out=target, dtype=np.float32)
    else:
        np.copyto(target, pixels)


def resized(rgb: Rgb, side: int) -> Rgb:
    """`[H, W, 3]` to `[side, side, 3]` by Pillow's antialiased bicubic; the sides' ratio is not kept (as CycleGAN)."""
    if rgb.shape[:2] == (side, side):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))


def place_crop(image: Rgb, top: int, left: int, flipped: bool, target: NDArray[np.float32]) -> None:
    """Write the crop of `image` `[H, W, 3]` at (top, left), mirrored if `flipped`, to `target` [3, C, C] in [-1, 1]."""
    side = target.shape[-1]
    crop = image[top : top + side, left : left + side].transpose(2, 0, 1)
    if flipped:
        crop = crop[:, :, ::-1]
    np.divide(crop, 127.5, out=target, dtype=np.float32)
    target -= 1
