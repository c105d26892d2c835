"""IDN: its published size, its function written out by hand, its initial values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.metrics.cost import super_resolution_cost
from hpcdistill.models.idn import IDN, DBlock

Enlarged = Callable[[Tensor, int], Tensor]
PIXELS = 1280 * 720


def parameters_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "published"), [(1, 552_769), (3, 590_915)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_parameters_and_the_cost_by_hand(scale: int, channels: int, published: int) -> None:
    counted = super_resolution_cost(IDN(scale, channels))
    assert counted.params == published
    block = 9 * (64 * 48 + 48 * 32 // 4 + 32 * 64 + 48 * 64 + 64 * 48 // 4 + 48 * 80) + 80 * 64
    body = 9 * (channels * 64 + 64 * 64) + 4 * block
    last = 17 * 17 * 64 * channels
    assert counted.macs == PIXELS // scale**2 * body + PIXELS * last
    bicubic = 5 * (scale + scale**2) * channels
    assert counted.true_macs == PIXELS // scale**2 * (body + last + bicubic)


def test_a_block_by_layer() -> None:
    block = DBlock()
    assert parameters_of(block) == 124_176
    geometry = [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.groups)
        for layer in block.modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    assert geometry == [
        (64, 48, 3, 1),
        (48, 32, 3, 4),
        (32, 64, 3, 1),
        (48, 64, 3, 1),
        (64, 48, 3, 4),
        (48, 80, 3, 1),
        (80, 64, 1, 1),
    ]


def visible(network: IDN) -> IDN:
    """The last layer starts near zero, biases at zero; give them values that a test can see."""
    torch.manual_seed(3)
    for name, parameter in network.named_parameters():
        if name.startswith("upsampling") or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_forward_by_hand(scale: int, channels: int, matlab_enlarged: Enlarged) -> None:
    network = visible(IDN(scale, channels).double())
    image = torch.rand(2, channels, 5, 4, dtype=torch.float64)
    weights = network.state_dict()

    def layer(name: str, features: Tensor, groups: int = 1) -> Tensor:
        weight = weights.pop(f"{name}.0.weight")
        margin = weight.shape[-1] // 2
        padded = functional.pad(features, (margin,) * 4)
        # A grouped convolution is several small ones side by side.
        parts = [
            functional.conv2d(part, kernels)
            for part, kernels in zip(padded.chunk(groups, 1), weight.chunk(groups), strict=True)
        ]
        result = torch.cat(parts, 1) + weights.pop(f"{name}.0.bias")[:, None, None]
        return torch.where(result > 0, result, 0.05 * result)

    features = layer("fblock.1", layer("fblock.0", image))
    maps = {"fblock": features}
    for name in ("dblock1", "dblock2", "dblock3", "dblock4"):
        first = layer(f"{name}.above.2", layer(f"{name}.above.1", layer(f"{name}.above.0", features), groups=4))
        second = layer(f"{name}.below.1", layer(f"{name}.below.0", first[:, 16:]), groups=4)
        second = layer(f"{name}.below.2", second)
        total = second + torch.cat([features, first[:, :16]], 1)
        features = layer(f"{name}.compression", total)
        maps[name] = features
    whole = functional.conv_transpose2d(features, weights.pop("upsampling.conv.weight"), stride=scale)
    residual = whole[..., 8 : 8 + 5 * scale, 8 : 8 + 4 * scale]
    expected = matlab_enlarged(image, scale) + residual + weights.pop("upsampling.conv.bias")[:, None, None]
    assert not weights, "the reference used every weight"
    with torch.no_grad():
        result, taken = network(image, maps=IDN.MAPS)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(taken, maps, rtol=1e-10, atol=1e-10)


def test_initial_values(matlab_enlarged: Enlarged) -> None:
    torch.manual_seed(0)
    network = IDN(2, 3)
    for name, inputs in (
        ("fblock.0", 3),
        ("dblock2.above.1", 12),
        ("dblock4.below.2", 48),
        ("dblock1.compression", 80),
    ):
        layer = network.get_submodule(name)[0]
        deviation = math.sqrt(2 / (1 + 0.05**2) / (inputs * layer.kernel_size[0] ** 2))
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1), name
        assert not layer.bias.any()
    assert network.upsampling.conv.weight.std().item() == pytest.approx(0.001, rel=0.05)
    # Untrained it is near the enlargement, not equal to it.
    image = torch.rand(1, 3, 12, 12)
    difference = network(image).detach().double() - matlab_enlarged(image, 2)
    assert difference.abs().mean() < 0.1
    assert difference.any()
