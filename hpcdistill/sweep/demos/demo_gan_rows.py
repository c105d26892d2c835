"""The GAN demo's rows, and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcdistill.metrics.sr_evaluation import evaluating
from hpcdistill.metrics.translation_evaluation import eight_bits, translate
from hpcdistill.sweep.demos.demo_gan_pairs import Image

if TYPE_CHECKING:
    from hpcdistill.metrics.cost import Cost
    from hpcdistill.metrics.translation_evaluation import PairRow

TITLES = {
    "flat": "One flat colour",
    "teacher": "Teacher",
    "student": "Student",
    "original": "Pix2Pix's generator",
    "printed": "The paper's student",
}
# Colour of each row's curves all over the page; see the style sheet.
SERIES = {"flat": 0, "teacher": 3, "student": 2}
LEVEL = 0.05  # dB; below it two results count as level


@dataclass(frozen=True)
class Measured:
    """What was measured on the test tiles, a row of the demo."""

    name: str  # a key of TITLES
    psnr: float  # dB, mean over the tiles
    cost: Cost  # at 256x256; nothing of a flat colour
    per_tile: tuple[PairRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The row for results.json."""
        return {
            "name": self.name,
            "psnr": self.psnr,
            "params": self.cost.params,
            "macs": self.cost.macs,
            "true_macs": self.cost.true_macs,
            "tiles": len(self.per_tile),
            "per_tile": list(self.per_tile),
        }


class FlatColour(nn.Module):
    """The generator that learns nothing: one colour, RGB in [-1, 1], whatever it is given."""

    colour: Tensor

    def __init__(self, colour: Tensor) -> None:
        super().__init__()
        self.register_buffer("colour", colour.reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` of that colour."""
        return self.colour.expand_as(image)


def mean_colour(photographs: Sequence[Image]) -> Tensor:
    """The mean over the pixels of all photographs, RGB in [-1, 1]."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in photographs])
    return torch.from_numpy(pixels.mean(axis=0, dtype=np.float64) / 127.5 - 1).float()


def translated(generator: nn.Module, edges: Image) -> Image:
    """The 8-bit photograph that a generator makes of an edge drawing of any size that it takes."""
    with evaluating(generator) as network:
        output = eight_bits(translate(network, torch.from_numpy(edges.transpose(2, 0, 1).copy())[None]))
    picture: Image = output[0].permute(1, 2, 0).contiguous().numpy()
    return picture


def compared(row: Measured, flat: Measured) -> str:
    """`0.42 dB above one flat colour`."""
    gain = row.psnr - flat.psnr
    if abs(gain) < LEVEL:
        return f"level with one flat colour ({gain:+.2f} dB)"
    return f"{abs(gain):.2f} dB {'above' if gain > 0 else 'below'} one flat colour"


def verdict(rows: Sequence[Measured], steps: int, photographs: tuple[int, int]) -> list[str]:
    """What the numbers say, and what they do not; `photographs`: trained on, measured on."""
    by_name = {row.name: row for row in rows}
    flat, teacher, student = (by_name[name] for name in ("flat", "teacher", "student"))
    return [
        f"After {steps:,} steps the teacher is {compared(teacher, flat)} and the student {compared(student, flat)}, "
        f"on {len(flat.per_tile)} tiles of {photographs[1]} photographs; the flat colour is the mean of those "
        "trained on.",
        f"So short a training on {photographs[0]} photographs proves nothing: neither that the method works nor that "
        "it does not. It shows the way from pictures to a student, no more.",
    ]


def ratio(larger: int, smaller: int) -> str:
    """`16`, `4.1`: two significant digits."""
    return f"{float(f'{larger / smaller:.2g}'):,.10g}"
