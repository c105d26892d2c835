"""phi(.) against NumPy's FFT, shift and a mean for each ring."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.ops import radial_spectrum as module
from hpcdistill.ops.radial_spectrum import radial_decibels, radial_power, radial_spectrum, ring_count


def by_numpy(images: np.ndarray) -> np.ndarray:
    """The whole plane, shifted, ring by ring, in float64."""
    profiles = []
    for image in images.astype(np.float64):
        gray = image[0] if len(image) == 1 else np.tensordot([0.299, 0.587, 0.114], image[-3:], 1)
        log = np.log(np.abs(np.fft.fftshift(np.fft.fft2(gray))) + 1e-8)
        height, width = log.shape
        rows, columns = np.mgrid[:height, :width]
        # Frequencies in cycles per pixel, as radii in bins of the shorter side; nudged against rounding below.
        v, u = (rows - height // 2) / height, (columns - width // 2) / width
        radius = np.floor(np.hypot(v, u) * min(height, width) + 1e-9).astype(int)
        means = np.array([log[radius == ring].mean() for ring in range(radius.max() + 1)])[1:-2]
        profiles.append((means - means.min()) / (means.max() - means.min()))
    return np.array(profiles)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth and rough: a spectrum that falls, as an image's does."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal(shape)
    return noise.cumsum(-1).cumsum(-2) / 30 + 0.2 * noise


SIZES = [(64, 64), (256, 256), (63, 63), (65, 64), (6, 6), (7, 7), (48, 80), (81, 50), (10, 97), (128, 128)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_equals_numpy(size: tuple[int, int], channels: int) -> None:
    batch = images(2, channels, *size)
    expected = by_numpy(batch)
    exact = radial_spectrum(torch.from_numpy(batch))
    assert exact.dtype == torch.float64
    assert exact.shape == (2, ring_count(*size))
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-7)  # eps enters differently, see there
    single = radial_spectrum(torch.from_numpy(batch).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (48, 80)], ids=str)
def test_decibels_are_not_stretched(size: tuple[int, int]) -> None:
    """Stretched to [0, 1] they are phi; twice the image is 6.02 dB more."""
    batch = torch.from_numpy(images(2, 3, *size))
    decibels = radial_decibels(batch)
    assert decibels.dtype == torch.float64
    low, high = decibels.amin(1, keepdim=True), decibels.amax(1, keepdim=True)
    np.testing.assert_allclose((decibels - low) / (high - low), by_numpy(batch.numpy()), rtol=0, atol=1e-7)
    np.testing.assert_allclose(radial_decibels(2 * batch) - decibels, 20 * np.log10(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [64, 200])
def test_white_noise_has_the_same_decibels_at_any_size(side: int) -> None:
    """|F|^2 is exponentially distributed with a mean of 1: 20 log10 |F| is 10 log10(e) times -0.5772 on average."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, side, side)))
    expected = -0.5772156649 * 10 / np.log(10)
    found = radial_decibels(noise).mean(0)[side // 8 : side // 2]
    np.testing.assert_allclose(found.numpy(), expected, atol=1)
    assert found.mean().item() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_power_equals_numpy(size: tuple[int, int]) -> None:
    batch = (images(2, 3, *size) * 40 + 128).clip(0, 255).astype(np.uint8)
    gray = np.tensordot(batch.astype(np.float64), [0.299, 0.587, 0.114], (1, 0))
    power = np.abs(np.fft.fft2(gray)) ** 2 / (size[0] * size[1])
    v, u = np.meshgrid(*(np.fft.fftfreq(side) for side in size), indexing="ij")
    radius = np.floor(np.hypot(v, u) * min(size) + 1e-9)
    expected = np.stack([power[:, radius == ring].mean(1) for ring in range(1, min(size) // 2)], 1)
    found = radial_power(torch.from_numpy(batch))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_power_of_white_noise_is_its_variance() -> None:
    noise = torch.randn(8, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = radial_power(3 * noise + 100).mean(0)
    assert found.shape == (31,)
    # A ring r has about pi r independent frequencies an image: the first one is the least certain.
    assert found[8:].sub(9).abs().max() < 1.5
    assert found[8:].mean().item() == pytest.approx(9, rel=0.02)


def test_published_lengths() -> None:
    assert ring_count(64, 64) == 43
    assert ring_count(256, 256) == 179
    assert ring_count(128, 128) == 88
    assert ring_count(64, 128) == 43  # circles of the same frequency: the shorter side decides


def test_one_frequency_is_one_ring() -> None:
    # 10 cycles along the height of a 64x64 image: ring 10, which is number 9 once the first is dropped.
    wave = torch.cos(2 * torch.pi * 10 * torch.arange(64, dtype=torch.float64) / 64)
    image = wave[:, None].expand(64, 64) + 1e-4 * torch.randn(
        64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    profile = radial_spectrum(image[None, None])
    assert profile.argmax() == 9


def test_brightness_and_contrast_change_nothing() -> None:
    image = torch.from_numpy(images(1, 3, 32, 32))
    torch.testing.assert_close(radial_spectrum(0.3 * image + 0.6), radial_spectrum(image), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 9), (1, 6, 6, 8)], ids=str)
def test_gradient(shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(images(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(radial_spectrum, image)


def test_gradient_where_the_spectrum_is_zero() -> None:
    # Every second frequency of an image that repeats itself is exactly zero.
    half = torch.from_numpy(images(1, 1, 8, 4))
    image = torch.cat([half, half], 3).requires_grad_()
    assert (torch.fft.fft2(image.detach()).abs() == 0).sum() >= 16
    assert torch.autograd.gradcheck(radial_spectrum, image, eps=1e-11, atol=1e-2, rtol=1e-2)
    assert torch.autograd.gradcheck(radial_spectrum, torch.zeros(1, 1, 8, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0, 0.3])
@pytest.mark.parametrize("size", [(64, 64), (15, 21)], ids=str)
def test_a_constant_image_gives_numbers(value: float, size: tuple[int, int]) -> None:
    image = torch.full((2, 3, *size), value, requires_grad=True)
    profile = radial_spectrum(image)
    assert torch.isfinite(profile).all()
    assert profile.min() >= 0
    assert profile.max() <= 1
    profile.square().sum().backward()
    assert torch.isfinite(image.grad).all()
    if value == 0:
        assert not profile.any()


def test_a_flat_spectrum_gives_bounded_gradients() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20, 30] = 1.0  # a single pixel: |F| = 1 everywhere, max = min but for rounding
    image.requires_grad_()
    radial_spectrum(image).square().sum().backward()
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().max() < 100


def test_unchanged_by_autocast_and_memory_format() -> None:
    image = torch.from_numpy(images(2, 3, 32, 32)).float()
    expected = radial_spectrum(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(radial_spectrum(image), expected)
        assert radial_spectrum(image.bfloat16()).dtype == torch.float32
    last = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(radial_spectrum(last), expected, rtol=0, atol=1e-6)


def test_a_table_made_in_an_evaluation_serves_training() -> None:
    module._ring_table.cache_clear()
    image = torch.rand(1, 1, 12, 14)
    with torch.inference_mode():
        radial_spectrum(image)
    image.requires_grad_()
    radial_spectrum(image).sum().backward()
    assert image.grad is not None


def test_the_tables_are_cached_within_a_bound() -> None:
    module._ring_table.cache_clear()
    for side in (*range(6, 60), 58, 59):
        radial_spectrum(torch.rand(1, 1, side, side))
    cache = module._ring_table.cache_info()
    assert cache.hits == 2
    assert cache.currsize == cache.maxsize == 16


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="1, 3 or 6 channels, not 4"):
        radial_spectrum(torch.zeros(1, 4, 16, 16))
    for size in ((5, 5), (4, 64), (1, 1)):
        with pytest.raises(ValueError, match=r"has no radial spectrum; give at least 6x6"):
            ring_count(*size)
