"""Luma against scikit-image's rgb2ycbcr, which has MATLAB's coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr, ycbcr2rgb

from hpcdistill.ops.colour import luma, luma_uint8, with_luma


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)


def test_luma_equals_scikit_image(image: np.ndarray) -> None:
    rgb = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    result = luma(rgb.expand(2, 3, 17, 23))
    assert result.shape == (2, 1, 17, 23)
    np.testing.assert_allclose(result[1, 0].numpy() * 255, rgb2ycbcr(image)[..., 0], rtol=0, atol=1e-12)


def test_luma_uint8_equals_scikit_image(image: np.ndarray) -> None:
    result = luma_uint8(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, rgb2ycbcr(image)[..., 0] / 255, rtol=0, atol=2e-7)


def test_luma_uint8_takes_a_view(image: np.ndarray) -> None:
    np.testing.assert_array_equal(luma_uint8(image[::2, ::-1]), luma_uint8(image[::2, ::-1].copy()))


def test_black_and_white_are_16_and_235() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(3, 1, 2)
    torch.testing.assert_close(luma(ends)[0, 0] * 255, torch.tensor([16.0, 235.0], dtype=torch.float64))


def test_another_luma_keeps_the_chroma_as_scikit_image_takes_it(image: np.ndarray) -> None:
    rgb = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    other = torch.full((1, 17, 23), 0.5, dtype=torch.float64)
    expected = rgb2ycbcr(image)
    expected[..., 0] = 0.5 * 255
    made = with_luma(rgb, other).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(made, ycbcr2rgb(expected), rtol=0, atol=1e-5)  # its matrices are printed to 1e-6


def test_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        luma(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="8-bit RGB"):
        luma_uint8(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]
