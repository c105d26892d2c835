"""FSRCNN (Dong et al., ECCV 2016): the student, and the network F inside the privileged teacher."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from hpcdistill.models.layers import Conv2d, PReLU
from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.models.upsampling import Upsampling, build_upsampling

PRELU_SLOPE = 0.25


def conv_prelu(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution with padding `kernel // 2`, then PReLU with one slope for the layer; weights drawn as FSRCNN does."""
    return nn.Sequential(conv(channels_in, channels_out, kernel, stride), PReLU(init=PRELU_SLOPE))


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution with padding `kernel // 2`: zero bias, normal weights of deviation sqrt(2 / (out * kernel**2))."""
    layer = Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (channels_out * kernel**2)))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class FSRCNN(SRNetwork):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    `d`, `s` and `m` are the paper's: channels of the features, channels after shrinking, number of mapping layers.
    12,644 parameters with one channel (luma), 24,518 with three, at every scale. As published
    there is no global skip; `residual="bicubic"` adds one.
    `upsampling` is "transposed" for training or "subpixel" for inference; `deploy` turns one into the other.
    """

    MAPS = ("feature", "shrinking", "mapping", "expanding")  # [B, d or s, H, W], each after its PReLU
    DISTILLED = "expanding"

    def __init__(
        self,
        scale: int,
        channels: int = 1,
        d: int = 56,
        s: int = 12,
        m: int = 4,
        upsampling: Upsampling = "transposed",
        **form: Any,
    ) -> None:
        super().__init__(scale, channels, {"d": d, "s": s, "m": m, "upsampling": upsampling}, **form)
        self.map_channels = {"feature": d, "shrinking": s, "mapping": s, "expanding": d}
        self.feature = conv_prelu(channels, d, 5)
        self.shrinking = conv_prelu(d, s, 1)
        self.mapping = nn.Sequential(*(conv_prelu(s, s, 3) for _ in range(m)))
        self.expanding = conv_prelu(s, d, 1)
        self.upsampling = build_upsampling(upsampling, d, channels, scale)
        self._take_form()

    def _reconstructed(self, features: Tensor) -> Tensor:
        enlarged: Tensor = self.upsampling(features)
        return enlarged
