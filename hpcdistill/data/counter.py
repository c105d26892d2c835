"""Counter-based random numbers: draw n is a function of (seed, stream, n), whatever was drawn before it.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is written out here so that
the order of the data and its augmentation can never change with a version of NumPy or torch.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# The streams: what is drawn under one of them is independent of the others. Never renumber them.
ORDER: Final = 1  # permutations of the samples
AUGMENTATION: Final = 2  # crop, flip and rotation of each draw
TRAINING: Final = 3  # noise and dropout of a training step
ORDER_OF_TARGETS: Final = 4  # permutations of an unpaired set's second domain
STREAM: Final = 5  # the reader `stream`: its shards and its shuffle buffer
SHARED: Final = 6  # what all ranks draw alike in a training step

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
# What each round adds to the key: multiples of the golden ratio and of sqrt(3) - 1, as 32-bit fractions.
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of each row of `counter` [N, 4] under `key` (two 32-bit words): uint32 [N, 4]."""
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: two rows of N each, in 64 bits for the full product.
    even = np.ascontiguousarray(counter[:, 0::2].T, dtype=np.uint64)
    odd = np.ascontiguousarray(counter[:, 1::2].T, dtype=np.uint64)
    keys = ((np.array(key, dtype=np.uint64) + _KEY_STEPS) & _LOW)[:, :, None]
    for round_key in keys:
        product = (even * _MULTIPLIERS)[::-1]
        even = product >> _HALF
        even ^= odd
        even ^= round_key
        odd = product & _LOW
    result = np.empty((counter.shape[0], 4), dtype=np.uint32)
    result[:, 0::2] = even.T
    result[:, 1::2] = odd.T
    return result


def draw(seed: int, stream: int, counter: NDArray[np.integer], part: int = 0) -> NDArray[np.uint32]:
    """Four uniform 32-bit words for each non-negative 64-bit `counter` [N]: uint32 [N, 4].

    `stream` is one of this module's constants; `part` (32 bits) divides a stream further (an epoch, a rank).
    """
    assert 0 <= part < 2**32
    wide = counter.astype(np.uint64)
    words = np.empty((len(wide), 4), dtype=np.uint32)
    words[:, 0] = wide & _LOW
    words[:, 1] = wide >> _HALF
    words[:, 2] = part
    words[:, 3] = stream
    return philox(words, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def below(words: NDArray[np.uint32], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Uniform integers in [0, bound) from uniform words, by multiply and shift; bias below bound / 2^32."""
    return ((words.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)) >> _HALF).astype(np.int64)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2^63) for `torch.manual_seed`: one for each training step and rank."""
    return _seed(seed, TRAINING, step, rank)


def shared_seed(seed: int, step: int) -> int:
    """A seed in [0, 2^63), one for each training step: for what all ranks draw alike."""
    return _seed(seed, SHARED, step, 0)


def _seed(seed: int, stream: int, step: int, part: int) -> int:
    low, high = draw(seed, stream, np.array([step]), part=part)[0, :2].tolist()
    return (int(high) << 32 | int(low)) & (2**63 - 1)
