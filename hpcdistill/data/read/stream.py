"""The reader `stream`: webdataset's shards, of local folders and of http(s) addresses, through its shuffle buffer.

For sets that are far away or too large for random access: each shard is read from front to back by one process, into
memory, and compared with the sha256 of the index before the first of its images is used. The images are cut out at the
places that the index says: no tar is parsed, so nothing in it is unpacked, unpickled or executed.

The order of the samples and the point where a run resumes are therefore NOT exact, unlike the indexed reader's:

- a slot is one reader process of one rank; in each pass over the data the shards are dealt to the slots anew, or, when
  there are fewer shards than slots, slots share a shard and take its samples in turn. So each sample is taken once in
  each pass, but the slots come to the end of a pass at different steps;
- within a slot the samples of a pass are mixed by a buffer of `data.shuffle_buffer` samples (their files, not
  decoded: a thousand DIV2K images take 5 GB in each reader process), never beyond the pass;
- the batches are the same for the same (seed, ranks, workers, first step), and others when one of them changes. A run
  resumed at step k starts a pass of its own: some samples come twice and others not until the next pass. What was
  drawn before it is not repeated, as shards are dealt by (seed, pass, first step) and crops by the draw's number.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from webdataset import shuffle

from hpcdistill.console import warn
from hpcdistill.data import held_out
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import STREAM, draw
from hpcdistill.data.fetch.location import called, check_shard, is_remote, join, read_shard, remedy
from hpcdistill.data.images import read_packed
from hpcdistill.data.index import Index, Sample, Shard
from hpcdistill.data.needs import Needs, load_indices
from hpcdistill.data.read.augmentation import PairCrops, Patches, Planes, Rgb, planes_of
from hpcdistill.data.read.domains import check_sides, half
from hpcdistill.data.read.loader import Batch, ReadAhead
from hpcdistill.data.read.order import BatchShare
from hpcdistill.errors import UserError


@dataclass(frozen=True)
class StreamedShard:
    """A shard, the data set it belongs to, and the samples that are taken of it."""

    place: str
    shard: Shard
    samples: tuple[Sample, ...]  # in the index's order


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it came in: the files of the roles that are needed, not decoded yet."""

    sample: Sample
    shard: StreamedShard
    contents: dict[str, bytes]  # by role

    def image(self, role: str) -> Rgb:
        """Decode one; UserError when it cannot be, or has another size than in the index."""
        member = self.sample.member(role)
        assert member is not None
        address = called(join(self.shard.place, self.shard.shard.name))
        label = f"{address}: {role} of sample '{self.sample.source}'"
        return read_packed(self.contents[role], (member.height, member.width), label, remedy(self.shard.place))


def read_samples(shards: Iterable[StreamedShard], roles: Collection[str]) -> Iterator[EncodedSample]:
    """The samples of `shards` one after the other, with their files of `roles`; UserError as of `read_shard`."""
    for part in shards:
        content = memoryview(read_shard(part.place, part.shard))
        for sample in part.samples:
            members = {role: member for role in roles if (member := sample.member(role))}
            files = {role: bytes(content[one.offset : one.offset + one.length]) for role, one in members.items()}
            yield EncodedSample(sample, part, files)
        del content  # before the next shard comes in


class StreamReader:
    """Training batches streamed from packed data sets, in folders or at http(s) addresses.

    A batch is what `needs` describes, this rank's `batch_size / ranks` samples of it; see the module for their order.
    `samples` is how many draws one pass takes: all samples, of an unpaired set those of its larger domain.
    """

    def __init__(
        self,
        places: Sequence[str],
        needs: Needs,
        config: DataConfig,
        seed: int,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Join the data sets at `places` and check that they can deliver `needs`.

        `batch_size` is global. UserError when ranks do not divide it, an address has another scheme than http(s), an
        index cannot be had, or a patch does not fit.
        """
        self._share = BatchShare(batch_size, rank, ranks)
        if config.cache not in ("auto", "none"):
            raise UserError(f"data.cache={config.cache} is for data.reader=indexed; a stream needs data.cache=none")
        indices = load_indices(places, needs)
        make = _PatchBatches if needs.kind == "lr-hr" else _CropBatches
        self._batch_of = make(places, indices, needs, config, seed)
        self._streams = [
            _SampleStream(number, _shards_with(usable, places, indices), roles, seed, config.shuffle_buffer)
            for number, (roles, usable) in enumerate(self._batch_of.streams)
        ]
        self.samples = max(stream.size for stream in self._streams)

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> ReadAhead:
        """The batches of steps first .. last - 1, in this order; see `ReadAhead`."""
        slots = self._share.ranks * max(1, workers)
        for stream in self._streams:
            if len(stream.shards) < slots and stream.is_remote:
                warn(
                    f"{len(stream.shards)} shards for {slots} readers: some are sent several times a pass; "
                    "fewer data.workers or smaller shards send less"
                )
        return ReadAhead(self._batches, first, last, workers, pin_memory)

    def _batches(self, steps: range, worker: int, workers: int) -> Iterator[Batch]:
        """The batches of `steps`, which are those of one worker of this rank."""
        slot, slots = self._share.rank * workers + worker, self._share.ranks * workers
        start = steps.start - worker  # of the loader: the same on all ranks and workers
        passes = [stream.samples(slot, slots, start, start * self._share.batch_size) for stream in self._streams]
        for step in steps:
            taken = [[next(samples) for _ in range(self._share.count)] for samples in passes]
            yield self._batch_of(self._share.first(step), taken)


class _PatchBatches:
    """lr-hr: the patches that `PatchReader` cuts, of the samples as they come in."""

    def __init__(
        self, places: Sequence[str], indices: Sequence[Index], needs: Needs, config: DataConfig, seed: int
    ) -> None:
        self._patches = Patches(places, indices, needs, config, seed)
        # A shard is read and compared as a whole: what is held out is not cut out of it.
        held = held_out.positions(len(self._patches.sizes), config.held_out)
        # Of each stream that is read side by side: the roles that are needed, and the samples by position.
        usable = frozenset(self._patches.usable.tolist()).difference(held)
        if not usable:
            raise UserError(f"data.held_out={config.held_out}: no usable image is left to train on; hold out fewer")
        self.streams = [(frozenset(self._patches.names), usable)]

    def __call__(self, first: int, taken: Sequence[Sequence[EncodedSample]]) -> Batch:
        """Draws `first`, `first` + 1, ... made of `taken`, one sequence for each of `streams`."""
        (samples,) = taken
        sizes = np.array([self._patches.size(one.shard.place, one.sample) for one in samples], np.int64)

        def cut(image: int, number: int, top: int, left: int, side: int) -> Planes:
            rgb = samples[number].image(self._patches.names[image])
            return planes_of(rgb[top : top + side, left : left + side], self._patches.channels)

        return self._patches.batch(np.stack((np.arange(len(samples)), *self._patches.draws(first, sizes))), cut)


class _CropBatches:
    """paired, unpaired: the crops that `TranslationReader` cuts, of the samples as they come in."""

    def __init__(
        self, places: Sequence[str], indices: Sequence[Index], needs: Needs, config: DataConfig, seed: int
    ) -> None:
        self._crops = PairCrops(config, seed, paired=needs.kind == "paired")
        check_sides(places, indices, needs.kind)
        self._roles = ("a", "b") if config.direction == "AtoB" else ("b", "a")
        samples = [sample for index in indices for sample in index.samples]
        if needs.kind == "paired":
            self.streams = [(frozenset(("a", "b", "ab")), frozenset(range(len(samples))))]
        else:
            self.streams = [
                (frozenset((role,)), frozenset(n for n, sample in enumerate(samples) if sample.member(role)))
                for role in self._roles
            ]

    def __call__(self, first: int, taken: Sequence[Sequence[EncodedSample]]) -> Batch:
        """As `_PatchBatches`: of unpaired sets one sequence for each domain."""
        images = (self._images(one, other) for one, other in zip(taken[0], taken[-1], strict=True))
        return self._crops.batch(images, *self._crops.draws(first, len(taken[0])))

    def _images(self, one: EncodedSample, other: EncodedSample) -> tuple[Rgb, Rgb]:
        """What is translated and what it is translated to; of a pair `one` and `other` are the same."""
        source, target = self._roles
        if "ab" not in one.contents:
            return one.image(source), other.image(target)
        both = one.image("ab")
        return half(both, source), half(both, target)


def _shards_with(usable: Collection[int], places: Sequence[str], indices: Sequence[Index]) -> list[StreamedShard]:
    """The shards that hold one of the `usable` samples, which are numbered through all data sets.

    UserError when a local one is missing or of another length.
    """
    found: list[StreamedShard] = []
    numbers = itertools.count()
    for place, index in zip(places, indices, strict=True):
        taken: list[list[Sample]] = [[] for _ in index.shards]
        for sample in index.samples:
            if next(numbers) in usable:
                taken[sample.shard].append(sample)
        for shard, samples in zip(index.shards, taken, strict=True):
            if samples:
                if not is_remote(place):
                    check_shard(place, shard)
                found.append(StreamedShard(place, shard, tuple(samples)))
    return found


class _SampleStream:
    """An endless stream of samples: all of a set, or one of the two domains of an unpaired set."""

    def __init__(
        self, number: int, shards: Sequence[StreamedShard], roles: Collection[str], seed: int, shuffle_buffer: int
    ) -> None:
        """`roles` are the images that are read; `number` tells the streams apart."""
        self._number = number
        self._roles = roles
        self._seed = seed
        self._buffer = shuffle_buffer
        self.shards = shards
        self.size = sum(len(shard.samples) for shard in shards)
        assert self.size
        self.is_remote = any(is_remote(shard.place) for shard in shards)

    def samples(self, slot: int, slots: int, start: int, draws: int) -> Iterator[EncodedSample]:
        """What `slot` of `slots` takes, from the pass that `draws` draws before step `start` have reached."""
        for number in itertools.count(draws // self.size):
            parts = self._parts(number, slot, slots, start)
            if parts:
                rng = random.Random(self._word(number, start, slot))
                yield from shuffle(self._buffer, rng=rng)(read_samples(parts, self._roles))

    def _parts(self, number: int, slot: int, slots: int, start: int) -> list[StreamedShard]:
        """What `slot` takes in pass `number`: no sample twice, and each is some slot's."""
        count = len(self.shards)
        # Keyed by the first step, too: jobs that never get to the end of a pass would else see its beginning only.
        words = draw(self._seed, STREAM, start * count + np.arange(count), part=4 * number + self._number)
        order = np.argsort(words[0], kind="stable").tolist()
        if count >= slots:
            return [self.shards[shard] for shard in order[slot::slots]]
        sharing = len(range(slot % count, slots, count))
        # Another place among the sharing slots in each pass, or a slot could go without samples for ever.
        first = (slot // count + number) % sharing
        shard = self.shards[order[slot % count]]
        samples = shard.samples[first::sharing]
        return [replace(shard, samples=samples)] if samples else []

    def _word(self, number: int, start: int, slot: int) -> int:
        words = draw(self._seed, STREAM, np.array([start << 24 | slot]), part=4 * number + 2 + self._number)
        return int(words[0][0]) << 32 | int(words[1][0])
