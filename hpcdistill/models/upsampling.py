"""The last layer of a super-resolution network: feature maps at LR size in, an image s times larger out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.ops.own_backward import conv2d

Upsampling = Literal["transposed", "subpixel"]

INITIAL_DEVIATION = 0.001  # FSRCNN's: the first outputs are close to zero
KERNEL = 9  # FSRCNN's


class SubpixelUpsampling(nn.Module):
    """Convolution to `scale**2 * channels_out` channels, then pixel shuffle: `[B, in, H, W]` -> `[B, out, sH, sW]`."""

    def __init__(self, channels_in: int, channels_out: int, scale: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is even; a sub-pixel convolution needs an odd one to keep its place")
        self.scale = scale
        self.conv = nn.Conv2d(channels_in, channels_out * scale**2, kernel, padding=kernel // 2)
        nn.init.normal_(self.conv.weight, std=INITIAL_DEVIATION)
        _zero_bias(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """The enlarged image; its range is that of the training images, not clamped."""
        return functional.pixel_shuffle(self.conv(features), self.scale)


class TransposedUpsampling(nn.Module):
    """Transposed convolution with stride s: `[B, in, H, W]` -> `[B, out, sH, sW]`; `kernel` is odd.

    Padding kernel // 2 and output padding s - 1 (FSRCNN's 9x9: padding 4; IDN's 17x17: padding 8).
    """

    def __init__(self, channels_in: int, channels_out: int, scale: int, kernel: int = KERNEL) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is even; with padding kernel // 2 it would enlarge by more than scale")
        self.scale = scale
        self.padding = kernel // 2
        self.conv = nn.ConvTranspose2d(
            channels_in, channels_out, kernel, stride=scale, padding=self.padding, output_padding=scale - 1
        )
        nn.init.normal_(self.conv.weight, std=INITIAL_DEVIATION)
        _zero_bias(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """The enlarged image; its range is that of the training images, not clamped."""
        if features.device.type == "cpu":
            # The same numbers through a convolution and a shuffle: 1.5 to 3 times faster on CPUs, forward and back.
            assert self.conv.bias is not None
            weight = transposed_to_subpixel(self.conv.weight, self.scale, self.padding, self.scale - 1)
            bias = self.conv.bias.repeat_interleave(self.scale**2)
            reach = weight.shape[-1] // 2
            planes = conv2d(features, weight, bias, (1, 1), (reach, reach))
            return functional.pixel_shuffle(planes, self.scale)
        image: Tensor = self.conv(features)
        return image

    def to_subpixel(self) -> SubpixelUpsampling:
        """The same function as a convolution and a pixel shuffle, with its own copy of the weights."""
        assert self.conv.bias is not None
        with torch.no_grad():
            weight = transposed_to_subpixel(self.conv.weight, self.scale, self.padding, self.scale - 1)
            subpixel = SubpixelUpsampling(
                self.conv.in_channels, self.conv.out_channels, self.scale, weight.shape[-1]
            ).to(weight)
            subpixel.conv.weight.copy_(weight)
            assert subpixel.conv.bias is not None
            subpixel.conv.bias.copy_(self.conv.bias.repeat_interleave(self.scale**2))
        return subpixel


def subpixel_kernel(scale: int, kernel: int = KERNEL) -> int:
    """Side of the sub-pixel kernel that equals `TransposedUpsampling`.

    9x9: 5 for scales 2 and 3, 3 for 4 to 7. 17x17: 9, 7 and 5 for scales 2, 3 and 4.
    """
    return transposed_to_subpixel(torch.empty(1, 1, kernel, kernel), scale, kernel // 2, scale - 1).shape[-1]


def build_upsampling(
    kind: Upsampling, channels_in: int, channels_out: int, scale: int, kernel: int = KERNEL
) -> nn.Module:
    """The last layer in its training form ("transposed", `kernel` on a side) or its inference form ("subpixel")."""
    if kind == "transposed":
        return TransposedUpsampling(channels_in, channels_out, scale, kernel)
    return SubpixelUpsampling(channels_in, channels_out, scale, subpixel_kernel(scale, kernel))


def _zero_bias(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def transposed_to_subpixel(weight: Tensor, stride: int, padding: int, output_padding: int) -> Tensor:
    """The kernel of the convolution that, followed by a pixel shuffle, equals a transposed convolution.

    `weight` `[in, out, K, L]` belongs to a transposed convolution (no groups, no dilation). The result
    `[out * stride**2, in, K', L']` has odd sides and goes with stride 1, zero padding K' // 2 and L' // 2 and
    `pixel_shuffle(stride)`; each output channel's bias is repeated `stride**2` times. It holds the same numbers,
    rearranged, and zeros; every step is differentiable. The two agree on the whole image, border included.

    With 9x9 kernels and padding 4, K' is 5 for strides 2 and 3, and 3 for stride 4.
    ValueError when the transposed convolution does not enlarge an image by exactly `stride`.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight has {weight.ndim} dimensions; give a 2-D transposed convolution's [in, out, K, L]")
    channels_in, channels_out, *kernel = weight.shape
    if stride < 1 or padding < 0:
        raise ValueError(f"stride {stride} and padding {padding} are impossible; give stride >= 1 and padding >= 0")
    for side in kernel:
        needed = stride + 2 * padding - side
        if output_padding != needed:
            raise ValueError(
                f"kernel {side}, stride {stride}, padding {padding} and output_padding {output_padding} do not enlarge "
                f"by exactly {stride}, so no sub-pixel convolution equals it; "
                + (f"use output_padding {needed}" if needed >= 0 else "use a smaller kernel or a larger padding")
            )
    (radius_y, top, bottom), (radius_x, left, right) = (_extent(side, stride, padding) for side in kernel)
    # Output pixel q * stride + r takes input pixel q + d times tap k = r + padding - d * stride: padded so that the
    # tap index is (radius - d) * stride + r, the kernel's axis splits into (radius - d, r); flipped, it is d + radius.
    phases = functional.pad(weight, (left, right, top, bottom)).reshape(
        channels_in, channels_out, 2 * radius_y + 1, stride, 2 * radius_x + 1, stride
    )
    return (
        phases.flip(2, 4)
        .permute(1, 3, 5, 0, 2, 4)
        .reshape(channels_out * stride**2, channels_in, 2 * radius_y + 1, 2 * radius_x + 1)
    )


def _extent(side: int, stride: int, padding: int) -> tuple[int, int, int]:
    """Along one axis: input pixels that the new kernel reaches to each side, zeros before and after the taps."""
    radius = max((stride - 1 + padding) // stride, (side - 1 - padding) // stride)
    before = radius * stride - padding
    after = (radius + 1) * stride + padding - side
    assert before >= 0
    assert after >= 0
    return radius, before, after
