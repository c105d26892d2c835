"""The orthonormal Haar transform of images (Haar 1910; Mallat 1989): what is fine, scale by scale, and what is left."""

from __future__ import annotations

import torch
from torch import Tensor


def haar(images: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    """The detail bands of each level, the finest first, and the deepest low band.

    `images` `[B, C, H, W]` of any range, H and W multiples of 2^levels: of level j the bands are `[B, C, 3, H/2^j,
    W/2^j]`, the low band is `[B, C, H/2^levels, W/2^levels]`. Of a 2x2 block a b / c d they are (a+b-c-d)/2,
    (a-b+c-d)/2 and (a-b-c+d)/2, the low band is (a+b+c+d)/2; the next level takes that. The sum of all squares stays.
    ValueError for other sizes.
    """
    height, width = images.shape[-2:]
    if levels < 1 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"{levels} levels of Haar's transform take sides that 2^{levels} divides, not {height}x{width}"
        )
    bands = []
    low = images
    for _ in range(levels):
        upper, lower = low[..., 0::2, :], low[..., 1::2, :]
        sums, differences = (upper + lower) / 2, (upper - lower) / 2
        (left, right), (left_change, right_change) = ((x[..., 0::2], x[..., 1::2]) for x in (sums, differences))
        bands.append(torch.stack([left_change + right_change, left - right, left_change - right_change], dim=2))
        low = left + right
    return bands, low
