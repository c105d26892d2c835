"""What an export is compared on, and that it is removed when it differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.formats.base import NotVerified, Options, example, other_sizes
from hpcdistill.deploy.formats.onnx import Onnx
from hpcdistill.deploy.formats.torch_export import TorchExport
from hpcdistill.deploy.session import Batch, Session
from hpcdistill.deploy.verification import compare, export, in_words, photograph, psnr
from hpcdistill.errors import UserError
from hpcdistill.models.image_generator import build_generator

LUMA = Description("super-resolution", "Doubled", scale=2, colour="luma")


class Doubled(nn.Module):
    """x2 by repeating pixels."""

    def forward(self, image: Tensor) -> Tensor:
        return image.repeat_interleave(2, 2).repeat_interleave(2, 3)


def right(images: Batch) -> Batch:
    return images.repeat(2, 2).repeat(2, 3)


def only_when(where: Callable[[Batch], bool], change: Callable[[Batch], Batch]) -> Session:
    """Right, but for the images that `where` picks."""
    return lambda images: change(right(images)) if where(images) else right(images)


def test_what_is_equal_passes_with_its_psnr() -> None:
    report = compare(Doubled(), LUMA, right, "numpy", 1e-4)
    original, image = photograph(LUMA)
    assert report.difference == 0
    assert report.psnr == pytest.approx(peak_signal_noise_ratio(original, right(image), data_range=1), abs=1e-6)
    assert report.psnr_change == 0
    assert report.sizes == ((120, 120), (1, 1), (37, 53), (61, 90))
    assert in_words(report).startswith("numpy differs from PyTorch by at most 0.0e+00 (of 1) at 120x120, 1x1, 37x53")


@pytest.mark.parametrize(
    "where",
    [
        lambda images: images.shape[2] == 120,
        lambda images: images.shape[2:] == (1, 1),
        lambda images: images.shape[2:] == (37, 53),
        lambda images: images.shape[2:] == (61, 90),
    ],
)
def test_what_differs_at_any_of_its_sizes_fails(where: Callable[[Batch], bool]) -> None:
    for change in (lambda made: made + np.float32(2e-4), lambda made: made * np.float32(np.nan)):
        with pytest.raises(UserError, match=r"more than the 1\.0e-04 that is allowed; nothing was written"):
            compare(Doubled(), LUMA, only_when(where, change), "numpy", 1e-4)
    assert compare(Doubled(), LUMA, only_when(where, lambda made: made + np.float32(5e-5)), "numpy", 1e-4).psnr
    with pytest.raises(UserError, match="numpy makes"):
        compare(Doubled(), LUMA, only_when(where, lambda made: made[:, :, 1:]), "numpy", 1e-4)


def test_the_range_of_a_translation_counts_as_one() -> None:
    about = Description("translation", "Identity", low=-1, high=1, multiple=4, smallest=8)
    report = compare(nn.Identity(), about, lambda images: images + np.float32(1e-4), "numpy", 1e-4)
    assert report.difference == pytest.approx(5e-5, rel=1e-2)
    assert report.psnr is None


def test_the_photograph_is_scikit_images() -> None:
    part = astronaut()[:240, 110:350]
    rgb = photograph(replace(LUMA, colour="rgb"))[0]
    np.testing.assert_array_equal(np.rint(rgb[0].transpose(1, 2, 0) * 255), part)
    luma, image = photograph(LUMA)
    np.testing.assert_allclose(luma[0, 0] * 255, rgb2ycbcr(part)[..., 0], atol=1e-3)
    # The mean of what was made smaller is kept, and so its range; BT.601's studio swing.
    assert image.mean() == pytest.approx(luma.mean(), abs=1e-3)
    assert 16 / 255 - 1e-6 <= image.min() < image.max() <= 235 / 255 + 1e-6
    signed = photograph(Description("translation", "ResNetGenerator", low=-1, high=1, multiple=4, smallest=8))[1]
    np.testing.assert_allclose(signed, rgb * 2 - 1, atol=1e-6)
    assert photograph(Description("translation", "U", low=-1, high=1, multiple=256, smallest=256))[1].shape[2] == 256
    for planes in (rgb, luma, image, signed):
        assert planes.flags["C_CONTIGUOUS"]


def test_psnr_is_scikit_images() -> None:
    first, second = np.random.default_rng(0).random((2, 1, 3, 9, 9), dtype=np.float32)
    assert psnr(first, second) == pytest.approx(peak_signal_noise_ratio(second, first, data_range=1))
    assert psnr(first + 2, first) == pytest.approx(peak_signal_noise_ratio(first, np.ones_like(first), data_range=1))


@pytest.mark.parametrize(
    "about", [LUMA, *(Description("translation", "N", multiple=m, smallest=s) for m, s in ((4, 8), (4, 4), (256, 256)))]
)
def test_no_size_is_the_one_that_was_traced(about: Description) -> None:
    traced = tuple(example(about).shape)
    assert traced[0] == 2
    assert traced[2] != traced[3]
    sizes = other_sizes(about)
    assert sizes[0] == (about.smallest, about.smallest)
    assert sizes[2][0] * sizes[2][1] > traced[2] * traced[3]
    for height, width in (traced[2:], *sizes):
        assert height % about.multiple == width % about.multiple == 0
        assert min(height, width) >= about.smallest
    odd = [side // about.multiple for side in sizes[1]]
    assert all(side % 2 for side in odd)
    assert traced[2:] not in sizes
    assert min(traced[2:]) // about.multiple > 1  # else a U-Net's innermost map is traced at 1x1, and fixed


def test_a_size_at_which_float32_is_only_rounding_is_not_compared() -> None:
    """A ResNet generator normalises four values of an 8x8 image."""
    torch.manual_seed(1)
    network = build_generator("resnet", ngf=16, separable=True).deploy()
    about = describe(network, {}, Path("resnet"))

    def other_rounding(images: Batch) -> Batch:
        """In double precision, which is at least as right."""
        with torch.no_grad():
            made: Batch = network.double()(torch.from_numpy(images).double()).float().numpy()
            network.float()
        return made

    report = compare(network, about, other_rounding, "float64", 1e-4)
    assert report.sizes[1] == (16, 16)


class Antialiased(nn.Module):
    """What PyTorch's exporter writes otherwise than it computes: a factor of 1/3 as the sizes that it gives."""

    def forward(self, image: Tensor) -> Tensor:
        small = functional.interpolate(image, scale_factor=1 / 3, mode="bicubic", antialias=True)
        return functional.interpolate(small, size=image.shape[-2:])


def test_an_export_that_differs_leaves_nothing(tmp_path: Path) -> None:
    about = Description("super-resolution", "Antialiased", smallest=6)
    path = tmp_path / "new" / "a.onnx"
    with pytest.raises(UserError, match=r"onnxruntime .* differs from PyTorch by at most"):
        export(Onnx(), Antialiased(), about, path, Options())
    assert not list(path.parent.iterdir())


def test_training_mode_is_ended_before_anything_is_compared(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Dropout(0.5), Doubled()).train()
    for exporter in (Onnx(), TorchExport()):
        report = export(exporter, network, LUMA, tmp_path / f"a{exporter.suffix}", Options())[1]
        assert not isinstance(report, NotVerified)
        assert report.difference == 0
