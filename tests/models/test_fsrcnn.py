"""FSRCNN: its published size, its function against loops in NumPy; what it shares with the others: test_sr_network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpcdistill.models.fsrcnn import FSRCNN


def convolved(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[in, H, W] -> [out, H, W] with zero padding, from the definition."""
    outputs, _, kernel, _ = weight.shape
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    result = np.zeros((outputs, height, width))
    for o, y, x in np.ndindex(outputs, height, width):
        result[o, y, x] = bias[o] + (padded[:, y : y + kernel, x : x + kernel] * weight[o]).sum()
    return result


def transposed(image: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """[in, H, W] -> [out, H * stride, W * stride], 9x9 with padding 4, from the definition."""
    inputs, outputs, kernel, _ = weight.shape
    _, height, width = image.shape
    canvas = np.zeros((outputs, height * stride + kernel, width * stride + kernel))
    for i, y, x in np.ndindex(inputs, height, width):
        canvas[:, y * stride : y * stride + kernel, x * stride : x * stride + kernel] += image[i, y, x] * weight[i]
    return canvas[:, 4 : 4 + height * stride, 4 : 4 + width * stride] + bias[:, None, None]


def randomised(network: FSRCNN) -> FSRCNN:
    """Values of a visible size everywhere, different slopes included."""
    torch.manual_seed(7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def parameters_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_parameter_counts(scale: int) -> None:
    assert parameters_of(FSRCNN(scale)) == 12_644
    assert parameters_of(FSRCNN(scale, channels=3)) == 24_518


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_forward_equals_loops(scale: int) -> None:
    network = randomised(FSRCNN(scale, channels=2, d=3, s=2, m=2).double())
    image = np.random.default_rng(0).random((2, 5, 3))
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    features = image
    for layer in ("feature", "shrinking", "mapping.0", "mapping.1", "expanding"):
        features = convolved(features, weights[f"{layer}.0.weight"], weights[f"{layer}.0.bias"])
        features = np.where(features > 0, features, weights[f"{layer}.1.weight"] * features)
    expected = transposed(features, weights["upsampling.conv.weight"], weights["upsampling.conv.bias"], scale)
    with torch.no_grad():
        result, maps = network(torch.from_numpy(image)[None], maps=("expanding",))
    np.testing.assert_allclose(maps["expanding"][0].numpy(), features, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result[0].numpy(), expected, rtol=1e-12, atol=1e-11)


def test_initial_values() -> None:
    torch.manual_seed(0)
    network = FSRCNN(2, channels=3)
    for stage, kernel, outputs in ((network.feature, 5, 56), (network.expanding, 1, 56), (network.mapping[0], 3, 12)):
        assert stage[0].weight.std().item() == pytest.approx(math.sqrt(2 / (outputs * kernel**2)), rel=0.1)
        assert not stage[0].bias.any()
        assert stage[1].weight.tolist() == [0.25]
    assert network.upsampling.conv.weight.std().item() == pytest.approx(0.001, rel=0.05)
