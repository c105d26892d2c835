"""Pieces of images, each cut where its own numbers say, without the host reading them."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(images: Tensor, side: int, top: Tensor, left: Tensor) -> Tensor:
    """The `side` x `side` pixels below and right of (`top`, `left`) of each image, `[B, C, side, side]`.

    `images` `[B, C, H, W]` of any range and dtype, `top` and `left` `[B]` int64 on their device, `0 <= top <= H - side`
    and `0 <= left <= W - side`. Differentiable; no pixel is read twice, so the gradient is the same at each call.
    """
    offsets = torch.arange(side, device=images.device)
    rows, columns = top[:, None] + offsets, left[:, None] + offsets
    numbers = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
