"""CycleGAN's generator: its published size, its function written out by hand, its maps and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import image_cost
from hpcdistill.models.resnet_generator import ResidualBlock, ResNetGenerator

SIDE = 256


def visible(network: torch.nn.Module) -> torch.nn.Module:
    """Weights and biases of a size that a test can see."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("ngf", "separable", "params", "macs", "true_macs"),
    [(64, False, 11.378, 56.799, 49.55), (64, True, 1.987, 18.314, 11.07), (16, True, 0.1373, 1.4077, 0.955)],
)
def test_published_counts(ngf: int, separable: bool, params: float, macs: float, true_macs: float) -> None:
    counted = image_cost(ResNetGenerator(ngf, separable=separable))
    assert counted.params / 1e6 == pytest.approx(params, abs=10.0 ** -(4 if params < 1 else 3) / 2)
    assert counted.macs / 1e9 == pytest.approx(macs, abs=10.0 ** -(4 if macs < 2 else 3) / 2 * 1.01)
    assert counted.true_macs / 1e9 == pytest.approx(true_macs, abs=5e-3 if true_macs > 1 else 5e-4)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize(("ngf", "blocks", "inputs", "outputs"), [(16, 9, 3, 3), (5, 4, 1, 2)])
def test_counts_by_hand(separable: bool, ngf: int, blocks: int, inputs: int, outputs: int) -> None:
    d = 4 * ngf
    # (kernel area * inputs per output, outputs) of each convolution, with the share of the image's pixels it has
    inside = [(9, d), (d, d)] * 2 if separable else [(9 * d, d)] * 2
    ends = [(49 * inputs, ngf, 1), (9 * ngf, 2 * ngf, 4), (18 * ngf, d, 16), (49 * ngf, outputs, 1)]
    ups = [(9 * d, 2 * ngf, 4), (18 * ngf, ngf, 1)]  # shares of the output; the input's is four times smaller
    layers = [*ends, *((reads, out, 16) for reads, out in inside * blocks)]
    pixels = SIDE * SIDE
    convolutions = sum(reads * out * pixels // share for reads, out, share in layers)
    counted = image_cost(ResNetGenerator(ngf, blocks, separable, inputs, outputs))
    assert counted.params == sum((reads + 1) * out for reads, out, _ in [*layers, *ups])
    assert counted.macs == convolutions + sum(reads * out * pixels // share for reads, out, share in ups)
    assert counted.true_macs == convolutions + sum(reads * out * pixels // share // 4 for reads, out, share in ups)


def test_a_block_by_layer() -> None:
    def kinds(separable: bool) -> list[tuple[object, ...]]:
        block = ResidualBlock(8, separable)
        return [
            (layer.kernel_size[0], layer.groups, layer.padding_mode, layer.bias is not None)
            if isinstance(layer, torch.nn.Conv2d)
            else type(layer).__name__
            for layer in block.body
        ]

    norm, dense = "InstanceNorm2d", (3, 1, "reflect", True)
    depthwise, pointwise = (3, 8, "reflect", True), (1, 1, "zeros", True)
    assert kinds(False) == [dense, norm, "ReLU", dense, norm]
    assert kinds(True) == [depthwise, norm, pointwise, norm, "ReLU", depthwise, norm, pointwise, norm]
    assert sum(parameter.numel() for parameter in ResidualBlock(8, False).parameters()) == 2 * (9 * 64 + 8)
    assert sum(parameter.numel() for parameter in ResidualBlock(8, True).parameters()) == 2 * (64 + 11 * 8)


def by_hand(image: Tensor, state: dict[str, Tensor], blocks: int, separable: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The layers of fesd.md, section 1, from a state dict; uses up its entries."""

    def wrapped(features: Tensor, margin: int) -> Tensor:
        """Reflected at the border without repeating it, by indices."""
        height, width = features.shape[-2:]

        def places(side: int) -> list[int]:
            period = 2 * (side - 1)
            return [min(place % period, period - place % period) for place in range(-margin, side + margin)]

        return features[..., places(height), :][..., places(width)]

    def norm(features: Tensor) -> Tensor:
        centred = features - features.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()

    def conv(name: str, features: Tensor, **options: int) -> Tensor:
        bias = state.pop(f"{name}.bias")[:, None, None]
        return functional.conv2d(features, state.pop(f"{name}.weight"), **options) + bias

    def depthwise(name: str, features: Tensor) -> Tensor:
        weight, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
        return torch.cat(
            [functional.conv2d(features[:, [c]], weight[[c]]) + bias[c] for c in range(features.shape[1])], dim=1
        )

    def enlarged(name: str, features: Tensor) -> Tensor:
        """Zeros between the values, then a convolution with the turned kernel: padding 1 before and 2 after."""
        weight = state.pop(f"{name}.weight").transpose(0, 1).flip(2, 3)
        batch, channels, height, width = features.shape
        canvas = features.new_zeros(batch, channels, 2 * height + 2, 2 * width + 2)
        canvas[..., 1 : 2 * height + 1 : 2, 1 : 2 * width + 1 : 2] = features
        return functional.conv2d(canvas, weight) + state.pop(f"{name}.bias")[:, None, None]

    def half(name: str, first: int, features: Tensor) -> Tensor:
        padded = wrapped(features, 1)
        if not separable:
            return norm(conv(f"{name}.body.{first}", padded))
        return norm(conv(f"{name}.body.{first + 2}", norm(depthwise(f"{name}.body.{first}", padded))))

    features = norm(conv("stem.0", wrapped(image, 3))).clamp(min=0)
    for name in ("down1", "down2"):
        features = norm(conv(f"{name}.0", functional.pad(features, (1, 1, 1, 1)), stride=2)).clamp(min=0)
    maps = {"down2": features}
    second = 5 if separable else 3
    for block in range(1, blocks + 1):
        name = f"block{block}"
        features = features + half(name, second, half(name, 0, features).clamp(min=0))
        maps[name] = features
    for name in ("up1", "up2"):
        features = norm(enlarged(f"{name}.0", features)).clamp(min=0)
    return torch.tanh(conv("head.0", wrapped(features, 3))), maps


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (20, 16)])
def test_forward_by_hand(separable: bool, size: tuple[int, int]) -> None:
    network = visible(ResNetGenerator(3, 2, separable, channels_in=2, channels_out=1).double())
    image = torch.rand(2, 2, *size, dtype=torch.float64) * 2 - 1
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected, expected_maps = by_hand(image, state, 2, separable)
    assert not state, "the reference used every weight"
    for mode in (True, False):  # no layer behaves differently in training
        with torch.no_grad():
            result, maps = network.train(mode)(image, maps=network.MAPS)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-10, atol=1e-10)
    assert result.abs().max() <= 1


def test_maps_their_shapes_and_names() -> None:
    network = ResNetGenerator(4, separable=True)
    assert network.DISTILLED == ResNetGenerator.DISTILLED == ("down2", "block3", "block6", "block9")
    assert network.MAPS == ResNetGenerator.MAPS == ("down2", *(f"block{block}" for block in range(1, 10)))
    image = torch.rand(1, 3, 24, 32) * 2 - 1
    result, maps = network(image, maps=("block9", "down2"))
    assert {name: tuple(value.shape) for name, value in maps.items()} == dict.fromkeys(
        ("down2", "block9"), (1, 16, 6, 8)
    )
    assert network.map_channels == dict.fromkeys(network.MAPS, 16)
    assert result.shape == image.shape
    plain = network(image)
    assert isinstance(plain, Tensor)
    assert torch.equal(plain, result)
    with pytest.raises(UserError, match=r"no feature map 'blok3'; did you mean 'block3'\? \(all: down2, block1"):
        network(image, maps=("blok3",))


@pytest.mark.parametrize(
    ("blocks", "distilled"), [(6, (2, 4, 6)), (3, (1, 2, 3)), (4, (2, 3, 4)), (2, (1, 2)), (1, (1,))]
)
def test_fewer_blocks_distil_after_each_third(blocks: int, distilled: tuple[int, ...]) -> None:
    network = ResNetGenerator(2, blocks)
    assert ("down2", *(f"block{block}" for block in distilled)) == network.DISTILLED
    assert network.MAPS[-1] == f"block{blocks}"


def test_later_layers_leave_the_maps_alone_and_gradients_flow_through_them() -> None:
    network = visible(ResNetGenerator(2, 3, separable=True).double())
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name in network.MAPS:
        network.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[2].clone()}))
    result, maps = network(image, maps=network.MAPS)
    assert all(torch.equal(maps[name], seen[name]) for name in network.MAPS)
    (result.mean() + sum(value.square().mean() for value in maps.values())).backward()
    # The biases before a normalisation cancel: their gradients are rounding noise.
    assert [n for n, p in network.named_parameters() if n.endswith("weight") and not p.grad.abs().sum() > 1e-9] == []
    network.zero_grad()
    network(image, maps=("block1",))[1]["block1"].square().mean().backward()
    touched = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"stem", "down1", "down2", "block1"}


def test_an_image_does_not_depend_on_its_batch() -> None:
    network = visible(ResNetGenerator(4, 1).double())
    images = torch.rand(3, 3, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        together, alone = network(images), [network(image[None]) for image in images]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "nearest"), [((10, 16), "8x16 or 12x16"), ((3, 9), "8x8 or 8x12"), ((4, 8), "8x8")])
def test_sizes_that_do_not_fit(size: tuple[int, int], nearest: str) -> None:
    network = ResNetGenerator(2, 1)
    network.check_size(8, 12)
    for refused in (lambda: network.check_size(*size), lambda: network(torch.zeros(1, 3, *size))):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).endswith(f"multiples of 4 of at least 8, not {size[0]}x{size[1]}; nearest: {nearest}")
