"""The Gram matrix of a feature map (Gatys et al., CVPR 2016): what its channels have in common, wherever it is."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """F F^T / (C H W) of `[B, C, H, W]`, F its `[C, H W]`: `[B, C, C]`, in float32 or better whatever it comes in."""
    channels, height, width = x.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        return flat @ flat.transpose(1, 2) / (channels * height * width)
