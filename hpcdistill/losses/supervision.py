"""Deep supervision: differences between an image and its target of the same size."""

from __future__ import annotations

import torch
from torch import Tensor


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference (0-dim) of two tensors of one shape, in float32 or better whatever they come in.

    ValueError when the shapes differ: broadcasting would give a number that means nothing.
    """
    check_same_shape(image, target)
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    return (image.to(dtype) - target.to(dtype)).abs().mean()


def check_same_shape(first: Tensor, *others: Tensor) -> None:
    """ValueError that shows both shapes unless all tensors have the same one."""
    for other in others:
        if other.shape != first.shape:
            raise ValueError(
                f"a loss compares tensors of one shape, not {list(first.shape)} and {list(other.shape)}; "
                "check the scale and the channels of the network and of the data"
            )
