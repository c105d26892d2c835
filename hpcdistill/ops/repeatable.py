"""Operations that PyTorch has no repeatable backward pass for on a GPU, in a form that has one.

Where `torch.use_deterministic_algorithms` is on, what PyTorch's own kernels add up in any order is written with
slices, concatenations and matrix products. Elsewhere these are PyTorch's own operations, which are faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_HEIGHT, _WIDTH = 2, 3


def reflection_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """`[B, C, H, W]` with its inside mirrored beyond its edges, the edge pixels not repeated.

    The same values as `functional.pad(mode="reflect")`; each width is less than the side it is added to.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return functional.pad(x, (left, right, top, bottom), mode="reflect")
    return _mirrored(_mirrored(x, _HEIGHT, top, bottom), _WIDTH, left, right)


def resize(x: Tensor, height: int, width: int, mode: Literal["bilinear", "area"]) -> Tensor:
    """`[B, C, H, W]` to `[B, C, height, width]`, of the same dtype, as `functional.interpolate(x, size, mode=mode)`.

    The repeatable form is two matrix products in float32 or better: the same but for rounding.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return functional.interpolate(x, (height, width), mode=mode)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows = _matrix(x.shape[_HEIGHT], height, mode, x.device, dtype)
        columns = _matrix(x.shape[_WIDTH], width, mode, x.device, dtype)
        return (rows @ x.to(dtype) @ columns.T).to(x.dtype)


def largest_of_four(x: Tensor) -> Tensor:
    """The maximum over 2x2 pixels at stride 1: `[B, C, H, W]` to `[B, C, H - 1, W - 1]`.

    Of equal values the repeatable form shares the gradient, PyTorch's pooling gives it to the first.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return functional.max_pool2d(x, 2, stride=1)
    rows = torch.maximum(x[:, :, :-1], x[:, :, 1:])
    return torch.maximum(rows[..., :-1], rows[..., 1:])


def _mirrored(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    length = x.shape[axis]
    if max(before, after) >= length:
        raise ValueError(f"a side of {length} pixels cannot be mirrored over {max(before, after)}; give a larger image")
    pieces = [x]
    if before:
        pieces.insert(0, x.narrow(axis, 1, before).flip(axis))
    if after:
        pieces.append(x.narrow(axis, length - 1 - after, after).flip(axis))
    return torch.cat(pieces, axis)


@lru_cache(maxsize=64)
def _matrix(size: int, out: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[out, size]: what each new pixel of an axis takes of the old ones."""
    weights = (_bilinear if mode == "bilinear" else _area)(size, out)
    with torch.inference_mode(False):  # else a matrix made in an evaluation could not be used in training
        return torch.from_numpy(weights).to(device, dtype)


def _bilinear(size: int, out: int) -> NDArray[np.float64]:
    """Pixel centres: new pixel i lies at (i + 1/2) size / out - 1/2 of the old ones, inside their outer centres."""
    place = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    weights: NDArray[np.float64] = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))
    return weights


def _area(size: int, out: int) -> NDArray[np.float64]:
    """The mean of the old pixels that a new one touches, as adaptive average pooling takes it."""
    new = np.arange(out)[:, None]
    touched = (np.arange(size) >= new * size // out) & (np.arange(size) < -(-(new + 1) * size // out))
    weights: NDArray[np.float64] = touched / touched.sum(1, keepdims=True)
    return weights
