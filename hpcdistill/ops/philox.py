"""The counter-based random numbers of `data.counter` on the device: the same words, with nothing read by the host.

Words are int64 tensors with values in [0, 2^32).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of each row of `counter` [N, 4] under `key` (two 32-bit words): int64 [N, 4]."""
    multipliers, keys = _constants(key, counter.device)
    even, odd = counter[:, 0::2].t(), counter[:, 1::2].t()
    for round_key in keys.unbind(0):
        # int64 wraps: the product's 64 bits are right, but the shift fills up with the sign.
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & _LOW) ^ odd ^ round_key
        odd = product & _LOW
    return torch.stack((even[0], odd[0], even[1], odd[1]), 1)


def draw(seed: int, stream: int, counter: Tensor, part: int = 0) -> Tensor:
    """Four uniform 32-bit words for each non-negative `counter` [N] (int64): int64 [N, 4], as `data.counter.draw`."""
    assert counter.dtype == torch.int64
    assert 0 <= part < 2**32
    words = (counter & _LOW, counter >> 32, torch.full_like(counter, part), torch.full_like(counter, stream))
    return philox(torch.stack(words, 1), (seed & _LOW, (seed >> 32) & _LOW))


def below(words: Tensor, bound: int) -> Tensor:
    """Uniform integers in [0, bound) from uniform words, as `data.counter.below`; `bound` is below 2^31."""
    assert 0 < bound < 2**31
    return (words * bound) >> 32


@lru_cache(maxsize=64)
def _constants(key: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The multipliers [2, 1] and the keys of the rounds [rounds, 2, 1]; copied to the device once."""
    keys = [[[(word + i * step) & _LOW] for word, step in zip(key, _KEY_STEPS, strict=True)] for i in range(_ROUNDS)]
    multipliers = [[factor] for factor in _MULTIPLIERS]
    with torch.inference_mode(False):
        return torch.tensor(multipliers, device=device), torch.tensor(keys, device=device)
