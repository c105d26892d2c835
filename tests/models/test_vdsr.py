"""VDSR: its published size and cost, its function written out by hand, its initial values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.metrics.cost import super_resolution_cost
from hpcdistill.models.vdsr import VDSR

Enlarged = Callable[[Tensor, int], Tensor]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_weights_and_cost(scale: int) -> None:
    counted = super_resolution_cost(VDSR(scale))
    assert counted.params == 664_704
    # Twenty convolutions at the size of the output; the enlargement is not one.
    assert counted.macs == 1280 * 720 * 664_704
    assert counted.true_macs == counted.macs + 1280 * 720 // scale**2 * 5 * (scale + scale**2)  # bicubic
    assert round(counted.macs / 1e9, 1) == 612.6
    assert super_resolution_cost(VDSR(scale, 3)).params == 2 * 9 * 3 * 64 + 18 * 9 * 64 * 64 == 667_008


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_forward_by_hand(scale: int, channels: int, matlab_enlarged: Enlarged) -> None:
    torch.manual_seed(0)
    network = VDSR(scale, channels).double()
    image = torch.rand(2, channels, 5, 4, dtype=torch.float64)
    weights = list(network.state_dict().values())
    assert [tuple(weight.shape) for weight in weights] == [
        (64, channels, 3, 3),
        *[(64, 64, 3, 3)] * 18,
        (channels, 64, 3, 3),
    ]
    enlarged = matlab_enlarged(image, scale)
    features, maps = enlarged, {}
    for number, weight in enumerate(weights[:-1], start=1):
        features = functional.conv2d(functional.pad(features, (1, 1, 1, 1)), weight).clamp(min=0)
        maps[f"conv{number}"] = features
    expected = enlarged + functional.conv2d(functional.pad(features, (1, 1, 1, 1)), weights[-1])
    with torch.no_grad():
        result, taken = network(image, maps=VDSR.MAPS)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(taken, maps, rtol=1e-10, atol=1e-10)


def test_without_a_residual_it_is_the_enlargement(matlab_enlarged: Enlarged) -> None:
    network = VDSR(3).double()
    torch.nn.init.zeros_(network.residual.weight)
    image = torch.rand(1, 1, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(image), matlab_enlarged(image, 3), rtol=1e-12, atol=1e-12)


def test_initial_values() -> None:
    torch.manual_seed(0)
    weights = list(VDSR(2, 3).parameters())
    for weight in (weights[0], weights[1], weights[18], weights[19]):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * weight.shape[1])), rel=0.1)
    # He's deviation keeps the size of the maps over the depth.
    sizes = [map_.square().mean().item() for map_ in VDSR(2)(torch.rand(1, 1, 24, 24), maps=VDSR.MAPS)[1].values()]
    assert 0.05 < sizes[-1] / sizes[0] < 20
