"""What a network costs: parameters and multiply-accumulates (MACs), counted without computing anything.

Two counts, because the literature's differs: it charges a transposed convolution as if it were a convolution at the
size of its output, which is stride**2 times what it really takes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpcdistill.models.collapsible import collapse
from hpcdistill.ops.enlargement import BicubicEnlargement

OUTPUT_SIZE = (720, 1280)  # height, width in pixels: the literature's size for super-resolution
IMAGE_SIZE = (256, 256)  # and for image-to-image translation


class Cost(NamedTuple):
    """Parameters (shared ones once) and MACs of convolutions for one forward pass."""

    params: int
    macs: int  # the literature's rule
    true_macs: int


def cost(module: nn.Module, input_shape: Sequence[int], **options: Any) -> Cost:
    """The cost of `module(image, **options)` for an image of `input_shape` `(B, C, H, W)`.

    Counts convolutions and transposed convolutions (of a bicubic enlargement in `true_macs` only), not their biases,
    activations or anything else. Runs on the meta device: a copy of the module, no memory for feature maps, no
    arithmetic. What is trained wide is counted collapsed.
    """
    shadow = copy.deepcopy(module).to("meta").eval()
    collapse(shadow)
    image = torch.empty(tuple(input_shape), device="meta")
    flops = _convolution_count(shadow, image, options, {})
    assert flops % 2 == 0  # FlopCounterMode counts a multiplication and an addition for each
    _forget_enlargements(shadow)
    return Cost(
        params=sum(parameter.numel() for parameter in shadow.parameters()),
        macs=_convolution_count(shadow, image, options, {torch.ops.aten.convolution: _literature_macs}),
        true_macs=flops // 2,
    )


def _forget_enlargements(module: nn.Module) -> None:
    """Leave a bicubic enlargement out of the count, as the literature does: here it is convolutions."""
    for parent in list(module.modules()):
        for name, part in parent.named_children():
            if isinstance(part, BicubicEnlargement):
                setattr(parent, name, nn.Upsample(scale_factor=part.scale))


def super_resolution_cost(generator: nn.Module) -> Cost:
    """The cost of a super-resolution generator (with `scale`, `channels` and `takes`) for a 1280x720 output.

    Where the scale does not divide 1280x720 (x3: 426.67 pixels wide) the next larger size that it divides is counted
    and reduced in proportion to the pixels, which is how the literature's figures come about; a fully convolutional
    network's count is exactly proportional.
    """
    scale, channels = cast(int, generator.scale), cast(int, generator.channels)
    height, width = (-(-side // scale) * scale for side in OUTPUT_SIZE)
    reduction = Fraction(OUTPUT_SIZE[0] * OUTPUT_SIZE[1], height * width)
    divisor = 1 if cast(str, generator.takes) == "hr" else scale
    counted = cost(generator, (1, channels, height // divisor, width // divisor))
    return Cost(counted.params, round(counted.macs * reduction), round(counted.true_macs * reduction))


def image_cost(network: nn.Module) -> Cost:
    """The cost of an image-to-image generator or a discriminator (with `channels_in`) for a 256x256 input."""
    return cost(network, (1, cast(int, network.channels_in), *IMAGE_SIZE))


def network_cost(network: nn.Module) -> Cost:
    """The cost of any network at the literature's size for what it `takes`: "lr" or "hr", or "image"."""
    return image_cost(network) if takes_images(network) else super_resolution_cost(network)


def takes_images(network: nn.Module) -> bool:
    """Whether `network` translates or judges images rather than enlarges them."""
    return cast(str, network.takes) == "image"


def _convolution_count(module: nn.Module, image: torch.Tensor, options: dict[str, Any], mapping: dict[Any, Any]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), counter:
        module(image, **options)
    return int(counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0))


def _literature_macs(
    image_shape: Sequence[int], weight_shape: Sequence[int], *arguments: Any, out_shape: Sequence[int], **_: Any
) -> int:
    """Elements of the output times the inputs that a convolution would read for each: in / groups * kernel area."""
    # aten.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    groups: int = arguments[6]
    elements = 1
    for side in out_shape:
        elements *= side
    area = 1
    for side in weight_shape[2:]:
        area *= side
    return elements * (image_shape[1] // groups) * area
