"""FSRCNN (Dong et al., ECCV 2016): the student, and the network F inside the privileged teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models.upsampling import TransposedUpsampling, Upsampling, build_upsampling

PRELU_SLOPE = 0.25


def conv_prelu(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution with padding `kernel // 2`, then PReLU with one slope for the layer; weights drawn as FSRCNN does."""
    return nn.Sequential(conv(channels_in, channels_out, kernel, stride), nn.PReLU(init=PRELU_SLOPE))


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution with padding `kernel // 2`: zero bias, normal weights of deviation sqrt(2 / (out * kernel**2))."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (channels_out * kernel**2)))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class FSRCNN(nn.Module):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    `d`, `s` and `m` are the paper's: channels of the features, channels after shrinking, number of mapping layers.
    12,644 parameters with one channel (luma), 24,518 with three, at every scale. There is no global skip.
    `upsampling` is "transposed" for training or "subpixel" for inference; `deploy` turns one into the other.
    """

    # Maps that `forward` and `features` can give, in the order they are computed, each after its PReLU.
    MAPS = ("feature", "shrinking", "mapping", "expanding")
    takes = "lr"

    def __init__(
        self, scale: int, channels: int = 1, d: int = 56, s: int = 12, m: int = 4, upsampling: Upsampling = "transposed"
    ) -> None:
        super().__init__()
        for name, value in {"scale": scale, "channels": channels, "d": d, "s": s, "m": m}.items():
            if value < 1:
                raise UserError(f"FSRCNN: {name} is {value}; give 1 or more")
        if upsampling not in get_args(Upsampling):
            raise UserError(f"FSRCNN: upsampling is '{upsampling}'; {nearest(upsampling, get_args(Upsampling))}")
        self.scale = scale
        self.channels = channels
        self.arguments: dict[str, Any] = {
            "scale": scale,
            "channels": channels,
            "d": d,
            "s": s,
            "m": m,
            "upsampling": upsampling,
        }
        self.map_channels = {"feature": d, "shrinking": s, "mapping": s, "expanding": d}
        self.feature = conv_prelu(channels, d, 5)
        self.shrinking = conv_prelu(d, s, 1)
        self.mapping = nn.Sequential(*(conv_prelu(s, s, 3) for _ in range(m)))
        self.expanding = conv_prelu(s, d, 1)
        self.upsampling = build_upsampling(upsampling, d, channels, scale)

    def forward(self, image: Tensor, maps: Sequence[str] = ()) -> Any:
        """The enlarged image; with `maps`, a pair of it and `{name: feature map [B, C, H, W]}`."""
        wanted = {self._checked(name) for name in maps}
        taken: dict[str, Tensor] = {}
        features = image
        for name in self.MAPS:
            features = getattr(self, name)(features)
            if name in wanted:
                taken[name] = features
        enlarged = self.upsampling(features)
        return (enlarged, taken) if maps else enlarged

    def features(self, image: Tensor, name: str) -> Tensor:
        """The map `name` alone; nothing behind it is computed."""
        last = self.MAPS.index(self._checked(name))
        features = image
        for stage in self.MAPS[: last + 1]:
            features = getattr(self, stage)(features)
        return features

    def deploy(self) -> FSRCNN:
        """A copy for inference, in eval mode: the same function with the last layer as a sub-pixel convolution."""
        deployed = copy.deepcopy(self)
        if isinstance(self.upsampling, TransposedUpsampling):
            deployed.upsampling = self.upsampling.to_subpixel()
            deployed.arguments["upsampling"] = "subpixel"
        return deployed.eval()

    def _checked(self, name: str) -> str:
        if name not in self.MAPS:
            raise UserError(f"FSRCNN has no feature map '{name}'; valid: {', '.join(self.MAPS)}")
        return name
