"""The radial log-spectrum phi(.) of FESD, section 2.2 (SSD-GAN, Chen et al., AAAI 2021), differentiable.

gray -> 2-D FFT -> log(|F| + eps) -> mean over rings of integer radius -> min-max to [0, 1] for each sample. The ring
of the zero frequency and the last two rings are left out.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

EPS = 1e-8  # SSD-GAN's
_GRAY = (0.299, 0.587, 0.114)
# A profile flatter than this is not stretched to [0, 1]: rounding would fill it, with gradients without bound.
_SMALLEST_RANGE = 1e-4
_DROPPED = 3  # rings: the first and the last two


def radial_spectrum(images: Tensor) -> Tensor:
    """`[B, C, H, W]` of any range to `[B, ring_count(H, W)]` in [0, 1], low frequencies first; float32, on the device.

    C is 1, 3 (RGB), or 6, of which the last three are the image (Pix2Pix's pairs). float64 stays float64, autocast
    changes nothing. A black image gives zeros, a constant one what rounding leaves of it, never NaN. ValueError for
    other C and for images below 6 pixels.

    The radius of frequency (u, v), in cycles per image, is sqrt((u/H)^2 + (v/W)^2) * min(H, W), rounded down: for a
    square its distance from the zero frequency, else circles of the same frequency in both directions.
    """
    height, width = images.shape[-2:]
    ring_count(height, width)
    with torch.autocast(images.device.type, enabled=False):
        log = _log_magnitudes(images)
        log = log - log.detach().amax(1, keepdim=True)  # min-max removes it again; a flat spectrum is exactly 0
        profile = _ring_means(log, height, width)
        low, high = profile.amin(1, keepdim=True), profile.amax(1, keepdim=True)
        return (profile - low) / (high - low).clamp_min(_SMALLEST_RANGE)


def radial_decibels(images: Tensor) -> Tensor:
    """The same rings before they are stretched to [0, 1], so that images compare: `[B, ring_count(H, W)]` in dB.

    20 log10 |F| of an FFT that keeps energy (divided by sqrt(H W)), its mean over each ring: white noise of a standard
    deviation of 1 is -2.5 dB everywhere, whatever the size. Takes what `radial_spectrum` takes.
    """
    height, width = images.shape[-2:]
    ring_count(height, width)
    with torch.autocast(images.device.type, enabled=False):
        nepers = _ring_means(_log_magnitudes(images), height, width) - 0.5 * math.log(height * width)
        return nepers * (20 / math.log(10))


def _log_magnitudes(images: Tensor) -> Tensor:
    """log |F| over half of the plane of frequencies, `[B, H (W // 2 + 1)]`."""
    gray = _gray(images.to(torch.promote_types(images.dtype, torch.float32)))
    spectrum = torch.fft.rfft2(gray)
    # log(|F| + eps) but for values near eps: smooth, so that the gradient at F = 0 is 0 and not anything.
    power = spectrum.real.square() + spectrum.imag.square()
    return 0.5 * torch.log(power.flatten(1) + EPS**2)


def _ring_means(values: Tensor, height: int, width: int) -> Tensor:
    """The mean over each ring of `values` `[B, H (W // 2 + 1)]`."""
    places, weights = _ring_table(height, width, values.device, values.dtype)
    members = values.index_select(1, places.flatten()).view(len(values), *places.shape)
    averaged: Tensor = (members * weights).sum(-1)
    return averaged


def radial_power(images: Tensor) -> Tensor:
    """`[B, C, H, W]` to the mean power in each ring of radius 1 ... min(H, W) / 2 - 1, `[B, that many]`, float64.

    |F|^2 / (H W) of the gray image, averaged over the angle: white noise of variance v has v in every ring. C, rings
    and errors as `radial_spectrum`'s; what lies beyond the Nyquist frequency of rows and columns is left out.
    """
    height, width = images.shape[2:]
    ring_count(height, width)
    gray = _gray(images.to(torch.float64))
    spectrum = torch.fft.rfft2(gray - gray.mean((1, 2), keepdim=True))
    power = (spectrum.real.square() + spectrum.imag.square()).flatten(1) / (height * width)
    return _ring_means(power, height, width)[:, : min(height, width) // 2 - 1]


def ring_count(height: int, width: int) -> int:
    """The number of values in a profile: 43 for 64x64, 179 for 256x256. ValueError when there is none."""
    rows, columns = height // 2 * width, width // 2 * height
    rings = math.isqrt((rows**2 + columns**2) // max(height, width) ** 2) + 1
    if rings <= _DROPPED:
        raise ValueError(f"a {height}x{width} image has no radial spectrum; give at least 6x6 pixels")
    return rings - _DROPPED


def _gray(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W]."""
    channels = images.shape[1]
    if channels == 1:
        return images[:, 0]
    if channels not in (3, 6):
        raise ValueError(f"radial_spectrum takes 1, 3 or 6 channels, not {channels}")
    red, green, blue = images[:, -3:].unbind(1)
    return red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]


@lru_cache(maxsize=16)
def _ring_table(height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each ring, the places of its members in the flattened half spectrum and their weights: two [rings, longest].

    Short rings are filled up with weight 0. A gather and a sum, because an index_add on a GPU adds in any order: a
    run would not repeat itself.
    """
    rows = np.minimum(np.arange(height), height - np.arange(height))
    columns = np.arange(width // 2 + 1)
    square = (rows[:, None] * width) ** 2 + (columns * height) ** 2
    radius = np.sqrt(square // max(height, width) ** 2).astype(np.int64).ravel()
    # A real image's spectrum is symmetric: a column of the half stands for two, but for the first and the middle one.
    copies = np.where((columns == 0) | (2 * columns == width), 1.0, 2.0)
    copies = np.broadcast_to(copies, (height, len(columns))).ravel()
    rings = ring_count(height, width)
    members = [np.flatnonzero(radius == ring) for ring in range(1, rings + 1)]
    places = np.zeros((rings, max(map(len, members))), np.int64)
    weights = np.zeros(places.shape)
    for ring, mine in enumerate(members):
        assert len(mine)
        places[ring, : len(mine)] = mine
        weights[ring, : len(mine)] = copies[mine] / copies[mine].sum()
    with torch.inference_mode(False):  # else a table made in an evaluation could not be used in training
        return torch.from_numpy(places).to(device), torch.from_numpy(weights).to(device, dtype)
