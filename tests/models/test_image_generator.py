"""What holds for every image-to-image generator: building by name, first weights, memory formats, copies, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.models.discriminator import PatchDiscriminator, Projection
from hpcdistill.models.image_generator import ImageGenerator, build_generator, init_gan
from hpcdistill.models.registry import load_generator, load_weights, save_generator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.unet_generator import UNetGenerator


def fresh(kind: str) -> nn.Module:
    return {
        "resnet": lambda: ResNetGenerator(32, 2, separable=True),
        "unet": lambda: UNetGenerator(32, 5),
        "discriminator": lambda: PatchDiscriminator(6, 32, "batch"),
        "projection": lambda: Projection(512, 400),
    }[kind]()


@pytest.mark.parametrize("kind", ["resnet", "unet", "discriminator", "projection"])
def test_initial_values_are_cyclegans(kind: str) -> None:
    torch.manual_seed(11)
    network = fresh(kind)
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    weights = torch.cat([layer.weight.detach().flatten() for layer in network.modules() if isinstance(layer, kinds)])
    assert weights.mean().item() == pytest.approx(0, abs=5 * 0.02 / len(weights) ** 0.5)
    assert weights.std().item() == pytest.approx(0.02, rel=5 / (2 * len(weights)) ** 0.5)
    gains = [layer.weight.detach() for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert bool(gains) == (kind != "resnet")
    if gains:
        gain = torch.cat(gains)
        assert gain.mean().item() == pytest.approx(1, abs=5 * 0.02 / len(gain) ** 0.5)
        assert gain.std().item() == pytest.approx(0.02, rel=5 / (2 * len(gain)) ** 0.5)
    assert not any(parameter.any() for name, parameter in network.named_parameters() if name.endswith("bias"))


def test_initial_values_follow_the_seed_and_each_layer_has_its_own() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network = UNetGenerator(4, 3)
        before = torch.get_rng_state()
        init_gan(network)
        assert not torch.equal(before, torch.get_rng_state())
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["down1.0.weight"], states[2]["down1.0.weight"])
    layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Linear(3, 4), nn.ConvTranspose2d(2, 2, 3))
    torch.manual_seed(5)
    init_gan(layers)
    torch.manual_seed(5)
    expected = [torch.empty(shape).normal_(0, 0.02) for shape in ((2, 2, 3, 3), (4, 3), (2, 2, 3, 3))]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, expected, strict=True))


def test_a_spectral_weight_is_drawn_before_its_normalisation() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(60, 40))
    init_gan(layer)
    layer.eval()  # the singular vectors stay what init_gan left
    original = layer.parametrizations.weight.original.detach()
    assert original.std().item() == pytest.approx(0.02, rel=0.1)
    assert np.linalg.norm(layer.weight.detach().numpy(), 2) == pytest.approx(1, abs=0.03)
    assert layer.parametrizations.weight.training is False
    assert not layer.bias.any()


# --- by name, saved and loaded ---------------------------------------------------------------------------------------


def test_build_by_name() -> None:
    network = build_generator("resnet", ngf=4, blocks=2, separable=True)
    assert isinstance(network, ResNetGenerator)
    assert network.arguments == {"ngf": 4, "blocks": 2, "separable": True, "channels_in": 3, "channels_out": 3}
    assert isinstance(build_generator("unet", ngf=4, levels=3), UNetGenerator)
    assert network.takes == "image"
    with pytest.raises(UserError, match="unknown generator 'resnets'; did you mean 'resnet'"):
        build_generator("resnets")
    with pytest.raises(UserError, match="generator 'unet': got an unexpected keyword argument 'blocks'"):
        build_generator("unet", blocks=3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {"ngf": 3, "blocks": 2}),
        ("resnet", {"ngf": 3, "blocks": 4, "separable": True, "channels_in": 1, "channels_out": 2}),
        ("unet", {"ngf": 3, "levels": 3, "channels_in": 1}),
    ],
)
def test_saved_and_rebuilt(name: str, arguments: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = build_generator(name, **arguments)
    image = torch.rand(2, generator.channels_in, 16, 8) * 2 - 1
    generator.train()(image)  # moves BatchNorm's statistics, which are saved too
    save_generator(generator, tmp_path / "g.safetensors", {"direction": "a2b"})
    loaded, notes = load_generator(tmp_path / "g.safetensors")
    assert notes == {"direction": "a2b"}
    assert type(loaded) is type(generator)
    assert loaded.arguments == generator.arguments
    assert loaded.DISTILLED == generator.DISTILLED
    assert not loaded.training
    assert torch.equal(loaded(image), generator.deploy()(image))
    save_generator(loaded, tmp_path / "again.safetensors", notes)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "g.safetensors").read_bytes()


def test_weights_of_another_depth_are_refused() -> None:
    with pytest.raises(UserError, match="not the weights of this UNetGenerator: "):
        load_weights(
            build_generator("unet", ngf=2, levels=4), build_generator("unet", ngf=2, levels=3).state_dict(), "x"
        )


# --- whatever its layers are -----------------------------------------------------------------------------------------

NETWORKS = [
    (ResNetGenerator, {"blocks": 2, "separable": False}),
    (ResNetGenerator, {"blocks": 2, "separable": True}),
    (UNetGenerator, {"levels": 4}),
]


@pytest.mark.parametrize(("kind", "arguments"), NETWORKS)
def test_channels_last_and_half_precision(kind: type[ImageGenerator], arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = kind(ngf=8, **arguments)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = network(image)
    last = network.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, maps = network(image, maps=network.MAPS[-1:])
        loss = half.float().square().mean() + maps[network.MAPS[-1]].float().mean()
    loss.backward()
    assert (half.float() - expected).abs().mean() < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("network", [ResNetGenerator(1, 1, True, 1, 1), UNetGenerator(1, 3, 1, 1)])
def test_gradients_of_image_and_maps_are_numerically_right(network: ImageGenerator) -> None:
    torch.manual_seed(3)
    for parameter in network.double().eval().parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)

    def everything(x: Tensor) -> list[Tensor]:
        result, maps = network(x, maps=network.MAPS)
        return [result, *maps.values()]

    assert torch.autograd.gradcheck(everything, (image,))


@pytest.mark.parametrize(("kind", "arguments"), NETWORKS)
def test_deploy_is_a_copy_in_eval_mode(kind: type[ImageGenerator], arguments: dict[str, Any]) -> None:
    network = kind(ngf=2, **arguments).train()
    deployed = network.deploy()
    image = torch.rand(1, 3, 16, 16)
    assert network.training
    assert not deployed.training
    assert torch.equal(deployed(image), network.eval()(image))
    assert not {id(parameter) for parameter in network.parameters()} & {id(p) for p in deployed.parameters()}
    assert deployed.arguments == network.arguments


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((ResNetGenerator, key) for key in ("ngf", "blocks", "channels_in", "channels_out")),
        *((UNetGenerator, key) for key in ("ngf", "levels", "channels_in", "channels_out")),
    ],
)
def test_impossible_arguments(kind: type[ImageGenerator], key: str) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__}: {key} is 0; give 1 or more"):
        kind(**{key: 0})


def test_a_single_level_is_refused() -> None:
    with pytest.raises(UserError, match="levels is 1; give 2 or more"):
        UNetGenerator(levels=1)
