"""Figure 5 of the DSSD paper: the LR image that each teacher's encoder makes of HR, beside bicubic's, and less it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcdistill.metrics.sr_test_sets import Image
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.ops.colour import luma
from hpcdistill.sweep.comparison import Captioned, colour, gain, grey, luma_levels
from hpcdistill.sweep.demos.base import Box, cut

MIDDLE = 128  # the grey of no difference
BEYOND = 16  # levels that an encoded image may leave black and white by and still be shown as it is
EXPLAINED = (
    "A teacher sees the HR image and makes an LR image of its own, which its F enlarges. Here it is, on luma, beside "
    "the bicubic LR image that students are given, and less that image (grey: no difference): what is light or dark "
    "there the encoder has kept of HR, or put there for F to use. Differences of one picture are magnified alike. An "
    "encoder's values need not stay between black (0) and white (255); where they do not, the picture says its range."
)


def encodings(hr: Image, teachers: Mapping[str, PrivilegedTeacher]) -> dict[str, NDArray[Any]]:
    """The luma `[h, w]`, nominally in [0, 1], of the LR image that each teacher's encoder makes of `hr`."""
    rgb = torch.from_numpy(np.ascontiguousarray(hr.transpose(2, 0, 1)))[None].float() / 255
    encoded = {}
    for label, teacher in teachers.items():
        given = (luma(rgb) if teacher.channels == 1 else rgb).to(next(teacher.parameters()).device)
        with torch.no_grad():
            encoded[label] = _luma(teacher.encode(given)[-1][0].cpu())
    return encoded


def encoder_pictures(lr: Image, encoded: Mapping[str, NDArray[Any]], bicubic: str) -> list[Captioned]:
    """The LR image that students are given, called `bicubic`, each encoder's, and their difference, all on luma."""
    given = luma_levels(lr)
    made = {label: levels * 255 for label, levels in encoded.items()}
    factor = gain([levels - given for levels in made.values()], MIDDLE - 1)
    pictures: list[Captioned] = [(bicubic, grey(given), "what students are given", 0)]
    for number, (label, levels) in enumerate(made.items(), 1):
        change, (low, high) = levels - given, window(levels)
        said = "" if (low, high) == (0, 255) else f"black is {low:.0f}, white {high:.0f}"
        pictures.append((label, grey((levels - low) * 255 / (high - low)), said, colour(number)))
        said = f"times {factor:g}; root mean square {np.sqrt(np.mean(change**2)):.1f} levels"
        pictures.append((f"{label}, less {bicubic.lower()}", grey(MIDDLE + factor * change), said, colour(number)))
    return pictures


def original_crop(hr: Image, box: Box) -> Captioned:
    """HR's luma inside `box`."""
    return "HR", cut(grey(luma_levels(hr)), box), f"{box[3]} x {box[2]} pixels", None


def window(levels: NDArray[Any]) -> tuple[float, float]:
    """What is shown as black and as white: 0 and 255, or nearly all of the values where they go beyond."""
    low, high = (float(bound) for bound in np.percentile(levels, (0.5, 99.5)))
    if low >= -BEYOND and high <= 255 + BEYOND:
        return 0.0, 255.0
    return float(np.floor(low)), float(np.floor(low) + max(1, np.ceil(high - np.floor(low))))


def _luma(planes: Tensor) -> NDArray[Any]:
    """Luma `[h, w]` of `[c, h, w]`; one channel is luma already."""
    found = planes if planes.shape[0] == 1 else luma(planes[None])[0]
    return np.asarray(found[0].double())
