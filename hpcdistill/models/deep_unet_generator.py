"""OMGD's deep teacher for pairs (Ren et al., ICCV 2021): a U-Net as narrow as the student, with more layers a level."""

from __future__ import annotations

from torch import Tensor, nn

from hpcdistill.models.image_generator import init_gan
from hpcdistill.models.resnet_generator import ReflectedConv2d
from hpcdistill.models.unet_generator import LEVELS, UNetGenerator
from hpcdistill.ops.repeatable import reflection_pad

EXTRA = 2  # blocks at each place
WIDENING = 4  # inside a block


class ExtraBlock(nn.Module):
    """`[B, d, h, w]` -> the same, h and w at least 2: x + (1x1 to 4 d, 3x3, 1x1 to d, 3x3, a BatchNorm after each).

    A ReLU after all norms but the last, reflected padding, no biases. What the first 3x3 needs is padded before the
    1x1 in front of it, so that the first norm's statistics are of the padded map. 161 d^2 + 20 d parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = WIDENING * channels
        self.body = nn.Sequential(
            *_normalised(nn.Conv2d(channels, wide, 1, bias=False)),
            *_normalised(nn.Conv2d(wide, wide, 3, bias=False)),
            *_normalised(nn.Conv2d(wide, channels, 1, bias=False)),
            ReflectedConv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The next block's input."""
        residual: Tensor = self.body(reflection_pad(features, 1, 1, 1, 1))
        return features + residual


class DeepUNetGenerator(UNetGenerator):
    """`UNetGenerator` with two `ExtraBlock`s at each place: the same images, maps and limits.

    On every level but the innermost they follow the way down's norm (on level 1, that has none, the convolution) and
    the way up's norm; on level 1 those of the way up stand before its ReLU and up-convolution, on what the skip and
    the level below have brought there. With ngf 16 and 8 levels 44.172 M parameters and, at 256x256, 18.344 G MACs by
    the literature's rule, 17.532 G true.
    """

    def __init__(self, ngf: int = 16, levels: int = LEVELS, channels_in: int = 3, channels_out: int = 3) -> None:
        super().__init__(ngf, levels, channels_in, channels_out)
        for k in range(1, levels):  # the innermost level has none
            getattr(self, f"down{k}").extend(_extra(self.map_channels[f"down{k + 1}"]))
            if k > 1:  # what level k hands to level k - 1
                getattr(self, f"up{k}").extend(_extra(self.map_channels[f"down{k}"]))
        self.before = _extra(self.map_channels["up1"])
        init_gan(self)

    def before_last(self, features: Tensor) -> Tensor:
        """Two blocks more."""
        enriched: Tensor = self.before(features)
        return enriched


def _extra(channels: int) -> nn.Sequential:
    return nn.Sequential(*(ExtraBlock(channels) for _ in range(EXTRA)))


def _normalised(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
