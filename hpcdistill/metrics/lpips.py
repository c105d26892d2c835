"""LPIPS (Zhang et al. 2018), version 0.1, AlexNet: the distance of two images that agrees with people's judgement.

The trunk is AlexNet as torchvision published it, the five linear layers come with the package `lpips`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from hpcdistill.data.fetch.weights import find_weights
from hpcdistill.errors import UserError
from hpcdistill.metrics.feature_networks import fitting, read_state
from hpcdistill.ops.precision import full_float32

# Of an RGB image in [-1, 1]; ImageNet's mean and deviation, rounded as LPIPS does it.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_TAPS = (1, 4, 7, 9, 11)  # the five ReLUs in torchvision's numbering
_SMALLEST = 31  # pixels a side, below which the second pooling has nothing left


class LPIPS(nn.Module):
    """`lpips(one, other)`: two batches [B, 3, H, W] in [-1, 1] to [B] distances, 0 for equal images. H, W >= 31."""

    def __init__(self, trunk: Path, linear: Path | None = None) -> None:
        """`trunk`: torchvision's AlexNet; `linear`: LPIPS's own layers (default: the package's). UserError if wrong."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        state = {name: value for name, value in read_state(trunk).items() if name.startswith("features.")}
        with fitting(trunk):
            self.load_state_dict(state)
        linear = linear or _linear_layers()
        weights = read_state(linear)
        for number in range(len(_TAPS)):
            name = f"lin{number}.model.1.weight"  # [1, C, 1, 1]
            if name not in weights:
                raise UserError(f"{linear}: has no {name}; use LPIPS's own alex.pth, version 0.1")
            self.register_buffer(f"linear{number}", weights[name], persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """UserError for images that are too small for the network."""
        self.check_size(*one.shape[-2:])
        distance = one.new_zeros(one.shape[0], dtype=torch.float32)
        with full_float32(one.device.type):
            maps = zip(self._maps(one.float()), self._maps(other.float()), strict=True)
            for number, (first, second) in enumerate(maps):
                difference = (_unit(first) - _unit(second)).square()
                weighted = difference * self.get_buffer(f"linear{number}")
                distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance

    def check_size(self, height: int, width: int) -> None:
        """UserError for images that are too small for the network."""
        if min(height, width) < _SMALLEST:
            raise UserError(
                f"LPIPS needs images of {_SMALLEST} pixels a side or more, these have {min(height, width)}; "
                "take larger ones or leave LPIPS out (eval.lpips=false; of `evaluate`: --no-lpips)"
            )

    def _maps(self, images: Tensor) -> list[Tensor]:
        x = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        maps = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in _TAPS:
                maps.append(x)
        return maps


def open_lpips(device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS with the published weights; UserError, with what to do, when they are not on this machine."""
    return LPIPS(find_weights("alexnet")).to(device)


def _linear_layers() -> Path:
    """The file in the installed package `lpips`, which is not imported: it would load torchvision's networks."""
    package = importlib.util.find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise UserError("LPIPS needs the package lpips for its linear layers; `pip install lpips`")
    return Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "alex.pth"


def _unit(maps: Tensor) -> Tensor:
    """Each position's vector of channels, of length 1."""
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
