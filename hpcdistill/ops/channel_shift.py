"""Partial channel shift (FESD, section 2.1): a few channels of a feature map are moved by some pixels, h(.).

It has no parameters and no multiplications; it widens what a position of the map has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final, Literal

import torch
from torch import Tensor

from hpcdistill.errors import UserError, nearest

Mode = Literal["uni", "bi", "cross", "quad"]
Rate = float | Fraction
Directions = tuple[tuple[int, int], ...]

_HEIGHT, _WIDTH = -2, -1
# One (axis, sign) for each group of channels; + is towards larger indices (down, right).
DIRECTIONS: Final[Mapping[str, Directions]] = {
    "uni": ((_HEIGHT, 1),),
    "bi": ((_HEIGHT, 1), (_HEIGHT, -1)),
    "cross": ((_HEIGHT, 1), (_WIDTH, 1)),
    "quad": ((_HEIGHT, -1), (_HEIGHT, 1), (_WIDTH, -1), (_WIDTH, 1)),
}


def channel_shift(x: Tensor, mode: Mode = "bi", rate: Rate = Fraction(1, 8), step: int = 2) -> Tensor:
    """`[B, C, H, W]` with some of its channels moved by `step` pixels; a new tensor of the same memory format.

    n = `rate` * C channels around C/2, rounded down to a multiple of the number of directions, are split evenly over
    the directions of `mode`: uni (down), bi (down, up), cross (down, right), quad (up, down, left, right). What
    leaves the map is dropped, what is uncovered is zero, the other channels stay. UserError as `check_shift`.
    """
    if x.ndim != 4:
        raise ValueError(f"channel_shift takes [B, C, H, W], not {list(x.shape)}")
    channels, height, width = x.shape[1:]
    check_shift(channels, height, width, mode, rate, step)
    directions = DIRECTIONS[mode]
    shifted: Tensor = _Shift.apply(x, directions, _shifted_channels(channels, rate, directions), step)  # type: ignore[no-untyped-call]
    return shifted


def check_shift(channels: int, height: int, width: int, mode: str, rate: Rate, step: int) -> None:
    """UserError unless the shift moves at least one channel in each direction, by less than the map's side."""
    if mode not in DIRECTIONS:
        raise UserError(f"channel shift: no mode '{mode}'; {nearest(mode, DIRECTIONS)}")
    if not 0 < rate <= 1:
        raise UserError(f"channel shift: rate is {rate}; give a share of the channels above 0 and up to 1")
    if step < 1:
        raise UserError(f"channel shift: step is {step}; give 1 pixel or more")
    directions = DIRECTIONS[mode]
    if _shifted_channels(channels, rate, directions) == 0:
        raise UserError(
            f"channel shift: rate {rate} of {channels} channels shifts none in {len(directions)} direction(s) "
            f"({mode}); raise the rate to {Fraction(len(directions), channels)} or more"
            if len(directions) <= channels
            else f"channel shift: {mode} needs {len(directions)} channels, the map has {channels}; take another mode"
        )
    side = min(height if axis == _HEIGHT else width for axis, _ in directions)
    if step >= side:
        raise UserError(f"channel shift: step {step} empties a {height}x{width} map; give less than {side}")


def _shifted_channels(channels: int, rate: Rate, directions: Directions) -> int:
    # A float stands for the fraction it is near: 0.3 of 10 channels are 3, whatever 0.3 * 10 is in binary.
    number = int(Fraction(rate).limit_denominator(10_000) * channels)
    return number - number % len(directions)


class _Shift(torch.autograd.Function):
    """In-place slices under autograd would copy the whole gradient once for each; here the way back is a shift too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, directions: Directions, number: int, step: int) -> Tensor:
        shifted = x.clone()
        first, each = x.shape[-3] // 2 - number // 2, number // len(directions)
        for group, (axis, sign) in enumerate(directions):
            source = x.narrow(-3, first + group * each, each)
            target = shifted.narrow(-3, first + group * each, each)
            rest = x.shape[axis] - step
            to, come, uncovered = (step, 0, 0) if sign > 0 else (0, step, rest)
            target.narrow(axis, to, rest).copy_(source.narrow(axis, come, rest))
            target.narrow(axis, uncovered, step).zero_()
        return shifted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Directions, int, int], output: Tensor) -> None:
        _, directions, number, step = inputs
        ctx.back = tuple((axis, -sign) for axis, sign in directions), number, step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Shift.apply(gradient, *ctx.back), None, None, None  # type: ignore[no-untyped-call]
