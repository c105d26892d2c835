"""The indexed reader: item k is this rank's batch of optimizer step k, whatever was read before.

The order of the samples and the augmentation of a draw are functions of the seed and the draw's number. So any number
of ranks and workers sees the same global batches, and a resumed run replays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpcdistill.console import warn
from hpcdistill.data.augmentation import OPERATIONS, place_patch, scratch
from hpcdistill.data.cache import DecodedImages, PackedImages, PatchSource
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, below, draw
from hpcdistill.data.index import Index, load_index
from hpcdistill.data.loader import StepLoader
from hpcdistill.data.needs import Needs
from hpcdistill.data.order import SampleOrder
from hpcdistill.errors import UserError

Draws = tuple[list[int], list[int], list[int], list[int]]

_DRAWS_AT_ONCE = 512  # numbers for a batch of 16 alone take 110 us, a fifth of copying its patches


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
        _check_batch_size(batch_size, ranks)
        if not folders:
            raise UserError("data.train: names no data set; give a packed folder, e.g. data.train=packed/bsd/train")
        indices = [load_index(folder) for folder in folders]
        for folder, index in zip(folders, indices, strict=True):
            _check_index(folder, index, needs)
        self.size_of_patch = config.patch
        self._grid = math.lcm(needs.scale, *needs.lr_scales)
        _check_patch(config.patch, self._grid)

        self.names = ("hr", *(f"lr{scale}" for scale in needs.lr_scales))
        self._scales = (1, *needs.lr_scales)
        packed = PackedImages(folders, indices, self.names, needs.channels)
        heights = np.min([p.heights * s for p, s in zip(packed.images, self._scales, strict=True)], axis=0)
        widths = np.min([p.widths * s for p, s in zip(packed.images, self._scales, strict=True)], axis=0)
        self._usable = _usable_samples(packed, heights, widths, config, self._grid)
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
        self._block: tuple[int, Draws] | None = None  # only a cache: the reader has no state
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
        block = first - first % _DRAWS_AT_ONCE
        if first + count > block + _DRAWS_AT_ONCE:
            return self._draw(first, count)
        if self._block is None or self._block[0] != block:
            self._block = (block, self._draw(block, _DRAWS_AT_ONCE))
        samples, tops, lefts, operations = self._block[1]
        part = slice(first - block, first - block + count)
        return samples[part], tops[part], lefts[part], operations[part]

    def _draw(self, first: int, count: int) -> Draws:
        samples = self._usable[self.order.indices(first, count)]
        words = draw(self.seed, AUGMENTATION, np.arange(first, first + count))
        tops = below(words[:, 0], self._rows[samples]) * self._grid
        lefts = below(words[:, 1], self._columns[samples]) * self._grid
        operations = self._operations[below(words[:, 2], len(self._operations))]
        return samples.tolist(), tops.tolist(), lefts.tolist(), operations.tolist()

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """The batches of steps first .. last - 1, in this order; see `StepLoader`."""
        return StepLoader(self, first, last, workers, pin_memory)


def _check_batch_size(batch_size: int, ranks: int) -> None:
    if batch_size % ranks:
        valid = max(1, batch_size // ranks) * ranks
        raise UserError(f"train.batch_size={batch_size} is global and cannot be cut over {ranks} ranks; use {valid}")


def _check_patch(patch: int, grid: int) -> None:
    if patch % grid:
        valid = max(1, round(patch / grid)) * grid
        raise UserError(f"data.patch={patch} is not a multiple of {grid} (the scales of the images read); use {valid}")


def _check_index(folder: Path, index: Index, needs: Needs) -> None:
    if index.kind != needs.kind:
        raise UserError(f"{folder}: holds {index.kind} samples, the method needs {needs.kind}; give another data.train")
    if not index.samples:
        raise UserError(f"{folder}: holds no samples; pack the data set again")
    missing = [scale for scale in needs.lr_scales if scale not in index.scales]
    if missing:
        scales = ", ".join(map(str, index.scales)) or "none"
        raise UserError(f"{folder}: has no LR images at scale {missing[0]} (it has: {scales}); pack it again with them")


def _usable_samples(
    packed: PackedImages, heights: NDArray[np.int64], widths: NDArray[np.int64], config: DataConfig, grid: int
) -> NDArray[np.int64]:
    """The samples that a patch fits into; the others end the run, or are left out and named (`data.on_error`)."""
    sides = np.minimum(heights, widths)
    small = np.flatnonzero(sides < config.patch)
    usable = np.flatnonzero(sides >= config.patch)
    if not small.size:
        return usable
    shard, source = packed.sample(int(small[0]))
    others = f" (and {small.size - 1} more)" if small.size > 1 else ""
    size = f"{widths[small[0]]}x{heights[small[0]]}"
    if config.on_error == "skip" and usable.size:
        names = ", ".join(packed.sources[sample] for sample in small.tolist())
        warn(f"data.on_error=skip: {small.size} of {sides.size} images are smaller than the patch, left out: {names}")
        return usable
    fitting = int(sides.min()) // grid * grid
    smaller = f"use data.patch={fitting} or less" if fitting else "leave such images out of the data set"
    remedy = f"{smaller}, or data.on_error=skip to train without them" if usable.size else smaller
    raise UserError(
        f"{shard.parent}: image '{source}' is {size}{others}, smaller than data.patch={config.patch}; {remedy}"
    )
