"""Haar's transform against its matrices in float64, the distance of its details, and what that distance teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcdistill.losses import wavelet
from hpcdistill.ops.wavelet import haar

Array = NDArray[np.float64]


def filters(side: int) -> tuple[Array, Array]:
    """The low and the high filter of an axis as matrices [side / 2, side]: each row reads two neighbours."""
    low, high = np.zeros((side // 2, side)), np.zeros((side // 2, side))
    for row in range(side // 2):
        low[row, 2 * row : 2 * row + 2] = np.sqrt(0.5)
        high[row, 2 * row : 2 * row + 2] = np.sqrt(0.5), -np.sqrt(0.5)
    return low, high


def by_matrices(images: Array, levels: int) -> tuple[list[Array], Array]:
    """Of each level high down, high across and high both ways, and the deepest low band."""
    bands, low = [], images
    for _ in range(levels):
        (low_down, high_down), (low_across, high_across) = (filters(side) for side in low.shape[2:])
        details = (high_down @ low @ low_across.T, low_down @ low @ high_across.T, high_down @ low @ high_across.T)
        bands.append(np.stack(details, axis=2))
        low = low_down @ low @ low_across.T
    return bands, low


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def test_the_bands_of_every_level() -> None:
    images = noise(2, 3, 32, 48)
    bands, low = haar(images, 4)
    expected, deepest = by_matrices(images.numpy(), 4)
    assert [list(band.shape) for band in bands] == [[2, 3, 3, 32 >> j, 48 >> j] for j in (1, 2, 3, 4)]
    for band, wanted in zip(bands, expected, strict=True):
        np.testing.assert_allclose(band.numpy(), wanted, rtol=0, atol=1e-14)
    np.testing.assert_allclose(low.numpy(), deepest, rtol=0, atol=1e-14)


def test_four_pixels_by_hand() -> None:
    [bands], low = haar(torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]), 1)
    assert bands.flatten().tolist() == [-4.5, -2.5, 1.5]  # (a+b-c-d)/2, (a-b+c-d)/2, (a-b-c+d)/2
    assert low.item() == 7.5


@pytest.mark.parametrize(("size", "levels"), [((24, 32), 4), ((32, 24), 4), ((32, 32), 6), ((32, 32), 0)])
def test_sizes_that_do_not_fit(size: tuple[int, int], levels: int) -> None:
    with pytest.raises(ValueError, match=f"{levels} levels .* not {size[0]}x{size[1]}"):
        haar(torch.zeros(1, 1, *size), levels)


@pytest.mark.parametrize("power", [1, 2])
def test_the_distance(power: int) -> None:
    """The difference of the bands, not the bands of a difference."""
    student, teacher = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1)
    bands = [by_matrices(images.numpy(), 3)[0] for images in (student, teacher)]
    expected = sum(np.mean(np.abs(x - y) ** power) for x, y in zip(*bands, strict=True))
    assert wavelet(student, teacher, 3, power).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="tensors of one shape"):
        wavelet(student, teacher[:1], 3)


def test_a_constant_counts_nothing_and_a_checkerboard_once() -> None:
    image = noise(1, 3, 64, 64).float()
    assert wavelet(image + 0.3, image, 4).item() < 1e-6
    # In the finest diagonal band alone, one of three: 0.6 everywhere.
    signs = 1 - 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    assert wavelet(image + 0.3 * signs, image, 4).item() == pytest.approx(0.2, abs=1e-6)


def test_the_deepest_low_band_gets_no_gradient() -> None:
    student, teacher = noise(1, 3, 32, 32).requires_grad_(), noise(1, 3, 32, 32, seed=1)
    wavelet(student, teacher, 3).backward()
    assert student.grad is not None
    bands, low = by_matrices(student.grad.numpy(), 3)  # orthonormal: the bands of the gradient are those of the bands
    assert np.abs(low).max() < 1e-17
    for level, band in enumerate(bands, 1):  # of an L1's mean, +- one over the number of values
        np.testing.assert_allclose(np.abs(band), 1 / (3 * 3 * (32 >> level) ** 2), rtol=1e-10)


def test_half_precision_is_not_lost() -> None:
    student, teacher = (noise(1, 3, 32, 32, seed=seed).bfloat16() for seed in (0, 1))
    found = wavelet(student, teacher, 3)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wavelet(student.double(), teacher.double(), 3).item(), rel=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_a_blurred_student_becomes_sharp_and_its_brightness_stays(power: int) -> None:
    sharp = noise(2, 1, 32, 32)
    blur = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)  # what each pixel has of its neighbours
    offset = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([blur, offset], 0.02)
    for _ in range(200):
        across = torch.stack([blur / 2, 1 - blur, blur / 2])
        padded = nn.functional.pad(sharp, (1, 1, 1, 1), "reflect")
        blurred = nn.functional.conv2d(padded, (across[:, None] * across)[None, None])
        optimizer.zero_grad()
        wavelet(blurred + offset, sharp, 3, power).backward()
        optimizer.step()
    assert abs(blur.item()) < 0.02
    assert offset.item() == pytest.approx(0.5, abs=1e-12)
