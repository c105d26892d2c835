"""References that the tests of several networks share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor


def _matrix(length: int, scale: int) -> np.ndarray:
    """[length * scale, length]: Keys' cubic (a = -0.5) at half-sample positions, the border mirrored."""
    matrix = np.zeros((length * scale, length))
    for out in range(length * scale):
        place = (out + 0.5) / scale - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - tap)
            weight = 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            inside = tap if 0 <= tap < length else -1 - tap if tap < 0 else 2 * length - 1 - tap
            matrix[out, inside] += weight
    return matrix


@pytest.fixture(scope="session")
def matlab_enlarged() -> Callable[[Tensor, int], Tensor]:
    """MATLAB's bicubic enlargement of [B, C, H, W] in float64, as products with dense matrices."""

    def enlarged(image: Tensor, scale: int) -> Tensor:
        rows, columns = (_matrix(side, scale) for side in image.shape[-2:])
        return torch.from_numpy(np.einsum("yh,bchw,xw->bcyx", rows, image.double().numpy(), columns))

    return enlarged
