"""BatchNorm over the batches of all ranks, so that what is learnt does not depend on their number.

PyTorch's own SyncBatchNorm refuses CPUs; this one runs wherever an all_reduce does, and costs one each way.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

_AXES: Final = (0, 2, 3)


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d whose batch, in training mode, is that of all ranks together; input [B, C, H, W].

    Every rank must call it as often as the others and with as many values a channel, as the loop's equal shares have.
    The statistics are float32 or better whatever the input is, autocast or not; the output has the input's dtype.
    With `track_running_stats` switched off in training mode (a frozen group) it normalises in the same way and
    remembers nothing. In eval mode, and on one rank, it is its base class and sends nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if not self.training or ranks == 1:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            own_variance, own_mean = torch.var_mean(x, _AXES, correction=0)
            # One row a rank, and not sums of x and x^2, whose difference would lose the variance to rounding.
            rank = distributed.get_rank()
            row = functional.pad(torch.cat([own_mean, own_variance])[None], (0, 0, rank, ranks - 1 - rank))
            means, variances = _SumOverRanks.apply(row).chunk(2, dim=1)  # type: ignore[no-untyped-call]
            mean = means.mean(0)
            variance = variances.mean(0) + (means - mean).square().mean(0)
            if self.track_running_stats:
                self._remember(mean.detach(), variance.detach(), ranks * x.numel() // x.shape[1])
            scale = torch.rsqrt(variance + self.eps)
            if self.affine:
                scale = scale * self.weight
            y = (x - _by_channel(mean)) * _by_channel(scale)
            return (y + _by_channel(self.bias) if self.affine else y).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Move the running statistics, the variance as the unbiased one of `values` values a channel."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum None is the average of all batches; a tensor, so that the host waits for nothing.
        step = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance * (values / (values - 1)))):
            running.copy_(torch.lerp(running.to(new.dtype), new, step))


def synchronise(module: nn.Module) -> None:
    """Make every nn.BatchNorm2d in `module` a synchronised one.

    Only the class changes: parameters, buffers, modes, hooks and the state's keys stay, also of a shared layer.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SynchronisedBatchNorm2d


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


class _SumOverRanks(torch.autograd.Function):
    """all_reduce; a rank's input reaches every rank's loss, so the gradients are summed over ranks, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(gradient)  # type: ignore[no-untyped-call]
        return total
