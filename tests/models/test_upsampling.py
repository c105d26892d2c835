"""Both forms of the last layer give the same image: the definition, written as loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hpcdistill.models.upsampling import (
    SubpixelUpsampling,
    TransposedUpsampling,
    build_upsampling,
    subpixel_kernel,
    transposed_to_subpixel,
)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("kernel", "inputs"), [(9, 56), (17, 64)])  # FSRCNN's and IDN's
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 7)])
def test_all_forms_are_one_function(
    scale: int, kernel: int, inputs: int, dtype: torch.dtype, tolerance: float, size: tuple[int, int]
) -> None:
    """Torch's own transposed convolution, the CPU's training form, the inference form, and their gradients."""
    torch.manual_seed(scale)
    layer = TransposedUpsampling(inputs, 3, scale, kernel).to(dtype)
    nn.init.normal_(layer.conv.weight)
    nn.init.normal_(layer.conv.bias)
    features = torch.randn(2, inputs, *size, dtype=dtype)
    expected, trained, deployed = layer.conv(features), layer(features), layer.to_subpixel()(features)
    assert expected.shape == (2, 3, size[0] * scale, size[1] * scale)
    for result in (trained, deployed):
        assert result.dtype == dtype
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


# The kernel of the sub-pixel form, for any geometry.

# kernel, stride, padding; output_padding follows from them
GEOMETRIES = [
    (9, 2, 4),
    (9, 3, 4),
    (9, 4, 4),
    (9, 5, 4),
    (4, 2, 1),
    (2, 2, 0),
    (3, 2, 1),
    (3, 1, 1),
    (1, 3, 0),
    (6, 3, 2),
    (5, 4, 1),
    (8, 2, 5),
]


def scattered(image: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Every input pixel adds its kernel to the output, whose sides are `stride` times larger; [in, H, W] in."""
    channels_in, height, width = image.shape
    _, channels_out, kernel, _ = weight.shape
    result = np.zeros((channels_out, height * stride, width * stride))
    for i, o in np.ndindex(channels_in, channels_out):
        for y, x in np.ndindex(height, width):
            for ky, kx in np.ndindex(kernel, kernel):
                row, column = y * stride - padding + ky, x * stride - padding + kx
                if 0 <= row < height * stride and 0 <= column < width * stride:
                    result[o, row, column] += image[i, y, x] * weight[i, o, ky, kx]
    return result


def enlarged(image: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return functional.pixel_shuffle(functional.conv2d(image, weight, padding=padding), stride)


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_the_kernel_equals_the_definition_border_included(kernel: int, stride: int, padding: int) -> None:
    generator = np.random.default_rng(kernel * 100 + stride * 10 + padding)
    image, weight = generator.normal(size=(2, 5, 3)), generator.normal(size=(2, 3, kernel, kernel))
    output_padding = stride + 2 * padding - kernel
    mapped = transposed_to_subpixel(torch.from_numpy(weight), stride, padding, output_padding)
    result = enlarged(torch.from_numpy(image)[None], mapped, stride)[0].numpy()
    expected = scattered(image, weight, stride, padding)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_kernel_holds_the_same_numbers_and_zeros() -> None:
    weight = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    mapped = transposed_to_subpixel(weight, 4, 4, 3)
    assert torch.equal(mapped[mapped != 0].sort().values, weight.flatten().sort().values)


def test_gradients_reach_the_transposed_weights() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    seen = torch.randn(2, 2, 12, 15, dtype=torch.float64)
    weight = torch.randn(3, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    (direct,) = torch.autograd.grad(
        (functional.conv_transpose2d(image, weight, stride=3, padding=4, output_padding=2) * seen).sum(), weight
    )
    (through,) = torch.autograd.grad((enlarged(image, transposed_to_subpixel(weight, 3, 4, 2), 3) * seen).sum(), weight)
    torch.testing.assert_close(through, direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 1, 9, 9), (2, 4, 0), "use output_padding 1"),
        ((1, 1, 9, 9), (4, 4, 1), "use output_padding 3"),
        ((1, 1, 9, 9), (2, 1, 1), "use a smaller kernel"),
        ((1, 1, 9, 7), (2, 4, 1), "use output_padding 3"),
        ((1, 1, 9, 9), (0, 4, 0), "stride 0"),
        ((1, 1, 9, 9), (2, -1, 0), "padding -1"),
        ((1, 9, 9), (2, 4, 1), "3 dimensions"),
    ],
)
def test_kernels_refuse_what_has_no_equal(
    shape: tuple[int, ...], arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        transposed_to_subpixel(torch.zeros(shape), *arguments)
