import numpy as np
import pytest
from streams import epoch_order

from hpcdistill.data.read import order as order_module
from hpcdistill.data.read.order import SampleOrder


@pytest.mark.parametrize(("size", "samples_per_epoch"), [(7, None), (7, 7), (7, 18), (7, 4), (1, 3), (30, 61)])
def test_order_follows_its_definition(size: int, samples_per_epoch: int | None) -> None:
    draws = samples_per_epoch or size
    expected = [sample for epoch in range(3) for sample in epoch_order(size, draws, epoch, 5)]
    assert SampleOrder(size, 5, samples_per_epoch).indices(0, 3 * draws).tolist() == expected


def test_any_stretch_equals_the_whole() -> None:
    whole = SampleOrder(23, seed=9, samples_per_epoch=50).indices(0, 400)
    order = SampleOrder(23, seed=9, samples_per_epoch=50)
    for start, count in ((390, 10), (0, 1), (45, 10), (49, 130), (100, 0), (22, 2), (99, 51)):
        assert np.array_equal(order.indices(start, count), whole[start : start + count])


def test_every_sample_once_in_an_epoch_and_each_epoch_another_order() -> None:
    epochs = SampleOrder(40, seed=0).indices(0, 400).reshape(10, 40)
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs.tolist())
    assert len({epoch.tobytes() for epoch in epochs}) == 10


def test_cached_block_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    large = SampleOrder(11, seed=2, samples_per_epoch=100).indices(0, 300)
    monkeypatch.setattr(order_module, "_PASSES_AT_ONCE", 30)  # two passes at once instead of ten
    assert np.array_equal(SampleOrder(11, seed=2, samples_per_epoch=100).indices(0, 300), large)


def test_far_draws_are_reached_without_replay() -> None:
    draws = 4 * 10**12 + 7  # epoch 250 million: replaying would not end
    order = SampleOrder(800, seed=1, samples_per_epoch=16_000)
    expected = order.indices(draws - 3, 800)[3:103]
    assert np.array_equal(SampleOrder(800, seed=1, samples_per_epoch=16_000).indices(draws, 100), expected)
    assert sorted(order.indices(4 * 10**12, 800).tolist()) == list(range(800))


def test_first_draw_of_an_epoch_is_uniform() -> None:
    first = SampleOrder(8, seed=4).indices(0, 8 * 4000).reshape(4000, 8)[:, 0]
    assert np.abs(np.bincount(first, minlength=8) - 500).max() < 5 * (4000 * 7 / 64) ** 0.5
