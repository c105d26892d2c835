"""What every super-resolution network F has in common: an image in, an enlarged one out, and named maps between."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models import NETWORKS
from hpcdistill.models.upsampling import TransposedUpsampling, Upsampling


class SRNetwork(nn.Module):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    A subclass has one submodule for each name in `MAPS`, run one after the other; `_prepared` gives what the first
    one reads and `_reconstructed` makes the image of what the last one gives. `arguments` rebuild the network.
    """

    # Maps that `forward` and `features` can give, in the order they are computed, each after its activation.
    MAPS: ClassVar[tuple[str, ...]]
    # The distilled layer: the map that the image is made of. DSSD names it for FSRCNN ("expanding", the last map
    # before the transposed convolution); the same place is taken in the other networks, for which it names none.
    DISTILLED: ClassVar[str]
    takes: Literal["lr"] = "lr"
    map_channels: dict[str, int]

    def __init__(self, scale: int, channels: int = 1, **others: Any) -> None:
        super().__init__()
        self.scale = scale
        self.channels = channels
        self.arguments: dict[str, Any] = {"scale": scale, "channels": channels, **others}
        name = type(self).__name__
        for key, value in self.arguments.items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name}: {key} is {value}; give 1 or more")
        upsampling = others.get("upsampling", "transposed")
        if upsampling not in get_args(Upsampling):
            raise UserError(f"{name}: upsampling is '{upsampling}'; {nearest(upsampling, get_args(Upsampling))}")

    def forward(self, image: Tensor, maps: Sequence[str] = ()) -> Any:
        """The enlarged image; with `maps`, a pair of it and `{name: feature map [B, C, H, W]}`."""
        wanted = {self._checked(name) for name in maps}
        taken: dict[str, Tensor] = {}
        prepared = self._prepared(image)
        features = prepared
        for name in self.MAPS:
            features = getattr(self, name)(features)
            if name in wanted:
                taken[name] = features
        enlarged = self._reconstructed(features, prepared)
        return (enlarged, taken) if maps else enlarged

    def features(self, image: Tensor, name: str) -> Tensor:
        """The map `name` alone; nothing behind it is computed."""
        last = self.MAPS.index(self._checked(name))
        features = self._prepared(image)
        for stage in self.MAPS[: last + 1]:
            features = getattr(self, stage)(features)
        return features

    def deploy(self) -> Self:
        """A copy for inference, in eval mode: the same function, a transposed convolution in its sub-pixel form."""
        deployed = copy.deepcopy(self)
        upsampling = getattr(self, "upsampling", None)
        if isinstance(upsampling, TransposedUpsampling):
            deployed.upsampling = upsampling.to_subpixel()
            deployed.arguments["upsampling"] = "subpixel"
        return deployed.eval()

    def _prepared(self, image: Tensor) -> Tensor:
        """What the first map is computed from."""
        return image

    def _reconstructed(self, features: Tensor, prepared: Tensor) -> Tensor:
        """The enlarged image from the last map and what `_prepared` gave."""
        raise NotImplementedError

    def _checked(self, name: str) -> str:
        if name not in self.MAPS:
            raise UserError(f"{type(self).__name__} has no feature map '{name}'; valid: {', '.join(self.MAPS)}")
        return name


def build_network(name: str, scale: int, channels: int = 1, upsampling: Upsampling = "transposed") -> SRNetwork:
    """A new F by its name (`method.network`), in its training form or, with `upsampling` "subpixel", for inference.

    UserError for an unknown name.
    """
    network: SRNetwork = NETWORKS[name](scale, channels)
    return network if upsampling == "transposed" else network.deploy().train()
