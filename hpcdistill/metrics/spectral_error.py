"""How far the fine detail of a set of images is from a real set's: their mean radial spectra, compared.

The azimuthally averaged power spectrum is what Durall et al., "Watch your up-convolution" (CVPR 2020), and Dzanic et
al., "Fourier spectrum discrepancies in deep network generated images" (NeurIPS 2020), compare generated and real images
by. They draw curves and train classifiers on them, and name no number; this one is the mean distance of the two
curves, on the logarithmic axis of those figures, in the upper half of the band.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdistill.errors import UserError
from hpcdistill.ops.radial_spectrum import radial_power

SMALLEST = 8  # pixels a side
# Levels squared: a fortieth of what rounding to 8 bits leaves in a gray image. Only flat sets have less.
_FLOOR = 1e-3


def spectrum_of(images: Tensor) -> Tensor:
    """uint8 `[B, 3, H, W]` to the power in each ring, `[B, rings]` in levels squared, float64."""
    return radial_power(images)


def spectral_error(spectrum: Tensor, real: Tensor, side: int) -> float:
    """Mean of |log10(spectrum / real)| over the rings from side / 4 to side / 2 - 1; 0.3 is a factor of two.

    Both `[rings]`, means over sets of `side` x `side` images. Half of the Nyquist frequency is side / 4 cycles.
    """
    logs = [torch.log10(x[side // 4 - 1 :].double().clamp_min(_FLOOR)) for x in (spectrum, real)]
    return (logs[0] - logs[1]).abs().mean().item()


def check_side(side: int) -> None:
    """UserError for images too small to have a band to compare."""
    if side < SMALLEST:
        raise UserError(
            f"spectral_error takes images of {SMALLEST}x{SMALLEST} pixels or more, not {side}x{side}; use a larger "
            "size, or eval.spectral_error=false"
        )
