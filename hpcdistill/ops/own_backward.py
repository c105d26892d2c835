"""Layers whose backward pass on a CPU is written here: PyTorch 2.13's own takes several times as long.

The forward passes are PyTorch's. The backward passes compute the same sums in another order, so gradients agree to
rounding (float32: some 1e-6 of the largest). Measured on an AMD EPYC of 2025, one thread, maps [16, 56, 48, 48]:

- `prelu`: PyTorch computes both gradients element by element, without the processor's vector instructions, and writes
  the slope's as a whole map before it sums it: 9.6 ms against 1.4 ms.
- `conv2d`: asked for the bias's gradient too, oneDNN takes another kernel for the weight's. Alone, and the bias's as
  a sum beside it: 12.3 against 6.1 ms for 3x3 from 1 to 56 channels on [4, 1, 192, 192].
- The gradient of an image of one channel is one product of matrices, its rows added in their places: 11.4 against
  4.4 ms for 3x3 on [4, 1, 192, 192].
- The weight's gradient of a strided convolution over large images is cut into the phases of the stride, which are
  convolutions without one: 51 against 28 ms for 3x3 with stride 2 on [4, 56, 192, 192], channels-last.

- `laplace` and `scaled_softplus`, of variational information distillation: fourteen passes over maps that do not fit
  a cache, and one of them, the softplus's backward pass, without vector instructions. Here each piece of the maps goes
  through all of them while the cache holds it.

Elsewhere (a GPU, half precision, tracing, torch.func, no gradients) they are the ordinary operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

PIECE: Final = 2**18  # elements of three maps that a core's cache holds; larger pieces wait for memory
LARGE_IMAGE: Final = 2**20  # elements of one image's map from which the phases of a stride are faster
_KINDS = (torch.float32, torch.float64)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """max(x, 0) + slope min(x, 0), elementwise; `slope` `[1]` for all channels, else the ordinary operation."""
    if _is_ours(x, slope) and slope.numel() == 1:
        result: Tensor = _PReLU.apply(x, slope)  # type: ignore[no-untyped-call]
        return result
    return functional.prelu(x, slope)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """`functional.conv2d` without groups and dilation: `[B, C, H, W]` -> `[B, C', H', W']`."""
    if _is_ours(x, weight) and not torch.is_autocast_enabled("cpu"):
        result: Tensor = _Conv2d.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]
        return result
    return functional.conv2d(x, weight, bias, stride, padding)


def scaled_softplus(x: Tensor, scale: float, smallest: float) -> Tensor:
    """scale softplus(x) + smallest, elementwise."""
    if _is_ours(x, x):
        result: Tensor = _ScaledSoftplus.apply(x, scale, smallest)  # type: ignore[no-untyped-call]
        return result
    return scale * functional.softplus(x) + smallest


def laplace(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln(2b) + |target - mu| / b (0-dim), all of one shape; no gradient for the target."""
    if _is_ours(mu, b) and target.dtype == mu.dtype:
        result: Tensor = _Laplace.apply(mu, b, target)  # type: ignore[no-untyped-call]
        return result
    return (torch.log(2 * b) + (target - mu).abs() / b).mean()


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether autograd, and nothing else, follows this call on a CPU."""
    return (
        not torch._C._is_tracing()
        and x.device.type == "cpu"
        and x.dtype in _KINDS
        and weight.dtype == x.dtype
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return functional.prelu(x, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        layout = _layout(x)
        x, gradient = (tensor.contiguous(memory_format=layout) for tensor in (x, gradient))
        result = torch.empty_like(gradient)
        negative = torch.empty(min(PIECE, x.numel()), dtype=x.dtype)
        sums = []
        for inputs, arriving, leaving in zip(*(_pieces(tensor) for tensor in (x, gradient, result)), strict=True):
            below = torch.clamp(inputs, max=0, out=negative[: len(inputs)])
            sums.append(torch.dot(arriving, below))
            torch.ops.aten.threshold_backward.grad_input(arriving, inputs, 0, grad_input=leaving)
            leaving.lerp_(arriving, slope[0])  # where x > 0 both are alike; elsewhere from 0 to the gradient
        return result, torch.stack(sums).sum().view_as(slope)


class _ScaledSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, smallest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        x = x.contiguous(memory_format=_layout(x))
        result = torch.empty_like(x)
        for inputs, outputs in zip(_pieces(x), _pieces(result), strict=True):
            torch.ops.aten.softplus.out(inputs, out=outputs)
            outputs.mul_(scale).add_(smallest)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        [x] = ctx.saved_tensors
        x, gradient = (tensor.contiguous(memory_format=_layout(x)) for tensor in (x, gradient))
        result = torch.empty_like(x)
        for inputs, arriving, leaving in zip(*(_pieces(tensor) for tensor in (x, gradient, result)), strict=True):
            torch.sigmoid(inputs, out=leaving).mul_(arriving).mul_(ctx.scale)
        return result, None, None


class _Laplace(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the maps are in the cache; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
        layout, count = _layout(mu), mu.numel()
        maps = [tensor.contiguous(memory_format=layout) for tensor in (mu, b, target)]
        of_mu, of_b = torch.empty_like(maps[0]), torch.empty_like(maps[0])
        sums = []
        for location, scale, wanted, to_mu, to_b in zip(*map(_pieces, (*maps, of_mu, of_b)), strict=True):
            inverse = scale.reciprocal()
            apart = location - wanted
            torch.sign(apart, out=to_mu).mul_(inverse).div_(count)
            ratio = apart.abs_().mul_(inverse)
            sums += [ratio.sum(), scale.log().sum()]
            torch.addcmul(inverse, ratio, inverse, value=-1, out=to_b).div_(count)  # 1 / b - |t - mu| / b^2
        ctx.save_for_backward(of_mu, of_b)
        return torch.stack(sums).sum() / count + math.log(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        of_mu, of_b = ctx.saved_tensors
        return gradient * of_mu, gradient * of_b, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=_layout(x if x.shape[1] > 1 else gradient))
        stride, padding = ctx.stride, ctx.padding
        of_x = of_weight = None
        if for_x and x.shape[1] == 1 and stride == (1, 1) and _is_channels_last(gradient):
            of_x = _input_by_taps(gradient, x, weight, padding)
        elif for_x:
            of_x = _of_conv(gradient, x, weight, stride, padding, wanted="input")
        if for_weight and _phases_are_faster(x, weight, stride):
            of_weight = _weight_by_phases(gradient, x, weight, stride, padding)
        elif for_weight:
            of_weight = _of_conv(gradient, x, weight, stride, padding, wanted="weight")
        return of_x, of_weight, gradient.sum((0, 2, 3)) if for_bias else None, None, None


def _of_conv(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], wanted: str
) -> Tensor:
    """PyTorch's gradient with respect to the input or the weight of a convolution."""
    mask = [wanted == "input", wanted == "weight", False]
    both = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, list(stride), list(padding), [1, 1], False, [0, 0], 1, mask
    )
    result: Tensor = both[0 if wanted == "input" else 1]
    return result


def _input_by_taps(gradient: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of an input of one channel: a product of matrices for all taps, each then added in its place."""
    width = weight.shape[3]
    pixels = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    taps = weight.reshape(len(weight), -1).t() @ pixels.t()
    rows, columns = gradient.shape[2:]
    padded = x.new_zeros(len(x), x.shape[2] + 2 * padding[0], x.shape[3] + 2 * padding[1])
    for number, tap in enumerate(taps.view(-1, len(x), rows, columns)):
        top, left = divmod(number, width)
        padded[:, top : top + rows, left : left + columns] += tap
    inside = padded[:, padding[0] : padding[0] + x.shape[2], padding[1] : padding[1] + x.shape[3]]
    return inside.unsqueeze(1).contiguous()


def _phases_are_faster(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> bool:
    """Where phases have enough taps to be worth a call each, and oneDNN's kernel for whole images is slow."""
    strides = stride[0] * stride[1]
    few = weight.shape[2] * weight.shape[3] < 2 * strides
    return strides > 1 and not few and x[0].numel() >= LARGE_IMAGE and _is_channels_last(x)


def _weight_by_phases(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The weight's gradient, image by image: a tap sees every stride-th pixel, so taps that see the same ones are the
    weight of a convolution without stride over those pixels alone."""
    total = torch.zeros_like(weight)
    for arriving, image in zip(*(torch.split(tensor, 1) for tensor in (gradient, x)), strict=True):
        for phase_y, first_y, last_y, taps_y in _phases(weight.shape[2], stride[0], padding[0]):
            for phase_x, first_x, last_x, taps_x in _phases(weight.shape[3], stride[1], padding[1]):
                seen = image[:, :, phase_y :: stride[0], phase_x :: stride[1]]
                height, width = arriving.shape[2] + last_y, arriving.shape[3] + last_x
                around = (-first_x, width - seen.shape[3], -first_y, height - seen.shape[2])
                seen = functional.pad(seen, around).contiguous(memory_format=torch.channels_last)
                part = total[:, :, taps_y, taps_x]
                part += _of_conv(arriving, seen, torch.empty_like(part), (1, 1), (0, 0), wanted="weight")
    return total


def _phases(taps: int, stride: int, padding: int) -> Iterator[tuple[int, int, int, slice]]:
    """Along one axis: the pixels that some taps see (first, then every stride-th), the first and the last of those
    taps' shifts in such pixels, and which taps they are."""
    for first in range(min(stride, taps)):
        shift, phase = divmod(first - padding, stride)
        yield phase, shift, shift + (taps - 1 - first) // stride, slice(first, None, stride)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """All elements in the order of memory, in pieces."""
    return torch.split(tensor.as_strided((tensor.numel(),), (1,)), PIECE)


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
