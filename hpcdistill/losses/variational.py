"""Variational information distillation (Ahn et al., CVPR 2019): -log q(teacher's map | student's map).

Both forms are means over batch, channels and positions, computed in float32 or better. The target gets no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcdistill.losses.supervision import check_same_shape


def laplace(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln(2b) + |t - mu| / b (0-dim): t Laplace with location `mu` and scale `b` > 0, all `[B, C, H, W]`.

    DSSD's equation 17 prints ln b for ln(2b); the constant has no gradient.
    """
    mu, b, target = _prepared(mu, b, target)
    return (torch.log(2 * b) + (target - mu).abs() / b).mean()


def gaussian(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln b + (t - mu)^2 / (2 b^2) + ln(2 pi) / 2 (0-dim): t normal with mean `mu`, deviation `b`."""
    mu, b, target = _prepared(mu, b, target)
    return (torch.log(b) + ((target - mu) / b).square() / 2).mean() + math.log(2 * math.pi) / 2


def _prepared(mu: Tensor, b: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_same_shape(mu, b, target)
    dtype = torch.promote_types(mu.dtype, torch.float32)
    return mu.to(dtype), b.to(dtype), target.detach().to(dtype)
