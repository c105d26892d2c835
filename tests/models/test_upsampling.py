"""Both forms of the last layer give the same image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcdistill.models.upsampling import SubpixelUpsampling, TransposedUpsampling, build_upsampling, subpixel_kernel


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 7), (24, 24)])
def test_subpixel_form_is_exact(
    scale: int, channels: int, dtype: torch.dtype, tolerance: float, size: tuple[int, int]
) -> None:
    torch.manual_seed(scale)
    layer = TransposedUpsampling(56, channels, scale).to(dtype)
    nn.init.normal_(layer.conv.weight)
    nn.init.normal_(layer.conv.bias)
    features = torch.randn(2, 56, *size, dtype=dtype)
    with torch.no_grad():
        expected, result = layer(features), layer.to_subpixel()(features)
    assert result.shape == (2, channels, size[0] * scale, size[1] * scale)
    assert result.dtype == dtype
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 7)])
def test_kernel_17_in_all_its_forms(scale: int, dtype: torch.dtype, tolerance: float, size: tuple[int, int]) -> None:
    """IDN's: torch's own transposed convolution, the CPU's training form, the inference form, and their gradients."""
    torch.manual_seed(scale)
    layer = TransposedUpsampling(64, 3, scale, 17).to(dtype)
    nn.init.normal_(layer.conv.weight)
    nn.init.normal_(layer.conv.bias)
    features = torch.randn(2, 64, *size, dtype=dtype)
    expected, trained, deployed = layer.conv(features), layer(features), layer.to_subpixel()(features)
    assert expected.shape == (2, 3, size[0] * scale, size[1] * scale)
    for result in (trained, deployed):
        assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((image * weights).sum(), layer.conv.weight)[0] for image in (expected, trained)]
    assert (gradients[1] - gradients[0]).abs().max() <= tolerance * gradients[0].abs().max()


def test_layers_agree_with_the_published_geometry() -> None:
    for scale in (2, 3, 4):
        conv = TransposedUpsampling(56, 1, scale).conv
        assert (conv.kernel_size, conv.stride, conv.padding) == ((9, 9), (scale, scale), (4, 4))
        assert conv.output_padding == (scale - 1, scale - 1)
        assert sum(parameter.numel() for parameter in conv.parameters()) == 56 * 81 + 1
    assert [subpixel_kernel(scale) for scale in (2, 3, 4)] == [5, 5, 3]
    assert [subpixel_kernel(scale, 17) for scale in (2, 3, 4)] == [9, 7, 5]
    assert sum(parameter.numel() for parameter in TransposedUpsampling(64, 1, 4, 17).parameters()) == 64 * 289 + 1


@pytest.mark.parametrize("kind", ["transposed", "subpixel"])
def test_starts_near_zero(kind: str) -> None:
    torch.manual_seed(0)
    layer = build_upsampling(kind, 56, 3, 2)
    assert layer.conv.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not layer.conv.bias.any()


def test_subpixel_form_has_its_own_weights() -> None:
    layer = TransposedUpsampling(2, 1, 2)
    subpixel = layer.to_subpixel()
    before = subpixel.conv.weight.clone()
    with torch.no_grad():
        layer.conv.weight.add_(1)
    assert torch.equal(subpixel.conv.weight, before)
    assert subpixel.conv.weight.requires_grad


def test_even_subpixel_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel 4 is even"):
        SubpixelUpsampling(2, 1, 2, 4)
    with pytest.raises(ValueError, match="kernel 16 is even"):
        TransposedUpsampling(2, 1, 2, 16)
