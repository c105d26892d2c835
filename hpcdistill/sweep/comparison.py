"""What pages show of super-resolution by several methods: a table, where they are wrong, what frequencies they keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpcdistill.metrics.sr_test_sets import Image
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.ops.radial_spectrum import radial_decibels, ring_count
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos.base import Box, Measured, cut, gain_over
from hpcdistill.sweep.report import Row, Table

COLOURS = 7  # series of the page; the first is bicubic's
ORIGINAL = COLOURS - 1  # the series of HR in a chart
BANDS = 40  # points of a spectrum's curve
Captioned = tuple[str, Image, str, int | None]  # label, pixels, note and colour


def results_table(
    rows: Sequence[Measured], caption: str, note: str, further: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """A row for each method, the first of them bicubic's, with `further` columns at the end."""
    last = list((further or {}).values())
    return Table(
        caption,
        ("Method", "PSNR [dB]", "to bicubic", "SSIM", "Parameters", "MACs", *(further or {})),
        tuple(
            Row(
                (row.title, f"{row.psnr:.2f}", gain_over(row, rows[0]), f"{row.metrics['ssim']:.4f}", *_cost(row),
                 *(column[number] for column in last)),
                colour(row.series),
            )
            for number, row in enumerate(rows)
        ),
        note,
    )  # fmt: skip


def colour(number: int) -> int | None:
    """The page's colour of the method `number`, bicubic being 0; there are not more."""
    return number if number < COLOURS else None


def error_crops(hr: Image, pictures: Mapping[str, Image], box: Box) -> tuple[str, list[Captioned]]:
    """|SR - HR| on luma inside `box` by each method, black where there is none, and what is said of them together.

    They are magnified alike, by the gain at which nearly all of the largest errors stay below white.
    """
    original = luma_levels(cut(hr, box))
    errors = {label: np.abs(luma_levels(cut(made, box)) - original) for label, made in pictures.items()}
    factor = gain(list(errors.values()), 255)
    crops: list[Captioned] = [
        (f"{label}, error", grey(factor * error), f"{error.mean():.2f} levels on average", colour(number))
        for number, (label, error) in enumerate(errors.items())
    ]
    return f"how far each is from HR: |SR - HR| on luma, times {factor:g}", crops


def spectra(hr: Image, pictures: Mapping[str, Image], scale: int, name: str) -> Chart:
    """The radial spectrum of HR and of each method's picture, on luma, over the whole image.

    Of more than five methods the first are drawn, as HR needs a colour too.
    """
    shown = dict(list(pictures.items())[:ORIGINAL])
    lines = (
        *(Line(label, number, _bands(made)) for number, (label, made) in enumerate(shown.items())),
        Line("HR", ORIGINAL, _bands(hr)),
    )
    left = f" Drawn are the first {len(shown)} of {len(pictures)}." if len(shown) < len(pictures) else ""
    return Chart(
        title=f"Spectrum of {name}",
        x_label="frequency [% of half the sampling rate]",
        y_label="magnitude [dB]",
        lines=lines,
        digits=1,
        note="20 log10 of the magnitude on luma (levels of 255), its mean over each ring of frequencies; 100 % is a "
        f"pixel light, a pixel dark; beyond it only diagonals are left. What LR holds ends at {100 / scale:.0f} %: a "
        f"method that is far below HR to its right blurs, one far above adds what was not there.{left}",
    )


def grey(levels: NDArray[Any]) -> Image:
    """`[h, w]` in 0 .. 255 as a grey picture, clamped and rounded."""
    return np.repeat(np.clip(np.rint(levels), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def gain(differences: Sequence[NDArray[Any]], room: float) -> float:
    """What differences (8-bit levels) are magnified by, two digits: nearly all stay below `room`."""
    most = max((float(np.percentile(np.abs(change), 99.5)) for change in differences), default=0.0)
    if most == 0:
        return 1.0
    factor = room / most
    unit = 10.0 ** (np.floor(np.log10(factor)) - 1)
    return float(f"{np.floor(factor / unit) * unit:.2g}")


def luma_levels(image: Image) -> NDArray[np.float64]:
    """Luma `[h, w]` in 0 .. 255, not rounded."""
    return luma_uint8(image).astype(np.float64) * 255


def _bands(image: Image) -> tuple[tuple[float, float], ...]:
    """(frequency in % of half the sampling rate, dB) of an image; neighbouring rings are taken together."""
    height, width = image.shape[:2]
    decibels = radial_decibels(torch.from_numpy(luma_levels(image))[None, None])[0].numpy()
    rings = ring_count(height, width)
    groups = np.array_split(np.arange(rings), min(BANDS, rings))
    # Ring n, counted from 1, has the frequencies from n to n + 1 cycles along the shorter side.
    percent = 200 / min(height, width)
    return tuple(
        (round(float(group.mean() + 1.5) * percent, 1), round(float(decibels[group].mean()), 2)) for group in groups
    )


def _cost(row: Measured) -> tuple[str, str]:
    return (f"{row.cost.params:,}", f"{row.cost.macs / 1e9:.2f} G") if row.cost.params else ("-", "-")
