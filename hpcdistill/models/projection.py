"""The projections f: generator feature maps into the discriminator's input channels (fesd.md, section 4)."""

from __future__ import annotations

from torch import Tensor, nn

from hpcdistill.models.image_generator import check_positive
from hpcdistill.models.initialisation import init_gan


class Projection(nn.Module):
    """Conv 1x1 without bias, BatchNorm and ReLU: `[B, channels_in, h, w]` -> `[B, channels_out, h, w]`, >= 0.

    `channels_in * channels_out + 2 * channels_out` parameters; weights start as `init_gan`'s.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        check_positive("Projection", {"channels_in": channels_in, "channels_out": channels_out})
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
        )
        init_gan(self)

    def forward(self, features: Tensor) -> Tensor:
        """The projected map."""
        projected: Tensor = self.body(features)
        return projected
