"""The readers: batches by optimizer step, of what a configuration and a method ask for.

Of an indexed reader item k is this rank's batch of step k, whatever was read before: the order of the samples and the
augmentation of a draw are functions of the seed and the draw's number. So any number of ranks and workers sees the same
global batches, and a resumed run replays nothing. The reader `stream` is less exact, see `data.read.stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from hpcdistill.data import held_out
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import ORDER_OF_TARGETS
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.fetch.transfer import shown
from hpcdistill.data.needs import Needs, load_indices
from hpcdistill.data.read.augmentation import Draws, PairCrops, Patches
from hpcdistill.data.read.cache import DecodedImages, FlatLayout, PackedImages, PatchSource
from hpcdistill.data.read.device import CPU, DeviceBatches, DeviceDomains, DevicePatches, chosen_cache
from hpcdistill.data.read.domains import DomainImages, DomainSource, ResizedImages
from hpcdistill.data.read.loader import Batch, StepLoader
from hpcdistill.data.read.order import BatchShare, Blocks, SampleOrder
from hpcdistill.data.read.staging import stage
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.errors import UserError


class Reader(Protocol):
    """Batches by optimizer step; `samples` draws are one pass over the data."""

    samples: int

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> Iterable[Batch]:
        """This rank's batches of the steps first .. last - 1."""
        ...


def open_reader(
    places: Sequence[str],
    needs: Needs,
    config: DataConfig,
    seed: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    stopping: Callable[[], bool] = lambda: False,
    device: torch.device = CPU,
) -> Reader:
    """The reader of the data sets at `places` (folders, or http(s) addresses) that `config` and `needs` ask for.

    With `data.stage` they are copied to node-local scratch first and read from there. `batch_size` is global; `device`
    is what trains, where `data.cache` may keep them.
    Raises StagingStopped when `stopping` says so while they are copied, UserError for an address that the indexed
    reader cannot read, and what the readers raise.
    """
    held_out.check_kind(config.held_out, needs.kind)
    if config.stage is not None:
        places = [str(stage(place, Path(config.stage), stopping)) for place in places]
    if config.reader == "stream":
        return StreamReader(places, needs, config, seed, batch_size, rank, ranks)
    for place in places:
        if is_remote(place):
            raise UserError(
                f"{shown(place)}: data.reader=indexed reads folders only; use data.reader=stream, or copy it here "
                "first with data.stage=FOLDER or `python shards/stage.py ADDRESS --to FOLDER`"
            )
    kind = PatchReader if needs.kind == "lr-hr" else TranslationReader
    return kind([Path(place) for place in places], needs, config, seed, batch_size, rank, ranks, device)


class IndexedReader(Dataset[Batch]):
    """`reader[k]` is this rank's slice of step k's batch: draws `k * batch_size` up to `(k + 1) * batch_size`."""

    samples: int

    def __init__(self, share: BatchShare) -> None:
        self._share = share
        self._drawn: Blocks[Draws] = Blocks(self._draws)
        self._on_device: DeviceBatches | None = None  # where the set is kept there

    def __getitem__(self, step: int) -> Batch:
        first, count = self._share.first(step), self._share.count
        return self._on_device(first, count) if self._on_device else self._batch(self.draws(first, count))

    def draws(self, first: int, count: int) -> Draws:
        """What draws first .. first + count - 1 take and do: int64, a row for each number of a draw."""
        return self._drawn(first, count)

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """The batches of steps first .. last - 1, in this order; see `StepLoader`.

        Of a set on the device they are made in this process: a forked one could not use the device.
        """
        if self._on_device:
            workers, pin_memory = 0, False
        return StepLoader(self, first, last, workers, pin_memory)

    def _draws(self, first: int, count: int) -> Draws:
        raise NotImplementedError

    def _batch(self, draws: Draws) -> Batch:
        raise NotImplementedError


class PatchReader(IndexedReader):
    """Batches of augmented patches from packed `lr-hr` sets: float32 `[batch_size / ranks, C, H, W]` in [0, 1].

    One channel is luma computed from the 8-bit RGB without rounding (`ops.colour`), three are RGB. A draw is a sample,
    top and left (HR pixels), and an operation of the square's symmetry group.
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
        device: torch.device = CPU,
    ) -> None:
        """Join `folders`, check that they can deliver `needs`, and fill the cache that `config` asks for.

        `batch_size` is global; `device` is what trains, see `data.read.device`. UserError when ranks do not divide the
        batch, a patch does not fit, or a shard is missing.
        """
        super().__init__(BatchShare(batch_size, rank, ranks))
        places = [str(folder) for folder in folders]
        indices = held_out.without(load_indices(places, needs), config.held_out)
        self._patches = Patches(places, indices, needs, config, seed)
        packed = PackedImages(folders, indices, self._patches.names, needs.channels)
        self.samples = len(self._patches.usable)
        self._order = SampleOrder(self.samples, seed, config.samples_per_epoch)
        layout = FlatLayout(packed)
        cache = chosen_cache(config.cache, layout.bytes, device)
        self._images: PatchSource = DecodedImages(packed, layout) if cache == "ram" else packed
        if cache == "device":
            kept = DevicePatches(packed, layout, self._patches, device)
            self._on_device = DeviceBatches(kept, self.draws, device)

    def _draws(self, first: int, count: int) -> Draws:
        samples = self._patches.usable[self._order.indices(first, count)]
        return np.stack((samples, *self._patches.draws(first, self._patches.sizes[samples])))

    def _batch(self, draws: Draws) -> Batch:
        return self._patches.batch(draws, self._images.patch)


class TranslationReader(IndexedReader):
    """Batches from packed sets of pairs, or of two domains without pairs: `{"a": ..., "b": ...}`.

    Each is float32 `[batch_size / ranks, 3, crop, crop]` in [-1, 1]. Images are resized to `load_size` square
    (antialiased bicubic), cropped at random and mirrored at random; a pair is cropped and mirrored together.

    An epoch is every pair once. Without pairs it is every image of the larger domain once, beside images of the
    smaller, which are repeated until they suffice; the two are in random order independently of each other. A draw is
    the position in the domain, top, left (pixels of the resized image) and flip of image a, then of image b.
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
        device: torch.device = CPU,
    ) -> None:
        """Join `folders`, check that they can deliver `needs`, and fill the cache that `config` asks for.

        `batch_size` is global; `device` is what trains, see `data.read.device`. UserError when ranks do not divide the
        batch, the crop does not fit, a shard is missing, a domain is empty, or what should be a pair is none.
        """
        super().__init__(BatchShare(batch_size, rank, ranks))
        self._crops = PairCrops(config, seed, paired=needs.kind == "paired")
        indices = load_indices([str(folder) for folder in folders], needs)
        images = DomainImages(folders, indices, needs.kind, config.direction, config.load_size)
        a, b = (len(domain) for domain in images.domains)
        self.samples = max(a, b)
        epoch = config.samples_per_epoch or self.samples
        self._order = SampleOrder(a, seed, epoch)
        self._order_of_targets = None if images.paired else SampleOrder(b, seed, epoch, stream=ORDER_OF_TARGETS)
        cache = chosen_cache(config.cache, images.bytes, device)
        self._images: DomainSource = ResizedImages(images) if cache == "ram" else images
        if cache == "device":
            self._on_device = DeviceBatches(DeviceDomains(images, self._crops, device), self.draws, device)

    def _draws(self, first: int, count: int) -> Draws:
        a, b = self._crops.draws(first, count)
        samples = self._order.indices(first, count)
        targets = samples if self._order_of_targets is None else self._order_of_targets.indices(first, count)
        return np.stack((samples, *a, targets, *b))

    def _batch(self, draws: Draws) -> Batch:
        pairs = (self._images.both(a, b) for a, b in zip(draws[0].tolist(), draws[4].tolist(), strict=True))
        return self._crops.batch(pairs, draws[1:4], draws[5:])
