"""Draws are Philox's published words, in NumPy's arrays and in torch's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcdistill.data import counter
from hpcdistill.data.counter import AUGMENTATION, ORDER, TRAINING, below, draw, philox, shared_seed, step_seed

CLONE = Path(__file__).resolve().parents[2]

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def rows(seed: int, stream: int, numbers: np.ndarray, part: int = 0) -> np.ndarray:
    """The four words of each draw, side by side: uint32 [N, 4]."""
    return np.stack(draw(seed, stream, numbers, part), axis=1).astype(np.uint32)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: str, key: str, result: str, kind: Callable[..., np.ndarray | Tensor]
) -> None:
    low, high = words(key)
    # Three equal rows: a row's result must not depend on its neighbours.
    found = philox(tuple(kind([word] * 3) for word in words(counter)), (low, high))
    assert [word.tolist() for word in found] == [[word] * 3 for word in words(result)]


def test_draw_places_seed_counter_part_and_stream() -> None:
    # The layout is frozen: another one would change the order and augmentation of every run.
    counter, key, result = (words(text) for text in KNOWN[2])
    number = counter[1] << 32 | counter[0]
    seed = key[1] << 32 | key[0]
    found = draw(seed, counter[3], np.array([5, number], dtype=np.uint64), part=counter[2])
    assert [int(word[1]) for word in found] == result


def test_the_streams_are_what_they_always_were_and_no_two_are_one() -> None:
    streams = {name: value for name, value in vars(counter).items() if re.fullmatch("[A-Z][A-Z_]+", name)}
    assert streams == {
        "TYPE_CHECKING": False,
        "ORDER": 1,
        "AUGMENTATION": 2,
        "TRAINING": 3,
        "ORDER_OF_TARGETS": 4,
        "STREAM": 5,
        "POOL": 6,
        "PIECES": 7,
        "SHARED": 8,
    }
    for path in (CLONE / "hpcdistill").rglob("*.py"):  # whoever draws names one of them
        if path.name != "counter.py":
            assert set(re.findall(r"\bdraw\([\w.]+, (\w+),", path.read_text("utf-8"))) <= streams.keys(), path


def test_a_pool_and_what_all_ranks_draw_alike_are_independent() -> None:
    """A step's number can be an image's: under one stream both would be made of the same words."""
    low, high, *_ = draw(3, counter.POOL, np.arange(200))
    assert not {shared_seed(3, step) & 0xFFFFFFFF for step in range(200)} & set(low.tolist())
    assert len(set(high.tolist())) == 200


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, 2**63 - 1])
@pytest.mark.parametrize("part", [0, 3, 2**32 - 1])
def test_a_device_draws_what_the_host_draws(seed: int, part: int) -> None:
    numbers = np.array([0, 1, 2, 1000, 2**32 - 1, 2**32, 2**40 + 17, 2**63 - 1])
    for host, device in zip(draw(seed, 6, numbers, part), draw(seed, 6, torch.from_numpy(numbers), part), strict=True):
        assert device.tolist() == host.tolist()
        for bound in (1, 2, 50, 2**31 - 1):
            assert below(device, bound).tolist() == below(host, bound).tolist()


def test_streams_seeds_and_parts_differ() -> None:
    numbers = np.arange(64)
    variants = [
        rows(7, ORDER, numbers),
        rows(7, AUGMENTATION, numbers),
        rows(7, TRAINING, numbers),
        rows(8, ORDER, numbers),
        rows(7 + (1 << 32), ORDER, numbers),
        rows(7, ORDER, numbers, part=1),
        rows(7, ORDER, numbers + (1 << 32)),
    ]
    assert len({variant.tobytes() for variant in variants}) == len(variants)
    assert len(np.unique(np.concatenate(variants))) > 0.999 * 64 * 4 * len(variants)


def test_words_are_uniform() -> None:
    found = rows(0, AUGMENTATION, np.arange(50_000))
    counts = np.bincount(found.ravel() >> 24, minlength=256)
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 255 - 5 * 510**0.5 < chi_square < 255 + 5 * 510**0.5
    assert np.abs(np.corrcoef(found.T.astype(np.float64)) - np.eye(4)).max() < 0.02


def test_below_covers_its_range_evenly() -> None:
    extremes = np.array([0, 2**32 - 1], dtype=np.int64)
    assert below(extremes, 7).tolist() == [0, 6]
    assert below(extremes, np.array([1, 1])).tolist() == [0, 0]
    counts = np.bincount(below(draw(1, ORDER, np.arange(70_000))[0], 7), minlength=7)
    assert np.abs(counts - 10_000).max() < 500  # 5 standard deviations


def test_step_seed_is_taken_by_torch_and_differs_by_step_rank_and_seed() -> None:
    seeds = [step_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds[:10]:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)
    assert step_seed(0, 17, 3) == step_seed(0, 17, 3)
