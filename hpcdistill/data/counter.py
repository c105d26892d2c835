"""Counter-based random numbers: draw n is a function of (seed, stream, n), whatever was drawn before it.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is written out here so that
the order of the data and its augmentation can never change with a version of NumPy or torch: both have a Philox, but
neither promises its stream of words for ever, and torch's cannot be asked for draw n. The same lines compute with NumPy
arrays and with torch tensors of any device, on which nothing is read by the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

# The streams: what is drawn under one of them is independent of the others. Never renumber them.
ORDER: Final = 1  # permutations of the samples
AUGMENTATION: Final = 2  # crop, flip and rotation of each draw
TRAINING: Final = 3  # noise and dropout of a training step
ORDER_OF_TARGETS: Final = 4  # permutations of an unpaired set's second domain
STREAM: Final = 5  # the reader `stream`: its shards and its shuffle buffer
POOL: Final = 6  # what a replay pool does with an image
PIECES: Final = 7  # where a spectral classifier's pieces of the images lie
SHARED: Final = 8  # what all ranks draw alike in a training step

Words = TypeVar("Words", NDArray[np.int64], "Tensor")  # [N], of 64-bit integers
Word = Any  # the same, or a Python integer

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
# What each round adds to the key: multiples of the golden ratio and of sqrt(3) - 1, as 32-bit fractions.
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def draw(seed: int, stream: int, counter: Words, part: int = 0) -> tuple[Words, Words, Words, Words]:
    """Four uniform 32-bit words for each non-negative 64-bit `counter` [N]: four arrays or tensors [N] like `counter`.

    `stream` is one of this module's constants; `part` (32 bits) divides a stream further (an epoch, a rank).
    """
    assert 0 <= part < 2**32
    return philox((counter & _LOW, counter >> 32 & _LOW, part, stream), (seed & _LOW, seed >> 32 & _LOW))


def philox(words: tuple[Words, Words, Word, Word], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of N counters under `key` (two 32-bit words); a counter has four words, each [N] or all equal."""
    a: Any
    a, b, c, d = words
    for number in range(_ROUNDS):
        low, high = ((word + number * step) & _LOW for word, step in zip(key, _KEY_STEPS, strict=True))
        # 64-bit integers wrap: the product's bits are right, but a signed one's shift fills up with the sign.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = second >> 32 & _LOW ^ b ^ low, second & _LOW, first >> 32 & _LOW ^ d ^ high, first & _LOW
    return a, b, c, d


def below(words: Words, bound: Words | int) -> Words:
    """Uniform integers in [0, bound) from uniform words, by multiply and shift; bias below bound / 2^32.

    `bound` is below 2^31, for arrays one or one for each word.
    """
    return words * bound >> 32


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2^63) for `torch.manual_seed`: one for each training step and rank."""
    return _seed(seed, TRAINING, step, rank)


def shared_seed(seed: int, step: int) -> int:
    """A seed in [0, 2^63), one for each training step: for what all ranks draw alike."""
    return _seed(seed, SHARED, step, 0)


def _seed(seed: int, stream: int, step: int, part: int) -> int:
    low, high, *_ = draw(seed, stream, np.array([step]), part)
    return (int(high[0]) << 32 | int(low[0])) & (2**63 - 1)
