"""The demo's rows, and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hpcdistill.metrics.sr_evaluation import ImageRow

Image = NDArray[np.uint8]  # [H, W, 3] RGB

TITLES = {
    "bicubic": "Bicubic",
    "fsrcnn": "FSRCNN, plain",
    "dssd": "DSSD student",
    "dssd-trained": "DSSD, trained longer",
}
# Colour of each method's curves all over the page; see the style sheet.
SERIES = {"bicubic": 0, "fsrcnn": 1, "dssd": 2, "teacher": 3, "dssd-trained": 4}
COLUMNS = ("PSNR [dB]", "to bicubic", "SSIM", "Parameters", "MACs", "Steps", "Training")


@dataclass(frozen=True)
class Measured:
    """One row of the demo and all that its page shows of it."""

    name: str  # a key of TITLES
    psnr: float  # dB, mean over the photographs
    ssim: float
    params: int
    macs: int  # by the literature's rule, for a 1280x720 output
    true_macs: int
    steps: int
    seconds: float | None  # of training; None: not known here
    per_image: tuple[ImageRow, ...]
    pictures: tuple[Image, ...]  # one an image, with bicubic's colours

    def to_json(self) -> dict[str, Any]:
        names = ("name", "psnr", "ssim", "params", "macs", "steps", "true_macs", "seconds", "per_image")
        return {name: getattr(self, name) for name in names} | {"images": len(self.per_image)}


def verdict(rows: Sequence[Measured]) -> list[str]:
    """What the numbers say, and what they do not: one sentence each."""
    by_name = {row.name: row for row in rows}
    bicubic, plain, distilled = by_name["bicubic"], by_name["fsrcnn"], by_name["dssd"]
    lines = [
        f"After {plain.steps:,} steps, plain FSRCNN is {compared(plain, bicubic)} and the DSSD student "
        f"{compared(distilled, bicubic)}, on {len(bicubic.per_image)} photographs.",
    ]
    if trained := by_name.get("dssd-trained"):
        lines.append(
            f"The same student network trained for {trained.steps:,} steps on other images is "
            f"{compared(trained, bicubic)}."
        )
    lines.append(
        "The differences between the rows trained here say nothing about which method is better: they come from "
        f"{len(bicubic.per_image)} photographs, one seed and a very short training."
    )
    return lines


def compared(row: Measured, bicubic: Measured) -> str:
    """`0.42 dB above bicubic`; below 0.05 dB it counts as level."""
    gain = row.psnr - bicubic.psnr
    if abs(gain) < 0.05:
        return f"level with bicubic ({gain:+.2f} dB)"
    return f"{abs(gain):.2f} dB {'above' if gain > 0 else 'below'} bicubic"


def cells(row: Measured, bicubic: Measured) -> tuple[str, ...]:
    """One row under COLUMNS, as the tables show it."""
    network = (
        (f"{row.params:,}", f"{row.macs / 1e9:.2f} G", f"{row.steps:,}", clock(row.seconds))
        if row.name != "bicubic"
        else ("-",) * 4
    )
    gain = "-" if row.name == "bicubic" else f"{row.psnr - bicubic.psnr:+.2f}"
    return (f"{row.psnr:.2f}", gain, f"{row.ssim:.4f}", *network)


def clock(seconds: float | None) -> str:
    """`1 min 05 s`, `42 s`, or a dash when it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
