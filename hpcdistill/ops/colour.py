"""Luma as MATLAB's `rgb2ycbcr` computes it (BT.601, studio swing), before its rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Y = 16 + 65.481 R + 128.553 G + 24.966 B for R, G, B in [0, 1] and Y in [16, 235].
_OFFSET = 16.0
_WEIGHTS = (65.481, 128.553, 24.966)


def luma(rgb: Tensor) -> Tensor:
    """`[..., 3, H, W]` RGB in [0, 1] to `[..., 1, H, W]` luma in [16/255, 235/255]; keeps the dtype."""
    if rgb.shape[-3] != 3:
        raise ValueError(f"luma takes 3 channels, not {rgb.shape[-3]}")
    red, green, blue = (rgb.narrow(-3, channel, 1) for channel in range(3))
    r, g, b = (weight / 255 for weight in _WEIGHTS)
    return red * r + green * g + blue * b + _OFFSET / 255


def with_luma(rgb: Tensor, luminance: Tensor) -> Tensor:
    """`[..., 3, H, W]` RGB with the chroma (Cb, Cr) it has and the luma `[..., 1, H, W]` in [16/255, 235/255].

    In BT.601 the same step of R, G and B moves Y by 219/255 of it, and Cb and Cr not at all.
    """
    return rgb + (luminance - luma(rgb)) * (255 / 219)


def luma_uint8(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`[H, W, 3]` 8-bit RGB to `[H, W]` float32 luma in [16/255, 235/255], for images kept in memory."""
    if rgb.dtype != np.uint8 or rgb.shape[-1] != 3:
        raise ValueError(f"luma_uint8 takes 8-bit RGB, not {rgb.dtype} with {rgb.shape[-1]} channels")
    # Exact integers up to the division: the same bits on every machine, and for a crop as for the whole image.
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    numerator = 65_481 * red + 128_553 * green + 24_966 * blue + 255_000 * int(_OFFSET)
    result: NDArray[np.float32] = numerator.astype(np.float32) / np.float32(255 * 255_000)
    return result
