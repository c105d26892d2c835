"""PSNR and SSIM against scikit-image, against the formula written out, and the two rules against hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hpcdistill.errors import UserError
from hpcdistill.metrics.psnr_ssim import luma_255, luma_pair, psnr, shave, ssim


def image_pair(height: int, width: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture with a noisy copy: SSIM is high in parts and low in others."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    picture = 128 + 80 * np.sin(rows / 7) * np.cos(columns / 5)
    return picture, np.clip(picture + generator.normal(0, noise, picture.shape) * (columns / width), 0, 255)


@pytest.mark.parametrize(
    ("height", "width", "noise"),
    [(11, 11, 5), (12, 40, 20), (123, 97, 3), (700, 60, 30), (40, 2000, 30)],  # the last two need several strips
)
def test_ssim_equals_scikit_image(height: int, width: int, noise: float) -> None:
    picture, noisy = image_pair(height, width, noise, seed=height)
    expected = structural_similarity(
        noisy, picture, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert 0.1 < expected < 0.9999
    assert ssim(torch.from_numpy(noisy), torch.from_numpy(picture)).item() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_one_window_by_the_formula() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.uniform(0, 255, (2, 11, 11))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    assert ssim(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(expected, abs=1e-12)


def test_metrics_are_per_image() -> None:
    pairs = [image_pair(30, 40, noise, seed=3) for noise in (2, 10, 50)]
    pictures, noisy = (torch.from_numpy(np.stack(images))[:, None] for images in zip(*pairs, strict=True))
    assert ssim(noisy, pictures).shape == psnr(noisy, pictures).shape == (3, 1)
    for index in range(3):
        assert ssim(noisy, pictures)[index, 0] == ssim(noisy[index, 0], pictures[index, 0])
        assert psnr(noisy, pictures)[index, 0] == psnr(noisy[index, 0], pictures[index, 0])


def test_ssim_of_an_image_with_itself_is_one() -> None:
    picture = torch.from_numpy(image_pair(30, 40, 0, seed=0)[0])
    assert ssim(picture, picture).item() == pytest.approx(1, abs=1e-14)
    flat = torch.full((20, 20), 255.0)
    assert ssim(flat, flat).item() == pytest.approx(1, abs=1e-14)


def test_psnr_equals_scikit_image() -> None:
    picture, noisy = image_pair(31, 43, 12, seed=7)
    expected = peak_signal_noise_ratio(picture, noisy, data_range=255)
    assert psnr(torch.from_numpy(noisy), torch.from_numpy(picture)).item() == pytest.approx(expected, abs=1e-10)
    # Float32 input is not summed in float32.
    both = torch.from_numpy(noisy).float(), torch.from_numpy(picture).float()
    assert psnr(*both).item() == pytest.approx(expected, abs=1e-5)


def test_psnr_of_equal_images_is_infinite() -> None:
    picture = torch.full((12, 12), 7.0)
    assert psnr(picture, picture).item() == math.inf
    assert psnr(picture + 1, picture).item() == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255


def test_luma_of_pure_colours() -> None:
    colours = torch.tensor([[0, 255, 255, 0, 0], [0, 255, 0, 255, 0], [0, 255, 0, 0, 255]], dtype=torch.uint8)
    expected = [16, 235, 81.481, 144.553, 40.966]
    assert luma_255(colours[:, None]).flatten().tolist() == pytest.approx(expected, abs=1e-9)


def test_shave() -> None:
    picture = torch.arange(30.0).view(5, 6)
    assert shave(picture, 1).tolist() == [[7, 8, 9, 10], [13, 14, 15, 16], [19, 20, 21, 22]]


def reference_image() -> torch.Tensor:
    """`[3, 5, 5]` with one pixel left at scale 2: R, G, B = 10, 20, 200, luma 48.2316"""
    image = torch.zeros(3, 5, 5, dtype=torch.uint8)
    image[:, 2, 2] = torch.tensor([10, 20, 200])
    return image


def test_rules_with_a_luma_network() -> None:
    reference = reference_image()
    y = 16 + (65.481 * 10 + 128.553 * 20 + 24.966 * 200) / 255
    assert y == pytest.approx(48.2316, abs=1e-4)
    output = torch.full((1, 5, 5), 40.6 / 255)
    produced, expected = luma_pair(output, reference, 2, "pisr")
    assert produced.tolist() == [[41]]
    assert expected.item() == pytest.approx(y, abs=1e-9)
    produced, expected = luma_pair(output, reference, 2, "matlab")
    assert (produced.item(), expected.item()) == (41, 48)
    for value, clamped in ((1.3, 255), (-0.2, 0)):
        produced, _ = luma_pair(torch.full((1, 5, 5), value), reference, 2, "pisr")
        assert produced.item() == clamped


def test_rules_with_an_rgb_network() -> None:
    output = torch.zeros(3, 5, 5)
    output[:, 2, 2] = torch.tensor([99.7 / 255, -0.5, 1.5])  # becomes 100, 0, 255
    y = 16 + (65.481 * 100 + 24.966 * 255) / 255
    produced, expected = luma_pair(output, reference_image(), 2, "pisr")
    assert produced.item() == pytest.approx(y, abs=1e-9)
    assert expected.item() == pytest.approx(48.2316, abs=1e-4)
    produced, expected = luma_pair(output, reference_image(), 2, "matlab")
    assert (produced.item(), expected.item()) == (round(y), 48)


def test_a_perfect_output_is_perfect_only_where_the_reference_is_rounded_too() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (3, 60, 60), generator=generator, dtype=torch.uint8)
    output = luma_255(reference)[None] / 255
    # What is left under "pisr" is the rounding of the output: uniform in +-1/2, mean square 1/12, 58.92 dB.
    assert psnr(*luma_pair(output, reference, 3, "pisr")).item() == pytest.approx(58.92, abs=0.15)
    assert psnr(*luma_pair(output, reference, 3, "matlab")).item() == math.inf
    # 8-bit RGB in, 8-bit RGB out: nothing is lost.
    assert psnr(*luma_pair(reference / 255, reference, 3, "pisr")).item() == math.inf


def test_inputs_are_left_alone() -> None:
    output, reference = torch.rand(1, 30, 30, dtype=torch.float64), torch.full((3, 30, 30), 9, dtype=torch.uint8)
    before = output.clone()
    pair = luma_pair(output, reference, 2, "matlab")
    kept = [image.clone() for image in pair]
    psnr(*pair), ssim(*pair)
    assert torch.equal(output, before)
    assert reference.eq(9).all()
    assert all(torch.equal(image, copy) for image, copy in zip(pair, kept, strict=True))


def test_images_that_are_too_small() -> None:
    with pytest.raises(UserError, match="8x6 is gone after shaving 3 pixels"):
        luma_pair(torch.zeros(1, 6, 8), torch.zeros(3, 6, 8, dtype=torch.uint8), 3, "pisr")
    with pytest.raises(UserError, match="10x30 pixels are left of an image after shaving, less than SSIM's 11x11"):
        ssim(torch.zeros(30, 10), torch.zeros(30, 10))
    with pytest.raises(ValueError, match=r"\[6, 8\], the reference \[6, 9\]"):
        luma_pair(torch.zeros(1, 6, 8), torch.zeros(3, 6, 9, dtype=torch.uint8), 2, "pisr")
