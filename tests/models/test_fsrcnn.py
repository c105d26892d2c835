"""FSRCNN: its published size, its function against loops in NumPy, its maps and its inference form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpcdistill.errors import UserError
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


def test_maps_are_what_the_plain_forward_computes() -> None:
    network = randomised(FSRCNN(3))
    image = torch.rand(2, 1, 6, 7)
    result, maps = network(image, maps=("expanding",))
    assert list(maps) == ["expanding"]
    assert maps["expanding"].shape == (2, 56, 6, 7)
    assert torch.equal(result, network(image))
    assert torch.equal(maps["expanding"], network.features(image, "expanding"))
    assert maps["expanding"].requires_grad
    _, all_maps = network(image, maps=FSRCNN.MAPS)
    assert {name: map_.shape[1] for name, map_ in all_maps.items()} == network.map_channels
    for name, map_ in all_maps.items():
        assert torch.equal(map_, network.features(image, name))


def test_features_stops_before_the_deconvolution() -> None:
    network = FSRCNN(2)

    def refuse(*_: object) -> None:
        raise AssertionError("the deconvolution was computed")

    network.upsampling.register_forward_pre_hook(refuse)
    assert network.features(torch.rand(1, 1, 4, 4), "expanding").shape == (1, 56, 4, 4)


def test_unknown_map_names_the_valid_ones() -> None:
    network = FSRCNN(2)
    for call in (
        lambda: network(torch.rand(1, 1, 4, 4), maps=("expand",)),
        lambda: network.features(torch.rand(1, 1, 4, 4), "expand"),
    ):
        with pytest.raises(ValueError, match="'expand'; valid: feature, shrinking, mapping, expanding"):
            call()


def test_initial_values() -> None:
    torch.manual_seed(0)
    network = FSRCNN(2, channels=3)
    for stage, kernel, outputs in ((network.feature, 5, 56), (network.expanding, 1, 56), (network.mapping[0], 3, 12)):
        assert stage[0].weight.std().item() == pytest.approx(math.sqrt(2 / (outputs * kernel**2)), rel=0.1)
        assert not stage[0].bias.any()
        assert stage[1].weight.tolist() == [0.25]
    assert network.upsampling.conv.weight.std().item() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(11, 17), (8, 8)])
def test_deploy_is_the_same_function(scale: int, dtype: torch.dtype, tolerance: float, size: tuple[int, int]) -> None:
    network = FSRCNN(scale).to(dtype).train()
    torch.nn.init.normal_(network.upsampling.conv.weight)
    torch.nn.init.normal_(network.upsampling.conv.bias)
    deployed = network.deploy()
    image = torch.rand(2, 1, *size, dtype=dtype)
    with torch.no_grad():
        expected, result = network(image), deployed(image)
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    assert network.training
    assert not deployed.training
    assert not any(isinstance(module, torch.nn.ConvTranspose2d) for module in deployed.modules())


def test_deployed_copy_can_be_rebuilt_and_leaves_the_original_alone() -> None:
    network = randomised(FSRCNN(4, channels=3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    deployed = network.deploy()
    assert deployed.arguments["upsampling"] == "subpixel"
    assert network.arguments["upsampling"] == "transposed"
    rebuilt = FSRCNN(**deployed.arguments)
    rebuilt.load_state_dict(deployed.state_dict())
    image = torch.rand(1, 3, 5, 6)
    assert torch.equal(rebuilt(image), deployed(image))
    assert torch.equal(deployed.deploy()(image), deployed(image))
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_parameter_gets_a_gradient() -> None:
    network = randomised(FSRCNN(2))
    network(torch.rand(1, 1, 6, 6)).abs().mean().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"scale": 2, "channels": 0}, "channels is 0"),
        ({"scale": 2, "upsampling": "transpose"}, "did you mean 'transposed'"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FSRCNN(**arguments)
