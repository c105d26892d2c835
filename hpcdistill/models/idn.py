"""IDN (Hui, Wang and Gao, CVPR 2018): information distillation blocks, a residual over the bicubic image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpcdistill.models.sr_network import Residual, SRNetwork
from hpcdistill.models.upsampling import Upsampling, build_upsampling

WIDTH = 64  # D3, channels between the blocks
DIFFERENCE = 16  # d: D3 - D1 = D1 - D2 = D6 - D4 = D4 - D5
KEPT = WIDTH // 4  # D3 / s with s = 4: channels that skip the second half of an enhancement unit
GROUPS = 4  # of the second and the fifth convolution of a block
BLOCKS = 4
SLOPE = 0.05
KERNEL = 17  # of the transposed convolution


class DBlock(nn.Module):
    """Enhancement unit and compression unit: `[B, 64, H, W]` -> `[B, 64, H, W]`; 124,176 parameters.

    Three convolutions (48, 32, 64 channels); 16 of their channels are kept, the other 48 go through three more
    (64, 48, 80). To those 80 the block's input and the kept 16 are added, and a 1x1 convolution compresses them to
    64. Every convolution is followed by a leaky ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.above = nn.Sequential(
            _conv_lrelu(WIDTH, WIDTH - DIFFERENCE),
            _conv_lrelu(WIDTH - DIFFERENCE, WIDTH - 2 * DIFFERENCE, groups=GROUPS),
            _conv_lrelu(WIDTH - 2 * DIFFERENCE, WIDTH),
        )
        self.below = nn.Sequential(
            _conv_lrelu(WIDTH - KEPT, WIDTH),
            _conv_lrelu(WIDTH, WIDTH - DIFFERENCE, groups=GROUPS),
            _conv_lrelu(WIDTH - DIFFERENCE, WIDTH + KEPT),
        )
        self.compression = _conv_lrelu(WIDTH + KEPT, WIDTH, kernel=1)

    def forward(self, features: Tensor) -> Tensor:
        """The next block's input."""
        short_path: Tensor = self.above(features)
        kept, passed = short_path[:, :KEPT], short_path[:, KEPT:]
        enhanced = self.below(passed) + torch.cat([features, kept], dim=1)
        compressed: Tensor = self.compression(enhanced)
        return compressed


class IDN(SRNetwork):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    FBlock: two Conv 3x3 with 64 channels; four DBlocks; RBlock: a transposed convolution 17x17 whose output is added
    to the bicubically enlarged image. 552,769 parameters with one channel (luma), 590,915 with three, at every scale.
    `upsampling` is "transposed" for training or "subpixel" for inference; `deploy` turns one into the other.

    The authors' transposed convolution gives (H - 1) s + 1 rows and their bicubic image is cropped to it; here it has
    padding 8 and output padding s - 1, as FSRCNN's, and nothing is cropped. Its weights start at FSRCNN's
    deviation of 0.001, so that the untrained network is near the bicubic enlargement; the authors start it at 0.015
    and train it at a tenth of the rate. The other weights start as He's (fan-in), biases at zero.

    Every map is at the LR size, [B, 64, H, W]. The distilled one is "dblock4", the last before the reconstruction.
    """

    MAPS = ("fblock", *(f"dblock{block}" for block in range(1, BLOCKS + 1)))
    DISTILLED = MAPS[-1]
    RESIDUAL: ClassVar[Residual] = "bicubic"

    def __init__(self, scale: int, channels: int = 1, upsampling: Upsampling = "transposed", **form: Any) -> None:
        super().__init__(scale, channels, {"upsampling": upsampling}, **form)
        self.map_channels = dict.fromkeys(self.MAPS, WIDTH)
        self.fblock = nn.Sequential(_conv_lrelu(channels, WIDTH), _conv_lrelu(WIDTH, WIDTH))
        for name in self.MAPS[1:]:
            self.add_module(name, DBlock())
        self.upsampling = build_upsampling(upsampling, WIDTH, channels, scale, KERNEL)
        self._take_form()

    def _reconstructed(self, features: Tensor) -> Tensor:
        residual: Tensor = self.upsampling(features)
        return residual


def _conv_lrelu(channels_in: int, channels_out: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, groups=groups)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, nn.LeakyReLU(SLOPE, inplace=True))
