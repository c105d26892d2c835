"""The resize against a dense float64 matrix written straight from MATLAB's documentation of imresize."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from matlab_reference import matlab_matrix, matlab_resize

from hpcdistill.ops.bicubic import downsample, resize_bicubic, upsample

SCALES = [Fraction(*s) for s in [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (3, 2), (2, 3), (7, 11), (13, 9)]]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (12, 12), (24, 37)], ids=str)
def test_equals_matlab(scale: Fraction, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(shape)
    expected = matlab_resize(image, scale)
    result = resize_bicubic(torch.from_numpy(image), scale).numpy()
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)


def test_float_scale_stands_for_its_fraction() -> None:
    image = torch.rand(9, 99, dtype=torch.float64)
    assert torch.equal(resize_bicubic(image, 1 / 3), resize_bicubic(image, Fraction(1, 3)))
    assert resize_bicubic(image, 1 / 3).shape == (3, 33)


def test_size_scales_each_axis_by_itself() -> None:
    image = np.random.default_rng(1).random((10, 21))
    expected = matlab_matrix(10, 4, 4 / 10) @ image @ matlab_matrix(21, 30, 30 / 21).T
    result = resize_bicubic(torch.from_numpy(image), size=(4, 30)).numpy()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)


def test_impulse_gives_the_kernel_by_hand() -> None:
    # Output i of a halving is centred at 2i + 1/2, so an impulse at 3 is 2.5, 0.5, -1.5, -3.5 away; kernel(d/2)/2.
    row = torch.zeros(1, 8, dtype=torch.float64)
    row[0, 3] = 1
    expected = torch.tensor([-0.03515625, 0.43359375, 0.11328125, -0.01171875], dtype=torch.float64)
    assert torch.equal(resize_bicubic(row.expand(8, 8), Fraction(1, 2))[0], expected)


def test_border_is_mirrored_with_the_end_pixel_repeated() -> None:
    # An impulse at 0 is seen again at -1: 0.43359375 + 0.11328125 at the first output.
    image = torch.zeros(8, 8, dtype=torch.float64)
    image[0] = 1
    assert downsample(image, 2)[0, 0] == 0.546875


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_constant_stays_constant(scale: int) -> None:
    image = torch.full((2, 3, 24, 36), 0.7, dtype=torch.float64)
    small = downsample(image, scale)
    assert small.shape == (2, 3, 24 // scale, 36 // scale)
    torch.testing.assert_close(small, torch.full_like(small, 0.7), rtol=0, atol=1e-15)
    torch.testing.assert_close(upsample(small, scale), image, rtol=0, atol=1e-14)


def test_a_ramp_is_kept_inside() -> None:
    ramp = torch.arange(48, dtype=torch.float64).expand(48, 48)
    inside = downsample(ramp, 4)[6, 3:9]
    torch.testing.assert_close(inside, torch.arange(3, 9, dtype=torch.float64) * 4 + 1.5)


@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(2), Fraction(3, 2), Fraction(11, 9)], ids=str)
def test_gradient(scale: Fraction) -> None:
    image = torch.rand(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_bicubic(x, scale), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = downsample(image, 4)
    assert result.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), downsample(image.double(), 4), rtol=0, atol=tolerance)


def test_unchanged_by_autocast() -> None:
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = downsample(image, 2)
    assert torch.equal(inside, downsample(image, 2))


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"25x24 is not a multiple of 2"):
        downsample(torch.rand(25, 24), 2)
    with pytest.raises(ValueError, match=r"floating-point"):
        resize_bicubic(torch.zeros(4, 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"either a scale or a size"):
        resize_bicubic(torch.rand(4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_same_on_the_gpu(scale: Fraction) -> None:
    image = torch.rand(2, 3, 48, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_bicubic(image.cuda(), scale).cpu(), resize_bicubic(image, scale))
