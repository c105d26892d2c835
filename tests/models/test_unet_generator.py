"""Pix2Pix's generator: its published size, its function written out by hand, its maps and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import image_cost
from hpcdistill.models.unet_generator import UNetGenerator


def visible(network: torch.nn.Module) -> torch.nn.Module:
    """Weights, biases and running statistics of a size that a test can see."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer, std=0.3)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 2)
    return network


@pytest.mark.parametrize(
    ("ngf", "params", "macs", "true_macs"), [(64, 54.414, 18.14, 6.048), (16, 3.4045, 1.2187, 0.406)]
)
def test_published_counts(ngf: int, params: float, macs: float, true_macs: float) -> None:
    counted = image_cost(UNetGenerator(ngf))
    assert round(counted.params / 1e6, 4 if ngf == 16 else 3) == params
    assert round(counted.macs / 1e9, 4 if ngf == 16 else 2) == macs
    assert round(counted.true_macs / 1e9, 3) == true_macs


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_counts_by_hand(levels: int) -> None:
    ngf, inputs, outputs = 4, 1, 2
    widths = [inputs, *(ngf * factor for factor in (1, 2, 4, 8, 8, 8, 8, 8))]  # of level k; level 0 is the image
    pixels, first, second, weights = 256 * 256, 0, 0, 0
    for k in range(1, levels + 1):
        reads = widths[k] if k == levels else 2 * widths[k]
        writes = widths[k - 1] if k > 1 else outputs
        first += 16 * widths[k - 1] * widths[k] * pixels // 4**k
        second += 16 * reads * writes * pixels // 4**k
        weights += 16 * (widths[k - 1] * widths[k] + reads * writes)
    normalised = sum(widths[2:levels]) + sum(widths[1:levels])  # on the way down and on the way up
    counted = image_cost(UNetGenerator(ngf, levels, inputs, outputs))
    assert counted.params == weights + 2 * normalised + outputs
    assert counted.true_macs == first + second
    assert counted.macs == first + 4 * second


def by_hand(image: Tensor, state: dict[str, Tensor], levels: int, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The classic recursion, level by level from the outside; uses up the state dict's entries."""
    maps: dict[str, Tensor] = {}

    def norm(name: str, features: Tensor) -> Tensor:
        mean, variance = state.pop(f"{name}.running_mean"), state.pop(f"{name}.running_var")
        del state[f"{name}.num_batches_tracked"]
        if training:
            mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3), unbiased=False)
        scaled = (features - mean[:, None, None]) / (variance + 1e-5)[:, None, None].sqrt()
        return scaled * state.pop(f"{name}.weight")[:, None, None] + state.pop(f"{name}.bias")[:, None, None]

    def enlarged(name: str, features: Tensor) -> Tensor:
        """Every value adds its 4x4 stamp at twice its place; one pixel is cut off all around."""
        weight = state.pop(f"{name}.weight")
        batch, _, height, width = features.shape
        canvas = features.new_zeros(batch, weight.shape[1], 2 * height + 2, 2 * width + 2)
        for y in range(4):
            for x in range(4):
                stamp = torch.einsum("bihw,io->bohw", features, weight[:, :, y, x])
                canvas[..., y : y + 2 * height : 2, x : x + 2 * width : 2] += stamp
        return canvas[..., 1:-1, 1:-1]

    def level(k: int, features: Tensor) -> Tensor:
        """What level k hands up to level k - 1, before the skip."""
        if k > 1:
            features = torch.where(features > 0, features, 0.2 * features)
            maps[f"down{k}"] = features
        weight = state.pop(f"down{k}.0.weight")
        inner = functional.conv2d(functional.pad(features, (1, 1, 1, 1)), weight, stride=2)
        if 1 < k < levels:
            inner = norm(f"down{k}.1", inner)
        if k < levels:
            inner = torch.cat([inner, level(k + 1, inner)], dim=1)
        inner = inner * (inner > 0)
        maps[f"up{k}"] = inner
        outer = enlarged(f"up{k}.0", inner)
        return norm(f"up{k}.1", outer) if k > 1 else torch.tanh(outer + state.pop("up1.0.bias")[:, None, None])

    return level(1, image), maps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 5])
def test_forward_by_hand(levels: int, training: bool) -> None:
    network = visible(UNetGenerator(2, levels, channels_in=2, channels_out=1).double()).train(training)
    image = torch.rand(2, 2, 2**levels, 2 * 2**levels, dtype=torch.float64) * 2 - 1
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected, expected_maps = by_hand(image, state, levels, training)
    assert not state, "the reference used every weight"
    with torch.no_grad():
        result, maps = network(image, maps=network.MAPS)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(maps, {name: expected_maps[name] for name in maps}, rtol=1e-9, atol=1e-9)
    assert set(expected_maps) == set(maps)


def test_distilled_maps_have_the_papers_shapes() -> None:
    network = UNetGenerator(4).eval()
    with torch.no_grad():
        result, maps = network(torch.rand(1, 3, 256, 256), maps=UNetGenerator.DISTILLED)
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        "down3": (8, 64, 64),
        "down5": (32, 16, 16),
        "up4": (64, 16, 16),
        "up2": (16, 64, 64),
    }
    assert result.shape == (1, 3, 256, 256)
    assert network.DISTILLED == UNetGenerator.DISTILLED
    assert network.MAPS == UNetGenerator.MAPS


@pytest.mark.parametrize(
    ("levels", "distilled"),
    [
        (7, ("down3", "down5", "up4", "up2")),
        (5, ("down3", "down5", "up4", "up2")),
        (4, ("down3", "down4", "up4", "up2")),
        (3, ("down3", "up3", "up2")),
        (2, ("down2", "up2")),
    ],
)
def test_distilled_maps_of_fewer_levels_exist(levels: int, distilled: tuple[str, ...]) -> None:
    network = UNetGenerator(2, levels).eval()
    assert distilled == network.DISTILLED
    with torch.no_grad():
        _, maps = network(torch.rand(1, 3, 2**levels, 2**levels), maps=network.MAPS)
    assert {name: value.shape[1] for name, value in maps.items()} == network.map_channels
    assert tuple(maps) == network.MAPS


def test_one_map_alone_and_an_unknown_one() -> None:
    network = UNetGenerator(2, 3).eval()
    image = torch.rand(1, 3, 8, 16)
    result, maps = network(image, maps=("up2",))
    assert list(maps) == ["up2"]
    assert isinstance(network(image), Tensor)
    assert torch.equal(network(image), result)
    with pytest.raises(UserError, match="with 3 levels has no feature map 'down5'"):
        network(image, maps=("down5",))


def test_later_layers_leave_the_maps_alone_and_gradients_flow_through_them() -> None:
    network = visible(UNetGenerator(6, 3).double())  # wide enough that no ReLU kills a whole level
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name in network.MAPS:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].clone()})
        )
    result, maps = network(image, maps=network.MAPS)
    assert all(torch.equal(maps[name], seen[name]) for name in network.MAPS)
    (result.mean() + sum(value.square().mean() for value in maps.values())).backward()
    assert [name for name, p in network.named_parameters() if not p.grad.abs().sum()] == []
    network.zero_grad()
    network(image, maps=("down3",))[1]["down3"].square().mean().backward()
    touched = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"down1", "down2"}


@pytest.mark.parametrize(
    ("levels", "size", "message"),
    [
        (8, (256, 200), "multiples of 256, not 256x200; nearest: 256x256; or set levels to 3"),
        (8, (700, 300), "not 700x300; nearest: 512x256 or 768x512; or set levels to 2"),
        (3, (12, 13), "multiples of 8, not 12x13; nearest: 8x8 or 16x16"),
        (8, (128, 128), "nearest: 256x256; or set levels to 7"),
    ],
)
def test_sizes_that_do_not_fit(levels: int, size: tuple[int, int], message: str) -> None:
    network = UNetGenerator(1, levels)
    network.check_size(256, 512)
    for refused in (lambda: network.check_size(*size), lambda: network(torch.zeros(1, 3, *size))):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).startswith(f"UNetGenerator with {levels} levels takes images")
        assert str(caught.value).endswith(message)
