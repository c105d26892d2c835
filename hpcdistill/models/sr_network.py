"""What every super-resolution network F has in common: an image in, an enlarged one out, and named maps between."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models import NETWORKS
from hpcdistill.models.collapsible import chosen_layers, collapse, expand
from hpcdistill.models.upsampling import TransposedUpsampling, Upsampling
from hpcdistill.ops.enlargement import BicubicEnlargement

Residual = Literal["none", "bicubic"]


class SRNetwork(nn.Module):
    """Super-resolution by `scale`: `[B, channels, H, W]` in [0, 1] -> `[B, channels, sH, sW]`, not clamped.

    A subclass has one submodule for each name in `MAPS`, run one after the other; `_prepared` gives what the first
    one reads and `_reconstructed` makes the image of what the last one gives. Its constructor takes `**form`, hands it
    to this one, and ends with `self._take_form()`. `arguments` rebuild the network.

    `residual`: "bicubic" adds MATLAB's bicubic enlargement of the image to what the layers make, so that they learn
    what it misses; "none" leaves it to them; None is the network's own (`RESIDUAL`). `collapse`: keyword arguments of
    `collapsible.expand`, and `layers`, names of convolutions (None: all but transposed and grouped ones), for a network
    that is trained wide.
    `first_weights`: "own", drawn as the network's paper does, or "pytorch", by PyTorch's defaults.
    """

    # Maps that `forward` and `features` can give, in the order they are computed, each after its activation.
    MAPS: ClassVar[tuple[str, ...]]
    # The distilled layer: the map that the image is made of. DSSD names it for FSRCNN ("expanding", the last map
    # before the transposed convolution); the same place is taken in the other networks, for which it names none.
    DISTILLED: ClassVar[str]
    RESIDUAL: ClassVar[Residual] = "none"  # as the network was published
    # By kind of device, what `train.channels_last: auto` takes; measured (docs/performance.md).
    FASTER_LAYOUT: ClassVar[dict[str, str]] = {"cpu": "channels_last"}
    takes: Literal["lr"] = "lr"
    map_channels: dict[str, int]

    def __init__(
        self,
        scale: int,
        channels: int,
        own: Mapping[str, Any],  # arguments of the subclass
        *,
        residual: Residual | None = None,
        collapse: Mapping[str, Any] | None = None,
        first_weights: Literal["own", "pytorch"] = "own",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.channels = channels
        self.global_skip: Residual = residual or self.RESIDUAL
        self._first_weights = first_weights
        self.arguments: dict[str, Any] = {"scale": scale, "channels": channels, **own}
        # Only what is not the network's own, so that files of networks without it stay what they were.
        if self.global_skip != self.RESIDUAL:
            self.arguments["residual"] = self.global_skip
        if collapse:
            self.arguments["collapse"] = dict(collapse)
        name = type(self).__name__
        for key, value in self.arguments.items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name}: {key} is {value}; give 1 or more")
        upsampling = own.get("upsampling", "transposed")
        if upsampling not in get_args(Upsampling):
            raise UserError(f"{name}: upsampling is '{upsampling}'; {nearest(upsampling, get_args(Upsampling))}")
        if self.global_skip not in get_args(Residual):
            raise UserError(f"{name}: residual is '{residual}'; {nearest(self.global_skip, get_args(Residual))}")
        self.enlargement = BicubicEnlargement(scale, channels) if self.global_skip == "bicubic" else None

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
        enlarged = self._reconstructed(features)
        if self.global_skip == "bicubic":
            enlarged = self._enlarged(prepared) + enlarged
        return (enlarged, taken) if maps else enlarged

    def features(self, image: Tensor, name: str) -> Tensor:
        """The map `name` alone; nothing behind it is computed."""
        last = self.MAPS.index(self._checked(name))
        features = self._prepared(image)
        for stage in self.MAPS[: last + 1]:
            features = getattr(self, stage)(features)
        return features

    def collapsed(self) -> Self:
        """A copy whose layers are plain ones: the same function with as many weights as the network has published."""
        plain = copy.deepcopy(self)
        collapse(plain)
        plain.arguments.pop("collapse", None)
        return plain

    def deploy(self) -> Self:
        """A copy for inference, in eval mode: the same function in plain layers, a transposed convolution in its
        sub-pixel form."""
        deployed = self.collapsed()
        upsampling = getattr(deployed, "upsampling", None)
        if isinstance(upsampling, TransposedUpsampling):
            deployed.upsampling = upsampling.to_subpixel()
            deployed.arguments["upsampling"] = "subpixel"
        return deployed.eval()

    def _take_form(self) -> None:
        """Draw the first weights anew, expand the layers that `collapse` names: the end of each constructor."""
        if self._first_weights == "pytorch":
            draw_as_pytorch(self)
        if form := self.arguments.get("collapse"):
            options = {key: value for key, value in form.items() if key != "layers"}
            for layer in chosen_layers(self, form.get("layers")).values():
                expand(layer, **options)

    def _prepared(self, image: Tensor) -> Tensor:
        """What the first map is computed from."""
        return image

    def _reconstructed(self, features: Tensor) -> Tensor:
        """The enlarged image, or what the bicubic one misses, from the last map."""
        raise NotImplementedError

    def _enlarged(self, prepared: Tensor) -> Tensor:
        """The bicubic enlargement, from what `_prepared` gave."""
        assert self.enlargement is not None
        enlarged: Tensor = self.enlargement(prepared)
        return enlarged

    def _checked(self, name: str) -> str:
        if name not in self.MAPS:
            raise UserError(f"{type(self).__name__} has no feature map '{name}'; valid: {', '.join(self.MAPS)}")
        return name


def draw_as_pytorch(module: nn.Module) -> None:
    """Draw the weights of all layers as PyTorch does where it is told nothing (uniform, by fan-in)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.PReLU):
            layer.reset_parameters()


def build_network(
    name: str, scale: int, channels: int = 1, upsampling: Upsampling = "transposed", **form: Any
) -> SRNetwork:
    """A new F by its name (`method.network`), in its training form or, with `upsampling` "subpixel", for inference.

    `form`: `residual`, `collapse` and `first_weights` of `SRNetwork`. UserError for an unknown name.
    """
    network: SRNetwork = NETWORKS[name](scale, channels, **form)
    return network if upsampling == "transposed" else network.deploy().train()
