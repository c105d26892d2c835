"""MATLAB's imresize in dense float64 matrices, written straight from its documentation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def matlab_matrix(length: int, out: int, scale: float, repeats: bool = False) -> np.ndarray:
    """imresize's `contributions`, 1-based as MATLAB writes it, as a dense [out, length] matrix.

    Mirrored at the border or, as releases before did, with the end pixel repeated.
    """
    shrink = min(scale, 1.0)
    width = 4 / shrink
    matrix = np.zeros((out, length))
    mirror = [*range(1, length + 1), *range(length, 0, -1)]
    for x in range(1, out + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - width / 2)
        places = [left + k for k in range(math.ceil(width) + 2)]
        weights = [shrink * cubic(shrink * (u - place)) for place in places]
        for place, weight in zip(places, weights, strict=True):
            inside = min(max(1, place), length) if repeats else mirror[(place - 1) % (2 * length)]
            matrix[x - 1, inside - 1] += weight / sum(weights)
    return matrix


def matlab_resize(image: np.ndarray, scale: Fraction) -> np.ndarray:
    """[H, W] -> [ceil(H scale), ceil(W scale)], rows first, nothing rounded."""
    rows, columns = (math.ceil(length * scale) for length in image.shape)
    vertical = matlab_matrix(image.shape[0], rows, float(scale))
    horizontal = matlab_matrix(image.shape[1], columns, float(scale))
    return (vertical @ image) @ horizontal.T


def eight_bits(exact: np.ndarray) -> np.ndarray:
    """Rounded half up, clipped to 0..255; an exact half that float64 missed by a little is one as well."""
    return np.floor(exact.clip(0, 255) + 0.5 + 1e-9)


def matlab_shrunk(image: np.ndarray, scale: int, rule: str) -> np.ndarray:
    """[H, W] in 0..255 -> [H/scale, W/scale] of 8 bits by one of the rules of `downsample_uint8`."""
    vertical, horizontal = (
        matlab_matrix(length, length // scale, 1 / scale, repeats=rule == "older") for length in image.shape
    )
    rows = vertical @ image.astype(np.float64)
    return eight_bits((rows if rule == "exact" else eight_bits(rows)) @ horizontal.T)
