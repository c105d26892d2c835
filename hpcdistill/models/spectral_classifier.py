"""The spectral classifier SC: real or generated, judged from the radial log-spectrum alone (fesd.md, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hpcdistill.models.image_generator import check_positive
from hpcdistill.models.initialisation import init_gan


class SpectralClassifier(nn.Module):
    """One linear layer `rings` -> 1 whose weight has spectral norm 1: the spectrum `[B, rings]` -> logit `[B, 1]`.

    In training mode each pass moves the norm's singular vectors, which are part of the state. `rings + 1` parameters.
    """

    def __init__(self, rings: int) -> None:
        super().__init__()
        self.arguments = {"rings": rings}
        check_positive("SpectralClassifier", self.arguments)
        self.rings = rings
        self.linear = spectral_norm(nn.Linear(rings, 1))
        init_gan(self)

    def forward(self, profile: Tensor) -> Tensor:
        """The logits, in the weights' precision: autocast is switched off for a few dozen products."""
        with torch.autocast(profile.device.type, enabled=False):
            logits: Tensor = self.linear(profile.to(next(self.parameters()).dtype))
            return logits
