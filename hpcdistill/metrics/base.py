"""The metrics of an image and its reference: what each is called, which way it is better, and what computes it.

A super-resolution metric is one entry of `SR_METRICS`: evaluators, tables and configurations loop over them, and the
first one chooses the best weights. Of images that are translated there are `PAIR_METRICS`, where sets are paired, and
the distances between sets of features, which belong to the network of features (`feature_networks.py`).
Nothing here imports torch: configurations and tables of finished runs ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hpcdistill.registry import imported

if TYPE_CHECKING:
    from torch import Tensor

ImageRow = dict[str, Any]  # one image's "name", and the value of each metric
# An output equal to its reference has an infinite PSNR, which JSON cannot hold and a mean does not survive.
PSNR_CAP = 100.0  # dB


@dataclass(frozen=True)
class ImageMetric:
    """One number for an image; a test set has the mean over its images."""

    name: str  # in results: "student/set5/psnr"
    label: str  # in tables
    digits: int  # in tables, behind the point
    better: Literal["higher", "lower"]
    path: str  # package.module:function; empty for a network, which is opened with its weights
    about: str = ""  # how it is computed, for result.json

    @property
    def compute(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(produced, reference) to a 0-dim tensor, or for a batch [B] to [B]; see the function for sizes and ranges."""
        function: Callable[[Tensor, Tensor], Tensor] = imported(self.path, "metric")
        return function


SR_METRICS = [
    ImageMetric("psnr", "PSNR [dB]", 3, "higher", "hpcdistill.metrics.psnr_ssim:psnr"),
    ImageMetric("ssim", "SSIM", 4, "higher", "hpcdistill.metrics.psnr_ssim:ssim"),
]
PSNR_OF_PAIRS = ImageMetric(
    "psnr",
    "PSNR [dB]",
    4,
    "higher",
    "hpcdistill.metrics.pair_errors:psnr_rgb",
    "RGB, 8 bits, mean over pairs (dB)",
)
L1_OF_PAIRS = ImageMetric(
    "l1",
    "L1 [levels]",
    2,
    "lower",
    "hpcdistill.metrics.pair_errors:l1_rgb",
    "RGB, 8 bits, mean over pairs (levels of 255)",
)
LPIPS_OF_PAIRS = ImageMetric("lpips", "LPIPS", 4, "lower", "", "AlexNet, version 0.1, mean over pairs")
PAIR_METRICS = [PSNR_OF_PAIRS, L1_OF_PAIRS, LPIPS_OF_PAIRS]


@dataclass(frozen=True)
class SpectrumMetric:
    """One number for two sets of images, of their mean radial spectra."""

    name: str
    label: str
    digits: int
    better: Literal["higher", "lower"]
    path: str
    about: str

    @property
    def compute(self) -> Callable[[Tensor, Tensor, int], float]:
        """(outputs' spectrum [rings], real spectrum [rings], side of the images) to a number."""
        function: Callable[[Tensor, Tensor, int], float] = imported(self.path, "metric")
        return function


SPECTRAL_ERROR = SpectrumMetric(
    "spectral_error",
    "spectral error [decades]",
    3,
    "lower",
    "hpcdistill.metrics.spectral_error:spectral_error",
    "8-bit gray, mean |log10| of the ratio of the sets' azimuthally averaged power, half of Nyquist to Nyquist; "
    "real side: the test set's target images",
)


@dataclass(frozen=True)
class SetResult:
    """One generator on one test set."""

    metrics: dict[str, float]  # means over the images and distances between sets: what could be computed
    images: int
    per_image: list[ImageRow] = field(default_factory=list)
    bicubic: dict[str, float] | None = None  # super-resolution: bicubic enlargement of the same images
    # Translation: "output" and "real", mean power in the rings 1, 2, ... of `ops.radial_spectrum.radial_power`.
    spectra: dict[str, list[float]] = field(default_factory=dict)


def means(rows: Sequence[ImageRow], names: Iterable[str]) -> dict[str, float]:
    """The mean of each metric over the images."""
    assert rows
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
