"""The variational estimator: what the student's feature map says of the teacher's, and how surely."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.models.fsrcnn import conv, conv_prelu

SCALE_FACTOR = 0.1
SMALLEST_SCALE = 1e-8  # keeps ln b and 1/b finite


class VIDEstimator(nn.Module):
    """q(t | student's map) of variational information distillation; used in training only, 12,770 parameters at 56.

    Two branches Conv1x1-PReLU-Conv1x1 with their own weights; the second ends in 0.1 softplus(.) + 1e-8.
    """

    def __init__(self, channels: int = 56) -> None:
        super().__init__()
        self.mu = nn.Sequential(conv_prelu(channels, channels, 1), conv(channels, channels, 1))
        self.b = nn.Sequential(conv_prelu(channels, channels, 1), conv(channels, channels, 1))

    def forward(self, student_map: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` -> location `mu` and scale `b` > 0 of the teacher's map, both `[B, C, H, W]` float32.

        Autocast is switched off here: the loss divides by b, which half precision would round to a few values.
        """
        weight = next(self.parameters())
        with torch.autocast(student_map.device.type, enabled=False):
            inputs = student_map.to(weight.dtype)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            mu, b = self.mu(inputs).to(dtype), self.b(inputs).to(dtype)
            return mu, SCALE_FACTOR * functional.softplus(b) + SMALLEST_SCALE
