"""A convolution whose padding mirrors the image, with a backward pass that can be repeated bit for bit."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.ops.repeatable import reflection_pad


class ReflectedConv2d(nn.Conv2d):
    """nn.Conv2d with `padding_mode="reflect"`: the same names, weights, values and MACs."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, groups: int = 1) -> None:
        """An odd `kernel` at stride 1, padded by half of it."""
        assert kernel % 2 == 1
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, padding_mode="reflect")

    def forward(self, input: Tensor) -> Tensor:
        side = self.kernel_size[0] // 2
        padded = reflection_pad(input, side, side, side, side)
        return functional.conv2d(padded, self.weight, self.bias, groups=self.groups)
