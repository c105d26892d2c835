"""The indexed reader of image-to-image sets: item k is this rank's batch of optimizer step k.

As in `data.read.reader`, everything is a function of the seed and the draw's number, whatever was read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, ORDER_OF_TARGETS, below, draw
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.augmentation import place_crop
from hpcdistill.data.read.checks import check_batch_size, check_crop, load_indices
from hpcdistill.data.read.domains import DomainImages, DomainSource, ResizedImages
from hpcdistill.data.read.draws import DrawTable, Table
from hpcdistill.data.read.loader import StepLoader
from hpcdistill.data.read.order import SampleOrder

# Position in the domain, top, left, flip: of image a, then of image b.
Draw = tuple[int, int, int, int, int, int, int, int]


class TranslationReader(Dataset[dict[str, Tensor]]):
    """Training batches from packed sets of pairs, or of two domains without pairs.

    `reader[k]` is `{"a": ..., "b": ...}`, float32 `[batch_size / ranks, 3, crop, crop]` in [-1, 1]: this rank's
    contiguous slice of draws `k * batch_size` to `(k + 1) * batch_size - 1`. Images are resized to `load_size` square
    (antialiased bicubic), cropped at random and mirrored at random; a pair is cropped and mirrored together.

    An epoch is every pair once. Without pairs it is every image of the larger domain once, beside images of the
    smaller, which are repeated until they suffice; the two are in random order independently of each other.
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

        `batch_size` is global. UserError when ranks do not divide it, the crop does not fit, a shard is missing, a
        domain is empty, or what should be a pair is none.
        """
        assert 0 <= rank < ranks
        assert needs.kind != "lr-hr"
        check_batch_size(batch_size, ranks)
        check_crop(config.load_size, config.crop)
        indices = load_indices(folders, needs)
        images = DomainImages(folders, indices, needs.kind, config.direction, config.load_size)
        sizes = [len(domain) for domain in images.domains]
        self.samples = max(sizes)
        epoch = config.samples_per_epoch or self.samples
        self.order = SampleOrder(sizes[0], seed, epoch)
        self.order_of_targets = None if images.paired else SampleOrder(sizes[1], seed, epoch, stream=ORDER_OF_TARGETS)
        self.seed = seed
        self.batch_size = batch_size
        self.crop = config.crop
        self._flip = config.flip
        self._starts = config.load_size - config.crop + 1  # rows, or columns, that a crop can start at
        self._rank = rank
        self._share = batch_size // ranks
        self._images: DomainSource = ResizedImages(images) if config.cache == "ram" else images
        self._table = DrawTable()

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.batch_size + self._rank * self._share
        batch = {name: torch.empty(self._share, 3, self.crop, self.crop) for name in ("a", "b")}
        a_targets, b_targets = batch["a"].numpy(), batch["b"].numpy()
        for number, (a, top, left, flip, b, b_top, b_left, b_flip) in enumerate(self.draws(first, self._share)):
            source, target = self._images.both(a, b)
            place_crop(source, top, left, bool(flip), a_targets[number])
            place_crop(target, b_top, b_left, bool(b_flip), b_targets[number])
        return batch

    def draws(self, first: int, count: int) -> list[Draw]:
        """What draws first .. first + count - 1 take; top and left are pixels of the resized image, flip is 0 or 1."""
        return [tuple(row) for row in self._table.rows(first, count, self._draw).T.tolist()]

    def _draw(self, first: int, count: int) -> Table:
        samples = self.order.indices(first, count)
        a = self._augmentation(first, count, 0)
        if self.order_of_targets is None:
            return np.stack((samples, *a, samples, *a))
        targets = self.order_of_targets.indices(first, count)
        return np.stack((samples, *a, targets, *self._augmentation(first, count, 1)))

    def _augmentation(self, first: int, count: int, part: int) -> Table:
        """Top, left and flip: int64 [3, count]."""
        words = draw(self.seed, AUGMENTATION, np.arange(first, first + count), part=part)
        flips = below(words[2], 2 if self._flip else 1)
        return np.stack((below(words[0], self._starts), below(words[1], self._starts), flips))

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """The batches of steps first .. last - 1, in this order; see `StepLoader`."""
        return StepLoader(self, first, last, workers, pin_memory)
