"""What is measured of each pair of a translated image and its target, both of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdistill.metrics.base import PSNR_CAP


def psnr_rgb(produced: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 RGB [B, 3, H, W], at most PSNR_CAP; float64."""
    error = (produced.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PSNR_CAP)


def l1_rgb(produced: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference [B], levels in 0..255, of uint8 RGB [B, 3, H, W]; float64.

    What Pix2Pix's generator is trained by (Isola et al., CVPR 2017), in the units of a picture.
    """
    return (produced.double() - targets.double()).abs().mean(dim=(1, 2, 3))
