"""MATLAB's `imresize(image, scale, 'bicubic')` of floating-point images.

Keys' kernel with a = -0.5, widened by 1/scale when shrinking (antialiasing), half-sample-symmetric border,
normalised weights, rows first, then columns, nothing rounded between the two. Of 8-bit images, which super-resolution's
test sets are made of, MATLAB rounds in between: see `ops.downsampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcdistill.ops.downsampling import downsample_uint8, fold, mirror

__all__ = ["downsample", "downsample_uint8", "kernel", "resize_bicubic", "upsample"]

Scale = Fraction | float | int

_MAX_PHASES = 8  # above this many kernel phases a gather per tap is cheaper than a slice per phase and tap


def resize_bicubic(images: Tensor, scale: Scale | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
    """Resize `[..., H, W]` (floating point, any range) by `scale`, or to `size` = (height, width); keeps the dtype.

    With `scale` an axis of length n becomes ceil(n * scale), as in MATLAB; a float is taken as the fraction it
    stands for (1/3 is a third). With `size` each axis has its own scale. Differentiable; half precision is
    computed in float32. Nothing is clamped: the kernel overshoots at edges.
    """
    if not images.is_floating_point():
        raise ValueError(f"resize_bicubic takes floating-point images, not {images.dtype}; use downsample_uint8")
    height, width = images.shape[-2:]
    if (scale is None) == (size is None):
        raise ValueError("resize_bicubic takes either a scale or a size")
    if size is not None:
        scales = Fraction(size[0], height), Fraction(size[1], width)
    else:
        assert scale is not None
        scales = (Fraction(scale).limit_denominator(10_000),) * 2
        size = ceil(height * scales[0]), ceil(width * scales[1])
    if min(size) < 1 or min(height, width) < 1:
        raise ValueError(f"cannot resize {height}x{width} to {size[0]}x{size[1]}")
    exact = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    rows = _resize_axis(exact, -2, size[0], scales[0])
    return _resize_axis(rows, -1, size[1], scales[1]).to(images.dtype)


def downsample(images: Tensor, scale: int) -> Tensor:
    """`[..., H, W]` to `[..., H/scale, W/scale]`; H and W must be multiples of `scale`."""
    height, width = images.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"{height}x{width} is not a multiple of {scale}; crop the image first")
    return resize_bicubic(images, Fraction(1, scale))


def upsample(images: Tensor, scale: int) -> Tensor:
    """`[..., H, W]` to `[..., H*scale, W*scale]`: the literature's bicubic baseline."""
    return resize_bicubic(images, Fraction(scale))


def kernel(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _weights(outputs: NDArray[np.int64], scale: Fraction) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For 0-based output positions `[N]`: the first input position `[N]` (may be outside) and the weights `[N, P]`."""
    shrink = min(float(scale), 1.0)  # the kernel is widened only when shrinking
    width = 4 / shrink
    # Pixel centres: output x lies at (x + 1/2) / scale - 1/2 of the input. In integers, so that no place is off by one.
    numerator = (2 * outputs + 1) * scale.denominator - scale.numerator
    whole, rest = np.divmod(numerator, 2 * scale.numerator)
    fraction = rest / (2 * scale.numerator)
    first = np.floor(fraction - width / 2).astype(np.int64)
    taps = np.arange(ceil(width) + 2)
    weights = kernel(shrink * (fraction[:, None] - (first[:, None] + taps)))
    return whole + first, weights / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=256)
def kernel_phases(scale: Fraction | int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """The kernel for a scale p/q: outputs r, r + p, r + 2p, ... see the same weights, each q inputs further on.

    For r = 0 .. p-1: the first input position of output r and its weights, without the zeros at both ends.
    """
    firsts, weights = _weights(np.arange(scale.numerator), Fraction(scale))
    phases = []
    for first, row in zip(firsts.tolist(), weights, strict=True):
        used = np.flatnonzero(row)
        phases.append((first + int(used[0]), tuple(row[used[0] : used[-1] + 1].tolist())))
    return tuple(phases)


@lru_cache(maxsize=256)
def _gather_weights(length: int, out: int, scale: Fraction) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mirrored input positions and weights `[P, out]` for scales with many phases."""
    firsts, weights = _weights(np.arange(out), scale)
    positions = firsts[:, None] + np.arange(weights.shape[1])
    used = np.abs(weights).max(axis=0) > 0
    return fold(positions, length)[:, used].T.copy(), weights[:, used].T.copy()


def _resize_axis(images: Tensor, axis: int, out: int, scale: Fraction) -> Tensor:
    if scale == 1:
        return images
    if scale.numerator > _MAX_PHASES:
        return _resize_axis_by_gather(images, axis, out, scale)
    phases, step, period = kernel_phases(scale), scale.denominator, scale.numerator
    counts = [len(range(phase, out, period)) for phase in range(period)]
    spans = [
        (first, first + (count - 1) * step + len(taps))
        for (first, taps), count in zip(phases, counts, strict=True)
        if count
    ]
    low, high = min(first for first, _ in spans), max(last for _, last in spans)
    padded = _pad_symmetric(images, axis, low, high)
    parts = [
        _weighted_slices(padded, axis, first - low, step, count, taps)
        for (first, taps), count in zip(phases, counts, strict=True)
    ]
    if period == 1:
        return parts[0]
    # Interleave the phases; the last period may be cut.
    most = counts[0]
    if any(count != most for count in counts):
        parts = [part if part.shape[axis] == most else _extend(part, axis, most) for part in parts]
    woven = torch.stack(parts, dim=-1 if axis == -1 else -2)
    return woven.flatten(-2)[..., :out] if axis == -1 else woven.flatten(-3, -2)[..., :out, :]


def _extend(images: Tensor, axis: int, length: int) -> Tensor:
    shape = list(images.shape)
    shape[axis] = length - images.shape[axis]
    return torch.cat([images, images.new_zeros(shape)], dim=axis)


def _weighted_slices(images: Tensor, axis: int, start: int, step: int, count: int, taps: Sequence[float]) -> Tensor:
    """sum over k of taps[k] * images[start + k + step * i], i = 0 .. count-1, along `axis`."""
    total: Tensor | None = None
    for k, weight in enumerate(taps):
        first = start + k
        window = (slice(first, first + (count - 1) * step + 1 if count else first, step),)
        piece = images[(..., *window)] if axis == -1 else images[(..., *window, slice(None))]
        total = piece * weight if total is None else total.add_(piece, alpha=weight)
    assert total is not None
    return total


def _pad_symmetric(images: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Positions low .. high-1 of the axis, mirrored about its ends with the end pixel repeated."""
    length = images.shape[axis]
    start, stop = max(low, 0), min(high, length)
    pieces = [images.narrow(axis, start, stop - start)]
    if low < 0:
        pieces.insert(0, _take(images, axis, mirror(low, 0, length)))
    if high > length:
        pieces.append(_take(images, axis, mirror(length, high, length)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def _take(images: Tensor, axis: int, positions: NDArray[np.int64]) -> Tensor:
    return images.index_select(axis, torch.from_numpy(positions).to(images.device))


def _resize_axis_by_gather(images: Tensor, axis: int, out: int, scale: Fraction) -> Tensor:
    positions, weights = _gather_weights(images.shape[axis], out, scale)
    factors = torch.from_numpy(weights).to(images.device, images.dtype)
    if axis == -2:
        factors = factors[..., None]
    total = _take(images, axis, positions[0]) * factors[0]
    for tap in range(1, len(positions)):
        total = total + _take(images, axis, positions[tap]) * factors[tap]
    return total
