"""An exported network in the place of PyTorch's, so that it is measured as any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcdistill.deploy.model import Model
from hpcdistill.errors import UserError


class SessionNetwork(nn.Module):
    """Runs the session of `model` on tensors; it has no weights that PyTorch could see."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        about = model.about
        self.takes = "lr" if about.task == "super-resolution" else "image"
        self.channels = about.channels
        if self.takes == "lr":
            self.scale = about.scale

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    def check_size(self, height: int, width: int) -> None:
        """UserError for an image that it cannot take."""
        multiple, smallest = self.model.about.multiple, self.model.about.smallest
        if height % multiple or width % multiple or min(height, width) < smallest:
            raise UserError(
                f"{self.model.origin} takes images whose height and width are multiples of {multiple}, {smallest} "
                f"or more, not {height}x{width}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """`[B, channels, H, W]` to `[B, channels, scale H, scale W]`, in the range that its description says."""
        given = np.ascontiguousarray(images.detach().float().cpu().numpy())
        made = self.model.session(given)
        return torch.from_numpy(np.require(made, np.float32, ["C", "W"])).to(images.device)
