"""8-bit images down-sampled exactly as MATLAB's `imresize(image, 1/s, 'bicubic')` defines it, in integers.

At 1/s with an integer s every output sees the same weights, and these are integers over one denominator. Sums of
products with 8-bit pixels are then integers too, and a floating-point type that holds the largest of them computes
without any rounding: 24 bits in float32, 53 in float64. Nothing but NumPy is needed, so that processes that pack
images start in a fifth of the time that importing torch takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd

import numpy as np
from numpy.typing import DTypeLike, NDArray

LARGEST_SCALE = 16  # above 20 the sums of the second pass do not fit 53 bits
_STRIP_BYTES = 1 << 19  # of the rows between the two passes: a core's cache holds them and their neighbours


def downsample_uint8(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """`[H, W, C]` 8-bit to `[H/scale, W/scale, C]` 8-bit; H and W must be multiples of `scale`, which is 1 to 16.

    The exact value, clamped, rounded half up once at the end: the same image gives the same bytes on every machine.
    Works in strips: beside the result it needs a few MiB whatever the image's size.
    """
    height, width, channels = image.shape
    if not 1 <= scale <= LARGEST_SCALE:
        raise ValueError(f"8-bit images are down-sampled by 1 to {LARGEST_SCALE}, not by {scale}")
    if height % scale or width % scale:
        raise ValueError(f"{height}x{width} is not a multiple of {scale}; crop the image first")
    if scale == 1:
        return image.copy()
    first, taps = integer_weights(scale)
    total, absolute = sum(taps), sum(map(abs, taps))
    # Between the passes 128 is taken off the pixels: at 2 the second pass then fits float32 as well.
    row_type, column_type = _exact_type(255 * absolute), _exact_type(max(128 * absolute**2, 256 * total**2))
    out_height, out_width, border = height // scale, width // scale, -first
    result = np.empty((out_height, out_width, channels), np.uint8)
    strip = max(1, min(out_height, _STRIP_BYTES // (width * channels * np.dtype(row_type).itemsize)))
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
        np.clip(exact, -128 * total**2, 127 * total**2, out=exact)
        exact += 128 * total**2 + total**2 // 2
        exact /= total**2  # rounded correctly, so that a sum below a multiple of total**2 stays below the integer
        result[top : top + count] = exact.astype(np.uint8).transpose(1, 2, 0)
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
