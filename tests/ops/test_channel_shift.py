"""The partial channel shift against a loop over pixels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hpcdistill.errors import UserError
from hpcdistill.ops.channel_shift import channel_shift, check_shift

# Where a group's pixels come from, as (rows, columns) for each pixel of step: down comes from above.
COMES_FROM = {
    "uni": [(-1, 0)],
    "bi": [(-1, 0), (1, 0)],
    "cross": [(-1, 0), (0, -1)],
    "quad": [(1, 0), (-1, 0), (0, 1), (0, -1)],
}
MODES = tuple(COMES_FROM)


def by_pixel(x: np.ndarray, mode: str, moved: int, step: int) -> np.ndarray:
    """`moved` channels around the middle, pixel by pixel."""
    result = x.copy()
    batch, channels, height, width = x.shape
    groups = COMES_FROM[mode]
    each = moved // len(groups)
    first = channels // 2 - moved // 2
    for channel in range(first, first + moved):
        down, right = groups[(channel - first) // each]
        for sample in range(batch):
            for row in range(height):
                for column in range(width):
                    i, j = row + down * step, column + right * step
                    inside = 0 <= i < height and 0 <= j < width
                    result[sample, channel, row, column] = x[sample, channel, i, j] if inside else 0
    return result


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize(
    ("channels", "rate", "budget"), [(16, 0.25, 4), (13, 0.5, 6), (64, Fraction(1, 8), 8), (4, 1, 4), (40, 0.15, 6)]
)
def test_equals_a_loop_over_pixels(
    mode: str, size: tuple[int, int], step: int, channels: int, rate: float, budget: int
) -> None:
    x = image(2, channels, *size)
    moved = budget - budget % len(COMES_FROM[mode])
    expected = by_pixel(x.numpy(), mode, moved, step)
    before = x.clone()
    result = channel_shift(x, mode, rate, step)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert torch.equal(x, before)  # out of place
    assert (result != x).flatten(2).any(2).any(0).sum() == moved


def test_the_default_moves_eight_of_64_channels_by_two_rows() -> None:
    x = image(1, 64, 7, 7)
    result = channel_shift(x)
    assert torch.equal(result[:, :28], x[:, :28])
    assert torch.equal(result[:, 36:], x[:, 36:])
    assert torch.equal(result[:, 28:32, 2:], x[:, 28:32, :-2])  # down
    assert torch.equal(result[:, 32:36, :-2], x[:, 32:36, 2:])  # up
    assert not result[:, 28:32, :2].any()
    assert not result[:, 32:36, -2:].any()


@pytest.mark.parametrize(("rate", "moved"), [(0.3, 3), (0.7, 7), (1 / 3, 3)])
def test_a_float_rate_stands_for_its_fraction(rate: float, moved: int) -> None:
    assert math.floor(0.29999999 * 10) == 2  # what a rate in binary could make of 3
    x = image(1, 10, 4, 4)
    assert (channel_shift(x, "uni", rate, 1) != x).flatten(2).any(2).sum() == moved


@pytest.mark.parametrize("mode", MODES)
def test_gradient(mode: str) -> None:
    x = image(1, 8, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: channel_shift(x, mode, 0.5, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: channel_shift(x, mode, 0.5, 2).square(), x)


@pytest.mark.parametrize("mode", MODES)
def test_memory_format_and_dtype_stay(mode: str) -> None:
    x = image(2, 16, 6, 5).bfloat16()
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    result = channel_shift(last, mode, 0.5, 2)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, channel_shift(x, mode, 0.5, 2))
    result.sum().backward()
    assert last.grad is not None
    assert last.grad.sum() == result.detach().ne(0).sum()


def test_under_vmap() -> None:
    stacked = image(3, 2, 8, 5, 5)
    result = torch.func.vmap(channel_shift, in_dims=0)(stacked, rate=0.5)
    assert torch.equal(result, torch.stack([channel_shift(x, rate=0.5) for x in stacked]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 64, 64, "by", 0.125, 2), "no mode 'by'; valid: bi, cross, quad, uni"),
        ((64, 64, 64, "bi", 0, 2), "rate is 0"),
        ((64, 64, 64, "bi", 1.5, 2), "rate is 1.5"),
        ((64, 64, 64, "bi", 0.125, 0), "step is 0"),
        ((64, 64, 64, "bi", 1 / 64, 2), "shifts none in 2.*raise the rate to 1/32 or more"),
        ((3, 64, 64, "quad", 1, 2), "quad needs 4 channels, the map has 3"),
        ((64, 4, 64, "bi", 0.125, 4), "step 4 empties a 4x64 map; give less than 4"),
        ((64, 64, 8, "quad", 0.125, 8), "give less than 8"),
    ],
)
def test_impossible_shifts(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shift(*arguments)
    channels, height, width, *how = arguments
    with pytest.raises(UserError, match=message):
        channel_shift(torch.zeros(1, channels, height, width), *how)


def test_possible_shifts() -> None:
    check_shift(3, 64, 64, "uni", Fraction(1, 3), 1)
    check_shift(64, 8, 2, "bi", 0.125, 7)  # along the height only: the width does not matter
    check_shift(64, 64, 64, "quad", Fraction(1, 16), 8)
