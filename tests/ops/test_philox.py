"""The device's random numbers are those of data.counter, which is tested against the published vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.data import counter
from hpcdistill.ops import philox


def test_equals_the_host() -> None:
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, (1000, 4), dtype=np.uint64)
    words[0], words[1] = 0, 2**32 - 1
    for key in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)):
        expected = counter.philox(words.astype(np.uint32), key)
        result = philox.philox(torch.from_numpy(words.astype(np.int64)), key)
        np.testing.assert_array_equal(result.numpy(), expected.astype(np.int64))


def test_a_published_vector() -> None:
    # Random123's known answers: counter and key of pi's digits.
    words = torch.tensor([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    result = philox.philox(words, (0xA4093822, 0x299F31D0))
    assert [hex(word) for word in result[0].tolist()] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, 2**63 - 1])
@pytest.mark.parametrize("part", [0, 3, 2**32 - 1])
def test_draws_equal_the_hosts(seed: int, part: int) -> None:
    numbers = np.array([0, 1, 2, 1000, 2**32 - 1, 2**32, 2**40 + 17, 2**63 - 1])
    expected = counter.draw(seed, 6, numbers, part)
    result = philox.draw(seed, 6, torch.from_numpy(numbers), part)
    np.testing.assert_array_equal(result.numpy(), expected.astype(np.int64))
    for bound in (1, 2, 50, 2**31 - 1):
        np.testing.assert_array_equal(philox.below(result, bound).numpy(), counter.below(expected, bound))
