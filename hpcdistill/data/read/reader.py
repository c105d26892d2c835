"""The indexed reader: item k is this rank's batch of optimizer step k, whatever was read before.

The order of the samples and the augmentation of a draw are functions of the seed and the draw's number. So any number
of ranks and workers sees the same global batches, and a resumed run replays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpcdistill.console import warn
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, below, draw
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.augmentation import OPERATIONS, place_patch, scratch
from hpcdistill.data.read.cache import DecodedImages, PackedImages, PatchSource
from hpcdistill.data.read.checks import check_batch_size, load_indices
from hpcdistill.data.read.draws import DrawTable, Table
from hpcdistill.data.read.loader import StepLoader
from hpcdistill.data.read.order import SampleOrder
from hpcdistill.errors import UserError

Draws = tuple[list[int], list[int], list[int], list[int]]


class PatchReader(Dataset[dict[str, Tensor]]):
    """Training batches of augmented patches from packed data sets.

    `reader[k]` is a dict of float32 tensors `[batch_size / ranks, C, H, W]` in [0, 1], as `needs` describes. It holds
    this rank's contiguous slice of draws `k * batch_size` to `(k + 1) * batch_size - 1`. One channel is luma computed
    from the 8-bit RGB without rounding (`ops.colour`), three are RGB.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        needs: Needs,
        config: DataConfig,
        seed: int,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Join `folders`, check that they can deliver `needs`, and fill the cache that `config` asks for.

        `batch_size` is global. UserError when ranks do not divide it, a patch does not fit, or a shard is missing.
        """
        assert 0 <= rank < ranks
        check_batch_size(batch_size, ranks)
        indices = load_indices(folders, needs)
        self.size_of_patch = config.patch
        self._grid = math.lcm(needs.scale, *needs.lr_scales)
        check_patch(config.patch, self._grid)

        self.names = ("hr", *(f"lr{scale}" for scale in needs.lr_scales))
        self._scales = (1, *needs.lr_scales)
        packed = PackedImages(folders, indices, self.names, needs.channels)
        heights = np.min([p.heights * s for p, s in zip(packed.images, self._scales, strict=True)], axis=0)
        widths = np.min([p.widths * s for p, s in zip(packed.images, self._scales, strict=True)], axis=0)
        self._usable = usable_samples(
            lambda sample: str(packed.sample(sample)[0].parent), packed.sources, heights, widths, config, self._grid
        )
        self.samples = len(self._usable)
        # How many places on the grid a patch can start at; the grid keeps HR and every LR patch at the same place.
        self._rows = (heights - config.patch) // self._grid + 1
        self._columns = (widths - config.patch) // self._grid + 1

        self.order = SampleOrder(self.samples, seed, config.samples_per_epoch)
        self.seed = seed
        self.batch_size = batch_size
        self._rank = rank
        self._share = batch_size // ranks
        self._channels = needs.channels
        self._operations = np.array(OPERATIONS[config.flip, config.rotate])
        self._images: PatchSource = DecodedImages(packed) if config.cache == "ram" else packed
        self._table = DrawTable()
        self._scratch = scratch(needs.channels, config.patch)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.batch_size + self._rank * self._share
        samples, tops, lefts, operations = self.draws(first, self._share)
        batch: dict[str, Tensor] = {}
        for image, (name, scale) in enumerate(zip(self.names, self._scales, strict=True)):
            side = self.size_of_patch // scale
            batch[name] = torch.empty(self._share, self._channels, side, side)
            space = self._scratch[:, :side, :side]
            for target, sample, top, left, operation in zip(
                batch[name].numpy(), samples, tops, lefts, operations, strict=True
            ):
                patch = self._images.patch(image, sample, top // scale, left // scale, side)
                place_patch(patch, operation, space, target)
        return batch

    def draws(self, first: int, count: int) -> Draws:
        """Sample, top and left (HR pixels) and symmetry operation of draws first .. first + count - 1."""
        samples, tops, lefts, operations = self._table.rows(first, count, self._draw).tolist()
        return samples, tops, lefts, operations

    def _draw(self, first: int, count: int) -> Table:
        samples = self._usable[self.order.indices(first, count)]
        words = draw(self.seed, AUGMENTATION, np.arange(first, first + count))
        tops = below(words[0], self._rows[samples]) * self._grid
        lefts = below(words[1], self._columns[samples]) * self._grid
        operations = self._operations[below(words[2], len(self._operations))]
        return np.stack((samples, tops, lefts, operations))

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """The batches of steps first .. last - 1, in this order; see `StepLoader`."""
        return StepLoader(self, first, last, workers, pin_memory)


def check_patch(patch: int, grid: int) -> None:
    """UserError unless the HR patch is a whole number of pixels in every image that is read."""
    if patch % grid:
        valid = max(1, round(patch / grid)) * grid
        raise UserError(f"data.patch={patch} is not a multiple of {grid} (the scales of the images read); use {valid}")


def usable_samples(
    place: Callable[[int], str],
    sources: Sequence[str],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    config: DataConfig,
    grid: int,
) -> NDArray[np.int64]:
    """The samples that a patch fits into; the others end the run, or are left out and named (`data.on_error`).

    `place` tells the data set of a sample, `sources` the image it was made from; heights and widths are HR pixels.
    """
    sides = np.minimum(heights, widths)
    small = np.flatnonzero(sides < config.patch)
    usable = np.flatnonzero(sides >= config.patch)
    if not small.size:
        return usable
    first = int(small[0])
    others = f" (and {small.size - 1} more)" if small.size > 1 else ""
    size = f"{widths[first]}x{heights[first]}"
    if config.on_error == "skip" and usable.size:
        names = ", ".join(sources[sample] for sample in small.tolist())
        are = "is" if small.size == 1 else "are"
        warn(f"data.on_error=skip: {small.size} of {sides.size} images {are} smaller than the patch, left out: {names}")
        return usable
    fitting = int(sides.min()) // grid * grid
    smaller = f"use data.patch={fitting} or less" if fitting else "leave such images out of the data set"
    remedy = f"{smaller}, or data.on_error=skip to train without them" if usable.size else smaller
    raise UserError(
        f"{place(first)}: image '{sources[first]}' is {size}{others}, smaller than data.patch={config.patch}; {remedy}"
    )
