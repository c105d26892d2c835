"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy to a GPU takes its turn behind the work queued there, and nobody waits for it.

    From pageable memory the host would wait, for that work too. Pinned memory is kept until it has been copied.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
