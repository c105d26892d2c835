"""Which draws a step of one rank takes, and which sample each draw takes: the same for any number of ranks and workers.

Both are functions of numbers alone: of the step, and of (seed, epoch). Nothing is replayed to get to a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.counter import ORDER, draw
from hpcdistill.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Numbers = TypeVar("Numbers", bound="NDArray[Any] | Tensor")  # [..., draws]

# Draws whose numbers are computed together: those of a batch of 16 alone take 110 us, a fifth of copying its patches.
_AT_ONCE = 512
_PASSES_AT_ONCE = 1 << 16  # draws whose permutations are computed together: small sets need many passes an epoch


@dataclass(frozen=True)
class BatchShare:
    """One rank's contiguous slice of each global batch: step k is draws k * batch_size up to (k + 1) * batch_size."""

    batch_size: int  # of all ranks together
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        """UserError, with the nearest valid value, when the global batch cannot be cut evenly over the ranks."""
        assert 0 <= self.rank < self.ranks
        if self.batch_size % self.ranks:
            raise UserError(
                f"train.batch_size={self.batch_size} is global and cannot be cut over {self.ranks} ranks; "
                f"use {max(1, self.count) * self.ranks}"
            )

    @property
    def count(self) -> int:
        """Draws of this rank in each step."""
        return self.batch_size // self.ranks

    def first(self, step: int) -> int:
        """The first of this rank's draws in a step."""
        return step * self.batch_size + self.rank * self.count


class SampleOrder:
    """Which sample each draw takes; draws are numbered through the whole run.

    Epoch e is draws e * samples_per_epoch up to (e + 1) * samples_per_epoch. It consists of as many permutations of
    the samples as it needs, the last one cut. The object only caches.
    """

    def __init__(self, size: int, seed: int, samples_per_epoch: int | None = None, stream: int = ORDER) -> None:
        """Order of `size` samples; `samples_per_epoch` None is one pass over them. `stream`: see `data.counter`."""
        assert size > 0
        self.size = size
        self.seed = seed
        self.stream = stream
        self.samples_per_epoch = size if samples_per_epoch is None else samples_per_epoch
        assert self.samples_per_epoch > 0
        passes = -(-self.samples_per_epoch // size)
        self._block_passes = min(passes, max(1, _PASSES_AT_ONCE // size))
        self._cached: tuple[int, int] | None = None
        self._block = np.empty(0, dtype=np.int64)

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """The samples of draws start .. start + count - 1, across passes and epochs: int64 [count]."""
        result = np.empty(count, dtype=np.int64)
        block_size = self._block_passes * self.size
        done = 0
        while done < count:
            epoch, position = divmod(start + done, self.samples_per_epoch)
            number, place = divmod(position, block_size)
            end_of_epoch = self.samples_per_epoch - position
            take = min(count - done, end_of_epoch, block_size - place)
            result[done : done + take] = self._permutations(epoch, number)[place : place + take]
            done += take
        return result

    def _permutations(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Block `number` of the epoch's permutations, one after the other: int64 [block_passes * size]."""
        if self._cached != (epoch, number):
            draws = self._block_passes * self.size
            numbers = np.arange(number * draws, (number + 1) * draws)
            high, low, *_ = draw(self.seed, self.stream, numbers, part=epoch)
            keys = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
            passes = np.argsort(keys.reshape(self._block_passes, self.size), axis=1, kind="stable")
            self._block = passes.ravel().astype(np.int64, copy=False)
            self._cached = (epoch, number)
        return self._block


class Blocks(Generic[Numbers]):
    """Numbers of draws, made for a block of draws at a time. The object only caches."""

    def __init__(self, make: Callable[[int, int], Numbers]) -> None:
        """`make(first, count)` gives those of draws first .. first + count - 1, which do not depend on others."""
        self._make = make
        self._start = -1
        self._block: Numbers

    def __call__(self, first: int, count: int) -> Numbers:
        """Of draws first .. first + count - 1."""
        start = first - first % _AT_ONCE
        if first + count > start + _AT_ONCE:
            return self._make(first, count)
        if self._start != start:
            self._start, self._block = start, self._make(start, _AT_ONCE)
        return cast(Numbers, self._block[..., first - start : first - start + count])
