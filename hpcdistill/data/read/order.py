"""The order of the samples: a function of (seed, epoch) alone, the same for any number of ranks and workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.counter import ORDER, draw

_PASSES_AT_ONCE = 1 << 16  # draws whose permutations are computed together: small sets need many passes an epoch


class SampleOrder:
    """Which sample each draw takes; draws are numbered through the whole run.

    Epoch e is draws e * samples_per_epoch up to (e + 1) * samples_per_epoch. It consists of as many permutations of
    the samples as it needs, the last one cut. Nothing is replayed to get to a draw; the object only caches.
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
