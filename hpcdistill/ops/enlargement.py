"""MATLAB's bicubic enlargement by an integer, as padding, two grouped convolutions and a pixel shuffle.

The same numbers as `ops.bicubic.upsample`, in operations that every exporter knows and without Python that looks at
an image's size. PyTorch's own bicubic is another one: Keys' kernel with a = -0.75 and a border that repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.ops.bicubic import kernel_phases
from hpcdistill.ops.precision import full_float32

REACH = 2  # pixels that an output reads to each side of its own input pixel


class BicubicEnlargement(nn.Module):
    """`[B, channels, H, W]` -> `[B, channels, scale H, scale W]`, a = -0.5, mirrored at the border; not clamped.

    Has no parameters, and nothing in a state dict. Computes in float32 or better whatever the module is cast to. Costs
    5 (s + s^2) multiply-accumulates a channel and input pixel: 5.8 M for one channel and 1280x720 pixels at x4.
    UserError for a scale below 1 or one that is no integer.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, scale: int, channels: int = 1) -> None:
        super().__init__()
        if not isinstance(scale, int) or scale < 1:
            raise UserError(f"the bicubic enlargement has an integer scale of 1 or more, not {scale}")
        self.scale = scale
        self.channels = channels
        self._fill(torch.float32, torch.get_default_device())

    def forward(self, image: Tensor) -> Tensor:
        """The enlarged image, of the image's dtype."""
        dtype = image.dtype
        image = image.to(torch.promote_types(dtype, torch.float32))
        with full_float32(image.device.type):
            rows, columns = self.rows.to(image.dtype), self.columns.to(image.dtype)
            planes = functional.conv2d(mirrored_rows(image), rows, groups=self.channels)
            planes = functional.conv2d(mirrored_columns(planes), columns, groups=self.channels * self.scale)
            return functional.pixel_shuffle(planes, self.scale).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Cast to half precision, the weights would no longer be the kernel's: they follow the device only.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill(torch.promote_types(self.rows.dtype, torch.float32), self.rows.device)
        return self

    def _fill(self, dtype: torch.dtype, device: Any) -> None:
        taps = np.zeros((self.scale, 2 * REACH + 1))
        for phase, (first, weights) in enumerate(kernel_phases(self.scale)):
            taps[phase, first + REACH : first + REACH + len(weights)] = weights
        # Channel c, row phase i, column phase j: the order in which a pixel shuffle takes them, (c s + i) s + j.
        # Repeated by NumPy: on the meta device, where files are checked, torch would import its compiler for that.
        rows = torch.from_numpy(np.tile(taps, (self.channels, 1))[:, None, :, None]).to(device, dtype)
        columns = torch.from_numpy(np.tile(taps, (self.channels * self.scale, 1))[:, None, None, :]).to(device, dtype)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)


def mirrored_rows(image: Tensor) -> Tensor:
    """With two more above and below, mirrored about the edge: x1 x0 | x0 x1 x2 ..., or x0 x0 | x0 of a single one."""
    once = functional.pad(image, (0, 0, 1, 1), mode="replicate")
    return torch.cat([once[..., 2:3, :], once, once[..., -3:-2, :]], dim=-2)


def mirrored_columns(image: Tensor) -> Tensor:
    """The same to the left and to the right."""
    once = functional.pad(image, (1, 1, 0, 0), mode="replicate")
    return torch.cat([once[..., 2:3], once, once[..., -3:-2]], dim=-1)
