"""CycleGAN's generator (Zhu et al., ICCV 2017), with dense or with separable residual blocks (fesd.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.models.image_generator import ImageGenerator, init_gan
from hpcdistill.models.instance_norm import InstanceNorm2d
from hpcdistill.ops import cpu_forms
from hpcdistill.ops.repeatable import reflection_pad

BLOCKS = 9


class ReflectedConv2d(nn.Conv2d):
    """nn.Conv2d with `padding_mode="reflect"`: the same names, weights, values and MACs.

    Its backward pass can be repeated bit for bit, see `ops.repeatable`.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, groups: int = 1, bias: bool = True) -> None:
        """An odd `kernel` at stride 1, padded by half of it."""
        assert kernel % 2 == 1
        padding = kernel // 2
        super().__init__(
            channels_in, channels_out, kernel, padding=padding, groups=groups, bias=bias, padding_mode="reflect"
        )

    def forward(self, input: Tensor) -> Tensor:
        side = self.kernel_size[0] // 2
        padded = reflection_pad(input, side, side, side, side)
        return cpu_forms.convolution(padded, self.weight, self.bias, self.groups)


class PointwiseConv2d(nn.Conv2d):
    """nn.Conv2d with a 1x1 kernel."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, input: Tensor) -> Tensor:
        return cpu_forms.convolution(input, self.weight, self.bias)


class HalvingConv2d(nn.Conv2d):
    """nn.Conv2d with a 3x3 kernel and stride 2: half the height and width."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return cpu_forms.strided(input, self.weight, self.bias, 1)


class DoublingConv2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a 3x3 kernel and stride 2: twice the height and width."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return cpu_forms.strided(input, self.weight, self.bias, 1, output_padding=1)


class ResidualBlock(nn.Module):
    """`[B, d, h, w]` -> the same: x + (two 3x3 convolutions, each normalised, a ReLU between them).

    Dense: 2 (9 d^2 + d) parameters. Separable: each convolution is a depthwise one, normalised, and a pointwise one;
    2 (d^2 + 11 d) parameters. `inner`: channels between the two convolutions, where they are not d.
    """

    def __init__(self, channels: int, separable: bool, inner: int | None = None) -> None:
        super().__init__()
        layers = _separable if separable else _dense
        between = channels if inner is None else inner
        self.body = nn.Sequential(
            *layers(channels, between),
            _norm(between),
            nn.ReLU(inplace=True),
            *layers(between, channels),
            _norm(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The next block's input."""
        residual: Tensor = self.body(features)
        return features + residual


class ResNetGenerator(ImageGenerator):
    """`[B, channels_in, H, W]` in [-1, 1] -> `[B, channels_out, H, W]` in [-1, 1]; H and W multiples of 4, from 8 on.

    `ngf` is the base width: 7x7 to ngf, two steps down to 4 ngf, `blocks` residual blocks, two steps up, 7x7 and
    tanh; all padding reflects but in the strided layers. InstanceNorm has no parameters and no running statistics, so
    that an image's output does not depend on its batch or on the mode. Weights start as `init_gan`'s.
    Other widths, as compressed generators have, are `widths` and `inner`.
    11,378,179 parameters and 56.8 G MACs at 256x256 with ngf 64 (the Original); separable 1,987,075 and 18.3 G;
    the student, separable with ngf 16, 137,347 and 1.41 G.

    Maps, all [B, 4 ngf, H/4, W/4] (the third of `widths`): "down2" (after its ReLU) and "block1" to "block9". The
    distilled ones are "down2" and those after each third of the blocks: 3, 6 and 9 of 9.
    """

    MAPS: tuple[str, ...] = ("down2", *(f"block{block}" for block in range(1, BLOCKS + 1)))
    DISTILLED: tuple[str, ...] = ("down2", "block3", "block6", "block9")
    SETTINGS = ("ngf", "blocks", "separable", "widths", "inner")
    NORM = "instance"
    multiple = 4
    smallest = 8  # InstanceNorm and reflection need 2x2 in the blocks

    def __init__(
        self,
        ngf: int = 64,
        blocks: int = BLOCKS,
        separable: bool = False,
        channels_in: int = 3,
        channels_out: int = 3,
        widths: Sequence[int] | None = None,
        inner: Sequence[int] | None = None,
    ) -> None:
        """`widths`: of stem, down1, down2, up1 and up2; `inner`: one for each block. Where given, `ngf` is unused."""
        own = {name: list(given) for name, given in (("widths", widths), ("inner", inner)) if given is not None}
        super().__init__(channels_in, channels_out, ngf=ngf, blocks=blocks, separable=separable, **own)
        stem, down1, width, up1, up2 = _positive("widths", widths or (ngf, 2 * ngf, 4 * ngf, 2 * ngf, ngf), 5)
        between = _positive("inner", inner or (width,) * blocks, blocks)
        block_names = tuple(f"block{block}" for block in range(1, blocks + 1))
        thirds = (-(-blocks * part // 3) for part in (1, 2, 3))
        self.MAPS = ("down2", *block_names)
        self.DISTILLED = ("down2", *dict.fromkeys(f"block{block}" for block in thirds))
        self.map_channels = dict.fromkeys(self.MAPS, width)
        self.stem = _normalised(ReflectedConv2d(channels_in, stem, 7))
        self.down1 = _normalised(HalvingConv2d(stem, down1))
        self.down2 = _normalised(HalvingConv2d(down1, width))
        for name, its in zip(block_names, between, strict=True):
            self.add_module(name, ResidualBlock(width, separable, its))
        self.up1 = _normalised(DoublingConv2d(width, up1))
        self.up2 = _normalised(DoublingConv2d(up1, up2))
        self.head = nn.Sequential(ReflectedConv2d(up2, channels_out, 7), nn.Tanh())
        self._stages = ("stem", "down1", *self.MAPS, "up1", "up2", "head")
        init_gan(self)

    def forward(self, image: Tensor, maps: Sequence[str] = ()) -> Any:
        """The generated image; with `maps`, a pair of it and `{name: map [B, 4 ngf, H/4, W/4]}`."""
        self.check_size(*image.shape[-2:])
        self.check_maps(maps)
        taken: dict[str, Tensor] = {}
        features = cpu_forms.channels_last(image)
        for name in self._stages:
            features = getattr(self, name)(features)
            if name in maps:
                taken[name] = features
        return (features, taken) if maps else features


def _positive(name: str, numbers: Sequence[int], count: int) -> Sequence[int]:
    if len(numbers) != count or min(numbers) < 1:
        raise UserError(f"ResNetGenerator: {name} is {list(numbers)}; give {count} numbers of 1 or more")
    return numbers


def _dense(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [ReflectedConv2d(channels_in, channels_out, 3)]


def _separable(channels_in: int, channels_out: int) -> list[nn.Module]:
    depthwise = ReflectedConv2d(channels_in, channels_in, 3, groups=channels_in)
    return [depthwise, _norm(channels_in), PointwiseConv2d(channels_in, channels_out)]


def _norm(channels: int) -> InstanceNorm2d:
    return InstanceNorm2d(channels)


def _normalised(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    # In place is safe: what a map shows is the ReLU's result, and the normalisation's backward needs its input only.
    return nn.Sequential(convolution, _norm(convolution.out_channels), nn.ReLU(inplace=True))
