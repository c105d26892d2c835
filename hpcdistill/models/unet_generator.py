"""Pix2Pix's generator (Isola et al., CVPR 2017): a U-Net whose number of levels fits the size of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.models.image_generator import ImageGenerator, init_gan

LEVELS = 8
FEWEST_LEVELS = 2
WIDTHS = (1, 2, 4, 8)  # in units of ngf; every further level has the last
SLOPE = 0.2


class UNetGenerator(ImageGenerator):
    """`[B, channels_in, H, W]` in [-1, 1] -> `[B, channels_out, H, W]` in [-1, 1]; H and W multiples of 2^levels.

    `levels` down-convolutions and as many up-convolutions, 4x4 with stride 2, counted from the outside: number 1
    works between the image and ngf channels. BatchNorm (but on the outermost and the innermost level's way down),
    LeakyReLU 0.2 before a down-, ReLU before an up-convolution, no bias but in the outermost up-convolution, no
    dropout. Weights start as `init_gan`'s. With 8 levels 54.414 M parameters and 18.1 G MACs at 256x256 for ngf 64,
    3.4045 M and 1.22 G for the student's ngf 16.

    Maps, each exactly what a convolution reads, so after its activation: "down{k}" is the input of down-convolution
    k = 2 ... levels, [B, width(k - 1), H / 2^(k-1), ...]; "up{k}" the input of up-convolution k = 1 ... levels,
    [B, 2 width(k), H / 2^k, ...] (skip first), on the innermost level [B, width(levels), ...].
    The distilled ones are "down3", "down5", "up4" and "up2"; where there are fewer levels, the innermost that exists
    stands for those that do not, once: 4 levels distil down3, down4, up4, up2, and 3 levels down3, up3, up2.
    """

    MAPS: tuple[str, ...] = (*(f"down{k}" for k in range(2, LEVELS + 1)), *(f"up{k}" for k in range(LEVELS, 0, -1)))
    DISTILLED: tuple[str, ...] = ("down3", "down5", "up4", "up2")
    SETTINGS = ("ngf", "levels")
    NORM = "batch"

    def __init__(self, ngf: int = 64, levels: int = LEVELS, channels_in: int = 3, channels_out: int = 3) -> None:
        super().__init__(channels_in, channels_out, ngf=ngf, levels=levels)
        if levels < FEWEST_LEVELS:
            raise UserError(f"UNetGenerator: levels is {levels}; give {FEWEST_LEVELS} or more")
        self.levels = levels
        self.multiple = self.smallest = 2**levels
        # widths[k]: channels on level k, of which 0 is the image.
        widths = [channels_in, *(ngf * WIDTHS[min(k, len(WIDTHS)) - 1] for k in range(1, levels + 1))]
        down_maps = {f"down{k}": widths[k - 1] for k in range(2, levels + 1)}
        up_maps = {f"up{k}": widths[k] * (1 if k == levels else 2) for k in range(levels, 0, -1)}
        self.map_channels = down_maps | up_maps
        self.MAPS = tuple(self.map_channels)
        self.DISTILLED = tuple(
            dict.fromkeys(f"{way}{min(k, levels)}" for way, k in (("down", 3), ("down", 5), ("up", 4), ("up", 2)))
        )
        for k in range(1, levels + 1):
            convolution = nn.Conv2d(widths[k - 1], widths[k], 4, stride=2, padding=1, bias=False)
            normalised = 1 < k < levels
            norm = [nn.BatchNorm2d(widths[k])] if normalised else []
            self.add_module(f"down{k}", nn.Sequential(convolution, *norm))
        for k in range(levels, 0, -1):
            channels = widths[k - 1] if k > 1 else channels_out
            enlarging = nn.ConvTranspose2d(up_maps[f"up{k}"], channels, 4, stride=2, padding=1, bias=k == 1)
            self.add_module(f"up{k}", nn.Sequential(enlarging, nn.BatchNorm2d(channels) if k > 1 else nn.Tanh()))
        init_gan(self)

    def forward(self, image: Tensor, maps: Sequence[str] = ()) -> Any:
        """The generated image; with `maps`, a pair of it and `{name: map [B, C, h, w]}`."""
        self.check_size(*image.shape[-2:])
        self.check_maps(maps)
        taken: dict[str, Tensor] = {}
        features = image
        skips: list[Tensor] = []
        for k in range(1, self.levels + 1):
            if k > 1:
                skips.append(features)
                # In place, into the skip too: the ReLU that comes after the skip makes the same of both.
                features = functional.leaky_relu_(features, SLOPE)
                _keep(taken, maps, f"down{k}", features)
            features = getattr(self, f"down{k}")(features)
        for k in range(self.levels, 0, -1):
            if k < self.levels:
                features = torch.cat([skips.pop(), features], dim=1)
            if k == 1:
                features = self.before_last(features)
            features = functional.relu_(features)
            _keep(taken, maps, f"up{k}", features)
            features = getattr(self, f"up{k}")(features)
        return (features, taken) if maps else features

    def before_last(self, features: Tensor) -> Tensor:
        """What comes between the last skip and the outermost up-convolution's ReLU: here nothing."""
        return features

    def described(self) -> str:
        """The network's name for messages."""
        return f"{type(self).__name__} with {self.levels} levels"

    def _other_remedy(self, height: int, width: int) -> str:
        common = math.gcd(height, width)
        fitting = (common & -common).bit_length() - 1 if common else 0
        return f"; or set levels to {fitting}" if FEWEST_LEVELS <= fitting < self.levels else ""


def _keep(taken: dict[str, Tensor], wanted: Sequence[str], name: str, features: Tensor) -> None:
    if name in wanted:
        taken[name] = features
