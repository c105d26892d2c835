"""Operations in the form that is fastest on a CPU: the same but for rounding. Elsewhere they are PyTorch's own.

Measured with PyTorch 2.13 and oneDNN on a CPU with AVX-512: docs/results/gan-step.md. In channels-last memory
convolutions need no reordering, and reflection and pooling copy whole pixels; the exceptions are written out below.
What is traced, exported or mapped by `torch.func` sees PyTorch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_FEW = 16  # channels that oneDNN computes at once; of fewer most of its work is thrown away
_WIDE = 5  # side of a kernel from which the detour by columns pays


def applies(x: Tensor) -> bool:
    """Whether `x` is computed with at once, on a CPU."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def channels_last(x: Tensor) -> Tensor:
    """`[N, C, H, W]` in the layout in which a CPU computes fastest; as it is where results must repeat bit for bit.

    The repeatable form of reflection, `ops.repeatable`, is slow in it.
    """
    if not applies(x) or torch.are_deterministic_algorithms_enabled():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def instance_norm(x: Tensor) -> Tensor:
    """`functional.instance_norm` of `[N, C, H, W]`, with 1e-5 added to the variance; the layout stays.

    Contiguous: a group norm with one channel a group, a third of the time. Channels-last: a batch norm of one sample
    after the other, a fifth.
    """
    if not applies(x):
        return functional.instance_norm(x)
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return functional.group_norm(x, x.shape[1])
    # A shift changes nothing, so it needs no gradient. It makes the mean of a map of one value exact: what rounding
    # left of such a map, each further norm would enlarge by up to 300, and a blank image would become noise.
    x = x - x.detach()[:, :, :1, :1]
    if len(x) == 1:
        return functional.batch_norm(x, None, None, training=True)
    # Not slices: the gradient of each would be a batch of zeros, in another layout.
    return torch.cat([functional.batch_norm(one, None, None, training=True) for one in torch.split(x, 1)])


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """`functional.conv2d` with stride 1 and without padding."""
    if not applies(x):
        return functional.conv2d(x, weight, bias, groups=groups)
    out, channels, height, width = weight.shape
    if height == width == 1 and groups == 1 and torch.get_num_threads() == 1:
        # With one thread PyTorch leaves 1x1 kernels to MKL, half as fast here. A dilation, which a 1x1 kernel does not
        # feel, leads them to oneDNN.
        return functional.conv2d(x, weight, bias, dilation=2)
    if height >= _WIDE and groups == 1 and not _halved(x):
        if out < _FEW:
            return _few_out(x, weight, bias)
        if channels < _FEW and x.requires_grad:
            return _few_in(x, weight, bias)
    return functional.conv2d(x, weight, bias, groups=groups)


def strided(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, output_padding: int | None = None) -> Tensor:
    """`functional.conv2d` with stride 2 or, with `output_padding`, `functional.conv_transpose2d`."""
    if applies(x) and weight.requires_grad and not _halved(x) and not x.is_contiguous():
        transposed = output_padding is not None
        options = ((2, 2), (padding, padding), (1, 1), transposed, (output_padding or 0,) * 2, 1)
        convolved: Tensor = _Strided.apply(x, weight, bias, options)  # type: ignore[no-untyped-call]
        return convolved
    if output_padding is None:
        return functional.conv2d(x, weight, bias, stride=2, padding=padding)
    return functional.conv_transpose2d(x, weight, bias, stride=2, padding=padding, output_padding=output_padding)


class _Strided(torch.autograd.Function):
    """In channels-last memory all but the weight's gradient, which takes a third of the time in contiguous memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.biases = options, None if bias is None else bias.shape
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        back = torch.ops.aten.convolution_backward
        if needed[0]:
            of_x, _, _ = back(gradient, x, weight, ctx.biases, *ctx.options, (True, False, False))
        if needed[1] or needed[2]:
            wanted = (False, needed[1], needed[2])
            plain = (gradient.contiguous(), x.contiguous(), weight.contiguous())
            _, of_weight, of_bias = back(*plain, ctx.biases, *ctx.options, wanted)
        return of_x, of_weight, of_bias, None


def _few_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row of the kernel gives channels of its own, summed where the rows lie."""
    out, channels, rows, columns = weight.shape
    spread = functional.conv2d(x, weight.permute(2, 0, 1, 3).reshape(rows * out, channels, 1, columns))
    summed: Tensor = _RowsSummed.apply(spread, out)  # type: ignore[no-untyped-call]
    return summed if bias is None else summed + bias[:, None, None]


class _RowsSummed(torch.autograd.Function):
    """`[N, rows * out, H, W]` to `[N, out, H - rows + 1, W]`: row r is moved up by r. The way back copies once."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, out: int) -> Tensor:
        ctx.shape, ctx.out = spread.shape, out
        rows = spread.shape[1] // out
        height = spread.shape[2] - rows + 1
        summed = spread[:, :out, :height].clone()
        for row in range(1, rows):
            summed += spread[:, row * out : (row + 1) * out, row : row + height]
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, height = ctx.out, gradient.shape[2]
        spread = gradient.new_zeros(ctx.shape)
        for row in range(ctx.shape[1] // out):
            spread[:, row * out : (row + 1) * out, row : row + height] = gradient
        return spread, None


def _few_in(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row of the kernel reads channels of its own, the image's moved to where the row lies."""
    out, channels, rows, columns = weight.shape
    height = x.shape[2] - rows + 1
    moved = torch.cat([x[:, :, row : row + height] for row in range(rows)], 1)
    return functional.conv2d(moved, weight.permute(0, 2, 1, 3).reshape(out, rows * channels, 1, columns), bias)


def _halved(x: Tensor) -> bool:
    """Whether a convolution of `x` computes in half precision, where these forms round more or gain nothing."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.bfloat16, torch.float16)
