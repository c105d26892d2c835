"""The feature maps of teacher and student as the discriminator sees them: shifted, projected, of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.methods.distillation_settings import ShiftSettings
from hpcdistill.models.discriminator import Projection
from hpcdistill.models.image_generator import ImageGenerator
from hpcdistill.ops.channel_shift import channel_shift, check_shift
from hpcdistill.ops.repeatable import resize


class ComparedMaps(nn.Module):
    """f_i and h of equations 12 and 13 for the maps of one generator, one projection a layer."""

    def __init__(self, widths: Mapping[str, int], channels_out: int, shift: ShiftSettings, side: int) -> None:
        """`widths`: layer -> channels of its map; `channels_out`: the discriminator's input channels; `side`: of what
        it is shown, pixels (`check_maps`)."""
        super().__init__()
        self.shift, self.side = shift, side
        self.projections = nn.ModuleDict({layer: Projection(width, channels_out) for layer, width in widths.items()})

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B, C_i, h_i, w_i] by layer -> [B, channels_out, side, side] each, smaller ones enlarged."""
        projected = {}
        for layer, projection in self.projections.items():
            x = maps[layer]
            if self.shift.place == "before":
                projected[layer] = projection(self._shifted(x))
            else:
                projected[layer] = self._shifted(projection(x))
        side = self.side
        return {
            layer: x if x.shape[2:] == (side, side) else resize(x, side, side, "bilinear")
            for layer, x in projected.items()
        }

    def _shifted(self, x: Tensor) -> Tensor:
        shift = self.shift
        return x if shift.mode == "none" else channel_shift(x, shift.mode, shift.rate, shift.step)


def check_maps(
    generators: Mapping[str, ImageGenerator], layers: Sequence[str], crop: int, channels_out: int, shift: ShiftSettings
) -> int:
    """The side of the maps that enter the discriminator; UserError when a layer or the shift does not fit.

    A quarter of the crop (64 of 256 pixels), or the side of the largest map where that is larger: none is shrunk.
    `generators`: role -> network. They are run on shapes alone.
    """
    sides: dict[str, dict[str, tuple[int, int]]] = {}
    for role, generator in generators.items():
        try:
            generator.check_maps(layers)
        except UserError as error:
            raise UserError(f"method.layers: of the {role}: {error}") from None
        with torch.device("meta"):
            _, maps = type(generator)(**generator.arguments)(torch.empty(1, 3, crop, crop), maps=tuple(layers))
        sides[role] = {layer: (x.shape[2], x.shape[3]) for layer, x in maps.items()}
        for layer, x in maps.items():
            if shift.mode == "none":
                continue
            channels = x.shape[1] if shift.place == "before" else channels_out
            try:
                check_shift(channels, x.shape[2], x.shape[3], shift.mode, shift.rate, shift.step)
            except UserError as error:
                raise UserError(f"method.shift: of the {role}'s map {layer}: {error}") from None
    first, *others = sides.values()
    for other in others:
        for layer in layers:
            if first[layer] != other[layer]:
                raise UserError(
                    f"method.layers: the map {layer} is {first[layer]} pixels in one generator and {other[layer]} in "
                    "the other; choose layers of one size"
                )
    return max(crop // 4, *(height for height, _ in first.values()))
