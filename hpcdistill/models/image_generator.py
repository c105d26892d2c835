"""What image-to-image generators have in common: images of one size in and out, named maps between, first weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from hpcdistill.errors import UserError, nearest
from hpcdistill.models import IMAGE_GENERATORS

DEVIATION = 0.02  # of the weights that CycleGAN and Pix2Pix start from
POWER_ITERATIONS = 15  # what torch takes when it puts a spectral norm on


class ImageGenerator(nn.Module):
    """`[B, channels_in, H, W]` in [-1, 1] -> `[B, channels_out, H, W]` in [-1, 1] (tanh).

    `forward(image)` gives the image; `forward(image, maps=names)` a pair of it and `{name: feature map [B, C, h, w]}`.
    No later layer writes into a map that was handed out. `arguments` rebuild the network. H and W are multiples of
    `multiple` and no less than `smallest`: `check_size`.
    """

    # The maps that `forward` gives, in the order they are computed; they depend on how deep the network is.
    MAPS: tuple[str, ...]
    DISTILLED: tuple[str, ...]  # the layers that FESD compares unless it is told otherwise
    SETTINGS: ClassVar[tuple[str, ...]]  # arguments that a configuration sets: width, depth, blocks
    NORM: ClassVar[Literal["instance", "batch"]]  # a conditional discriminator normalises as its generator does
    takes: Literal["image"] = "image"
    map_channels: dict[str, int]
    multiple: int
    smallest: int

    def __init__(self, channels_in: int, channels_out: int, **others: Any) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {**others, "channels_in": channels_in, "channels_out": channels_out}
        check_positive(type(self).__name__, self.arguments)
        self.channels_in = channels_in
        self.channels_out = channels_out

    def forward(self, image: Tensor, maps: Sequence[str] = ()) -> Any:
        """The generated image; with `maps`, a pair of it and `{name: feature map}`."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """UserError, with the nearest sizes that fit, for an image that the network cannot take."""
        sides = (height, width)
        if all(side % self.multiple == 0 and side >= self.smallest for side in sides):
            return
        lower = [max(self.smallest, side // self.multiple * self.multiple) for side in sides]
        upper = [max(self.smallest, -(-side // self.multiple) * self.multiple) for side in sides]
        sizes = dict.fromkeys("x".join(map(str, size)) for size in (lower, upper))
        least = f" of at least {self.smallest}" if self.smallest > self.multiple else ""
        raise UserError(
            f"{self.described()} takes images whose height and width are multiples of {self.multiple}{least}, not "
            f"{height}x{width}; nearest: {' or '.join(sizes)}{self._other_remedy(height, width)}"
        )

    def check_maps(self, names: Sequence[str]) -> None:
        """UserError for a map that `forward` cannot give."""
        for name in names:
            if name not in self.MAPS:
                raise UserError(
                    f"{self.described()} has no feature map '{name}'; {nearest(name, self.MAPS)}"
                    f" (all: {', '.join(self.MAPS)})"
                )

    def described(self) -> str:
        """The network's name for messages."""
        return type(self).__name__

    def deploy(self) -> Self:
        """A copy for inference, in eval mode."""
        return copy.deepcopy(self).eval()

    def _other_remedy(self, height: int, width: int) -> str:
        return ""


def build_generator(name: str, **arguments: Any) -> ImageGenerator:
    """A new generator; `arguments` are its class's (ngf, channels_in, channels_out; blocks, separable | levels).

    Raises UserError for an unknown name, and for arguments that the class does not take.
    """
    kind = IMAGE_GENERATORS[name]
    try:
        generator: ImageGenerator = kind(**arguments)
    except TypeError as error:
        raise UserError(f"generator '{name}': {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None
    return generator


def init_gan(module: nn.Module) -> None:
    """What CycleGAN and Pix2Pix start from: N(0, 0.02) in convolutions and linear layers, N(1, 0.02) in BatchNorm.

    Every bias is 0. Draws from torch's default generator in the order of `module.modules()`. A spectrally normalised
    weight is drawn before its normalisation, and its singular vectors are brought up to it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if parametrize.is_parametrized(layer, "weight"):
                _draw_behind_parametrization(layer)
            else:
                nn.init.normal_(layer.weight, 0.0, DEVIATION)
        elif isinstance(layer, _BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, DEVIATION)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def _draw_behind_parametrization(layer: nn.Module) -> None:
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    chain = layer.parametrizations["weight"]
    assert isinstance(chain, parametrize.ParametrizationList)
    assert isinstance(chain.original, Tensor)
    nn.init.normal_(chain.original, 0.0, DEVIATION)
    training = chain.training
    chain.train()
    for _ in range(POWER_ITERATIONS):
        chain()  # in training mode each pass is one power iteration
    chain.train(training)


def check_positive(network: str, arguments: dict[str, Any]) -> None:
    """UserError for a width, depth or number of channels below 1."""
    for key, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{network}: {key} is {value}; give 1 or more")
