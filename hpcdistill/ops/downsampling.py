"""8-bit images down-sampled as MATLAB's `imresize(image, 1/s, 'bicubic')` does it, bit for bit, in integers.

MATLAB works on the rows first (down the columns), rounds to 8 bits, and then on the columns. Its releases differ at the
border. The rules, and what of Set5's LR files that MATLAB wrote they give:

- `newer` (MATLAB of about 2018, the default): mirrored about the border; all pixels of 15 files at 2, 3 and 4;
- `older` (of 2015): the last pixel is repeated; all pixels of 5 files at 4;
- `exact` (this package before it knew): mirrored, nothing rounded between the passes; of an image of Set5, Set14, B100
  or T91 7 to 16 % of the pixels differ from `newer`, most by one level, at saturated edges by up to twelve.

At 1/s with an integer s every output sees the same weights, and these are integers over one denominator. Sums of
products with 8-bit pixels are then integers too, and a floating-point type that holds the largest of them computes
without any rounding: 24 bits in float32, 53 in float64. Nothing but NumPy is needed, so that processes that pack
images start in a fifth of the time that importing torch takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

ResizeRule = Literal["newer", "older", "exact"]

LARGEST_SCALE = 16  # above 20 the sums of `exact` do not fit 53 bits
_STRIP_BYTES = 1 << 18  # of a strip's rows in float32 between the two passes: a core's cache holds them and their sums
_EXACT_STRIP_BYTES = 1 << 19  # likewise; `exact` keeps them in floating point

_Border = Callable[[int, int, int], NDArray[np.int64]]


def downsample_uint8(image: NDArray[np.uint8], scale: int, rule: ResizeRule = "newer") -> NDArray[np.uint8]:
    """`[H, W, C]` 8-bit to `[H/scale, W/scale, C]` 8-bit; H and W must be multiples of `scale`, which is 1 to 16.

    Rounded half up and clipped after each pass, with `exact` once at the end: the same image gives the same bytes on
    every machine. Works in strips: beside the result it needs a few MiB whatever the image's size. Raises ValueError
    for another scale, and for an image that is no multiple of it.
    """
    height, width, _ = image.shape
    if not 1 <= scale <= LARGEST_SCALE:
        raise ValueError(f"8-bit images are down-sampled by 1 to {LARGEST_SCALE}, not by {scale}")
    if height % scale or width % scale:
        raise ValueError(f"{height}x{width} is not a multiple of {scale}; crop the image first")
    if scale == 1:
        return image.copy()
    if rule == "exact":
        return _rounded_once(image, scale)
    return _rounded_twice(image, scale, mirror if rule == "newer" else repeat)


def _rounded_twice(image: NDArray[np.uint8], scale: int, border: _Border) -> NDArray[np.uint8]:
    """MATLAB's two passes, with 8 bits between them; `border` says where positions outside lie inside."""
    height, width, channels = image.shape
    out_height, out_width = height // scale, width // scale
    result = np.empty((out_height, out_width, channels), np.uint8)
    strip = max(1, min(out_height, _STRIP_BYTES // (width * channels * 4)))
    rows_pass, columns_pass = _Pass(scale, strip, width * channels), _Pass(scale, out_width, strip * channels)
    reach = rows_pass.reach
    left, right = border(-reach, 0, width), border(width, width + reach, width)
    for top in range(0, out_height, strip):
        count = min(strip, out_height - top)
        start, stop = top * scale - reach, (top + count) * scale + reach
        lines = image[start:stop] if start >= 0 and stop <= height else image[border(start, stop, height)]
        rows = rows_pass.shrink(lines.reshape(len(lines), -1)).reshape(count, width, channels)
        # Turned, so that the columns are lines as well.
        turned = np.empty((width + 2 * reach, channels, count), np.uint8)
        inside = turned[reach : reach + width]
        inside[...] = rows.transpose(1, 2, 0)
        turned[:reach], turned[reach + width :] = inside[left], inside[right]
        shrunk = columns_pass.shrink(turned.reshape(len(turned), -1))
        result[top : top + count] = shrunk.reshape(out_width, channels, count).transpose(2, 0, 1)
    return result


class _Pass:
    """One pass: 8-bit lines, `scale` for each of the result and `reach` more at both ends, become 8-bit lines."""

    def __init__(self, scale: int, most: int, size: int) -> None:
        """For up to `most` lines of the result, each of up to `size` pixels: their memory is kept."""
        first, self._taps = integer_weights(scale)
        self.scale, self.reach = scale, -first
        kind = _exact_type(255 * sum(map(abs, self._taps)))
        self._lines = np.empty((scale * (most + 1) + 2 * self.reach) * size, kind)
        self._sums, self._products = np.empty((2, most * size), kind)

    def shrink(self, lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`[scale n + 2 reach, size]` to `[n, size]`: weighed, clipped, rounded half up."""
        scale, size = self.scale, lines.shape[1]
        count = (len(lines) - 2 * self.reach) // scale
        # phases[r, i] is line r + scale * i: what one tap reads for all outputs lies side by side in memory.
        longest = -(-len(lines) // scale)
        phases = self._lines[: scale * longest * size].reshape(scale, longest, size)
        for phase in range(scale):
            part = lines[phase::scale]
            phases[phase, : len(part)] = part
        sums, products = (kept[: count * size].reshape(count, size) for kept in (self._sums, self._products))
        _weigh(lambda tap: phases[tap % scale, tap // scale : tap // scale + count], self._taps, sums, products)
        return _divided(sums, sum(self._taps), 0, 255)


def _divided(sums: NDArray[np.floating], divisor: int, low: int, high: int) -> NDArray[np.uint8]:
    """sums / divisor, clipped to low .. high, rounded half up, as 8 bits from `low` on; `sums` is overwritten."""
    np.clip(sums, low * divisor, high * divisor, out=sums)
    sums += divisor // 2 - low * divisor
    sums /= divisor  # rounded correctly, so that a sum below a multiple of the divisor stays below the integer
    return sums.astype(np.uint8)


def _rounded_once(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The exact value of both passes together, rounded at the end: how sets were packed before."""
    height, width, channels = image.shape
    first, taps = integer_weights(scale)
    total, absolute = sum(taps), sum(map(abs, taps))
    # Between the passes 128 is taken off the pixels: at 2 the second pass then fits float32 as well.
    row_type, column_type = _exact_type(255 * absolute), _exact_type(max(128 * absolute**2, 256 * total**2))
    out_height, out_width, border = height // scale, width // scale, -first
    result = np.empty((out_height, out_width, channels), np.uint8)
    strip = max(1, min(out_height, _EXACT_STRIP_BYTES // (width * channels * np.dtype(row_type).itemsize)))
    rows = np.empty((strip, width + 2 * border, channels), row_type)
    left, right = border + mirror(first, 0, width), border + mirror(width, width + border, width)
    # phases[r][..., i] is column r + scale * i: what one tap reads for all outputs lies side by side in memory.
    phases = np.zeros((scale, channels, strip, -(-rows.shape[1] // scale)), column_type)
    sums, products = np.empty((2, strip, width * channels), row_type)
    values, parts = np.empty((2, channels, strip, out_width), column_type)
    for top in range(0, out_height, strip):
        count = min(strip, out_height - top)
        start = top * scale + first
        stop = start + (count - 1) * scale + len(taps)
        inside = image[start:stop] if start >= 0 and stop <= height else image[mirror(start, stop, height)]
        lines = inside.reshape(len(inside), -1).astype(row_type)
        span = (count - 1) * scale + 1
        _weigh(lambda tap: lines[tap : tap + span : scale], taps, sums[:count], products[:count])  # noqa: B023
        middle = rows[:count, border : border + width]
        np.subtract(sums[:count].reshape(middle.shape), 128 * total, out=middle)
        rows[:count, :border], rows[:count, border + width :] = rows[:count, left], rows[:count, right]
        for phase in range(scale):
            columns = rows[:count, phase::scale]
            for channel in range(channels):
                phases[phase, channel, :count, : columns.shape[1]] = columns[..., channel]
        exact = values[:, :count]
        _weigh(
            lambda tap: phases[tap % scale, :, :count, tap // scale : tap // scale + out_width],  # noqa: B023
            taps,
            exact,
            parts[:, :count],
        )
        result[top : top + count] = _divided(exact, total**2, -128, 127).transpose(1, 2, 0)
    return result


@lru_cache(maxsize=LARGEST_SCALE)
def integer_weights(scale: int) -> tuple[int, tuple[int, ...]]:
    """The first input position of output 0 (output i: scale * i further) and the weights, integers without a divisor.

    Keys' kernel with a = -0.5, widened by `scale`, at x = m / (2 scale): times 16 scale^3 it is an integer.
    """
    weights = {}
    for position in range(-2 * scale, 3 * scale):
        m = abs(2 * position - (scale - 1))  # output 0 is centred at (scale - 1) / 2
        if m <= 2 * scale:
            weight = 3 * m**3 - 10 * scale * m**2 + 16 * scale**3
        else:
            weight = -(m**3) + 10 * scale * m**2 - 32 * scale**2 * m + 32 * scale**3
        if weight and m < 4 * scale:
            weights[position] = weight
    first, last = min(weights), max(weights)
    divisor = gcd(*weights.values())
    return first, tuple(weights.get(position, 0) // divisor for position in range(first, last + 1))


def mirror(first: int, last: int, length: int) -> NDArray[np.int64]:
    """The positions first .. last-1 folded into 0 .. length-1: -1 -> 0, -2 -> 1, length -> length-1, ..."""
    return fold(np.arange(first, last), length)


def repeat(first: int, last: int, length: int) -> NDArray[np.int64]:
    """The positions first .. last-1, those outside 0 .. length-1 at its ends: -1 -> 0, -2 -> 0, length -> length-1."""
    return np.arange(first, last).clip(0, length - 1)


def fold(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Positions outside 0 .. length-1 mirrored about the ends, with the end pixel repeated."""
    folded = positions % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


def _exact_type(largest: int) -> DTypeLike:
    """The smaller type that adds up integers of this size without rounding."""
    assert largest <= 1 << 53
    return np.float32 if largest <= 1 << 24 else np.float64


def _weigh(
    piece: Callable[[int], NDArray[np.floating]],
    taps: tuple[int, ...],
    total: NDArray[np.floating],
    product: NDArray[np.floating],
) -> None:
    """total = sum over k of taps[k] * piece(k); the weights are symmetric, so two pieces share a multiplication."""
    target = total
    for tap in range((len(taps) + 1) // 2):
        if not taps[tap]:
            continue
        opposite = len(taps) - 1 - tap
        if tap == opposite:
            np.multiply(piece(tap), taps[tap], out=target)
        else:
            np.add(piece(tap), piece(opposite), out=target)
            target *= taps[tap]
        if target is product:
            total += product
        target = product
