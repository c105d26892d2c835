"""The PatchGAN discriminator of CycleGAN and Pix2Pix (fesd.md, section 1)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models.image_generator import check_positive
from hpcdistill.models.initialisation import init_gan

DiscriminatorNorm = Literal["instance", "batch"]

SLOPE = 0.2
MOST_WIDTHS = 8  # in units of ndf


class PatchDiscriminator(nn.Module):
    """`[B, channels_in, H, W]` -> logits `[B, 1, H/2^layers - 2, W/2^layers - 2]`, each of a patch; no sigmoid.

    `layers` strided 4x4 convolutions of ndf, 2 ndf, 4 ndf ... channels, one more with stride 1, and one to the logit,
    padding 1; LeakyReLU 0.2 after all but the last, `norm` after all but the first and the last. With 3 layers a
    logit sees 70x70 pixels. Convolutions have biases but where a BatchNorm, which has its own, follows.
    CycleGAN: 3 channels, ndf 64, "instance": 2,764,737 parameters. Pix2Pix: 6 channels (source and target), ndf 128,
    "batch": 11,042,433. Weights start as `init_gan`'s. Sides are at least 3 * 2^layers: `check_size`.
    """

    takes: Literal["image"] = "image"

    def __init__(
        self, channels_in: int = 3, ndf: int = 64, norm: DiscriminatorNorm = "instance", layers: int = 3
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {"channels_in": channels_in, "ndf": ndf, "norm": norm, "layers": layers}
        check_positive("PatchDiscriminator", self.arguments)
        if norm not in get_args(DiscriminatorNorm):
            raise UserError(f"PatchDiscriminator: norm is '{norm}'; {nearest(norm, get_args(DiscriminatorNorm))}")
        self.channels_in = channels_in
        self.layers = layers
        self.smallest = 3 * 2**layers  # the last norm has 2x2 values then, and one logit is left
        widths = [channels_in, *(ndf * min(2**layer, MOST_WIDTHS) for layer in range(layers + 1))]
        self.activation_channels = {k: widths[k] for k in range(1, layers + 2)}
        for k in range(1, layers + 2):
            normalised = k > 1
            convolution = nn.Conv2d(
                widths[k - 1],
                widths[k],
                4,
                stride=2 if k <= layers else 1,
                padding=1,
                bias=not (normalised and norm == "batch"),
            )
            between = [_norm(norm, widths[k])] if normalised else []
            self.add_module(f"layer{k}", nn.Sequential(convolution, *between, nn.LeakyReLU(SLOPE, inplace=True)))
        self.logit = nn.Conv2d(widths[-1], 1, 4, padding=1)
        init_gan(self)

    def forward(self, image: Tensor) -> Tensor:
        """The patches' logits `[B, 1, h, w]`."""
        logits: Tensor = self.logit(self.activations(image))
        return logits

    def activations(self, image: Tensor, k: int | None = None) -> Tensor:
        """The k-th LeakyReLU's output, k = 1 ... layers + 1 (the default); nothing behind it is computed.

        For `layers` = 3 and k = 4: `[B, 8 ndf, H/8 - 1, W/8 - 1]`.
        """
        last = self.layers + 1 if k is None else k
        if last not in self.activation_channels:
            raise UserError(f"PatchDiscriminator has no activation {last}; valid: 1 to {self.layers + 1}")
        self.check_size(*image.shape[-2:])
        features = image
        for layer in range(1, last + 1):
            features = getattr(self, f"layer{layer}")(features)
        return features

    def check_size(self, height: int, width: int) -> None:
        """UserError for an image, or a map that enters as one, that is too small."""
        if min(height, width) < self.smallest:
            raise UserError(
                f"PatchDiscriminator with {self.layers} layers takes {self.smallest}x{self.smallest} pixels or more, "
                f"not {height}x{width}; enlarge its input or give it fewer layers"
            )


def _norm(kind: DiscriminatorNorm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.InstanceNorm2d(channels, affine=False, track_running_stats=False)
