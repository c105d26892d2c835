"""VDSR (Kim, Lee and Lee, CVPR 2016): twenty convolutions on the bicubically enlarged image."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from hpcdistill.models.sr_network import Residual, SRNetwork
from hpcdistill.ops.enlargement import BicubicEnlargement

DEPTH = 20  # the paper's d
WIDTH = 64


class VDSR(SRNetwork):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    The image is enlarged first, as MATLAB does, so that the network takes LR as every F does; 19 times Conv 3x3 with
    64 channels and ReLU, one Conv 3x3 back to `channels`, and the enlarged image added. Without biases: 664,704
    weights with one channel (luma), 667,008 with three, at every scale; 612.6 G MACs for 1280x720. Initial weights
    are He's (fan-in).

    Every map is at the HR size, [B, 64, sH, sW]. The distilled one is the last, "conv19": what the last convolution
    makes the residual image of. Its VID estimator works at the HR size too, sH x sW.
    """

    MAPS = tuple(f"conv{layer}" for layer in range(1, DEPTH))  # each after its ReLU
    DISTILLED = MAPS[-1]
    RESIDUAL: ClassVar[Residual] = "bicubic"

    def __init__(self, scale: int, channels: int = 1, **form: Any) -> None:
        super().__init__(scale, channels, {}, **form)
        self.enlargement = BicubicEnlargement(scale, channels)  # what the network reads, whatever it adds at the end
        self.map_channels = dict.fromkeys(self.MAPS, WIDTH)
        for number, name in enumerate(self.MAPS):
            layer = _conv(WIDTH if number else channels, WIDTH)
            self.add_module(name, nn.Sequential(layer, nn.ReLU(inplace=True)))
        self.residual = _conv(WIDTH, channels)
        self._take_form()

    def _prepared(self, image: Tensor) -> Tensor:
        assert self.enlargement is not None
        enlarged: Tensor = self.enlargement(image)
        return enlarged

    def _reconstructed(self, features: Tensor) -> Tensor:
        image: Tensor = self.residual(features)
        return image

    def _enlarged(self, prepared: Tensor) -> Tensor:
        return prepared


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer
