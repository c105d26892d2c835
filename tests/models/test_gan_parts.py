"""Initial weights, projection, spectral classifier, building by name, saving: what the GAN networks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpcdistill.errors import UserError
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.generators import build_generator
from hpcdistill.models.initialisation import init_gan
from hpcdistill.models.projection import Projection
from hpcdistill.models.registry import load_generator, load_weights, save_generator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.spectral_classifier import SpectralClassifier
from hpcdistill.models.unet_generator import UNetGenerator
from hpcdistill.training.optimization import Freezer


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


# --- spectral classifier ---------------------------------------------------------------------------------------------


def test_spectral_classifier_by_hand() -> None:
    torch.manual_seed(2)
    classifier = SpectralClassifier(43).double()
    with torch.no_grad():
        classifier.linear.bias.fill_(0.7)
        classifier.linear.parametrizations.weight.original.mul_(9)
    profile = np.random.default_rng(0).random((5, 43))
    weight = classifier.linear.parametrizations.weight.original.detach().numpy()
    assert weight.shape == (1, 43)
    expected = profile @ (weight / np.linalg.norm(weight)).T + 0.7
    result = classifier(torch.from_numpy(profile))
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-10)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 44


def test_spectral_classifier_stays_in_float32_and_passes_gradients() -> None:
    classifier = SpectralClassifier(8)
    profile = torch.rand(2, 8, requires_grad=True)
    plain = classifier.eval()(profile)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = classifier(profile)
        from_half = classifier(profile.bfloat16())
    assert result.dtype == from_half.dtype == torch.float32
    assert torch.equal(result, plain)
    result.sum().backward()
    # the gradient of a linear function is its weight, of length 1
    assert profile.grad[0].norm().item() == pytest.approx(1, rel=1e-5)


def test_a_frozen_pass_moves_no_spectral_state() -> None:
    torch.manual_seed(0)
    modules = {"other": nn.Linear(2, 2), "discriminator": SpectralClassifier(9)}
    classifier = modules["discriminator"]
    with torch.no_grad():
        classifier.linear.parametrizations.weight.original.normal_()  # the singular vectors are behind now
    freezer = Freezer(modules)
    profile = torch.rand(3, 9)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    freezer.only("other")
    classifier(profile)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    freezer.only("discriminator")
    classifier(profile)
    assert any(not torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


# --- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_projection_by_hand(training: bool) -> None:
    torch.manual_seed(4)
    projection = Projection(5, 3).double().train(training)
    for parameter in projection.parameters():
        nn.init.normal_(parameter)
    nn.init.uniform_(projection.body[1].running_var, 0.5, 2)
    features = np.random.default_rng(1).normal(size=(2, 5, 4, 3))
    state = {name: value.clone().numpy() for name, value in projection.state_dict().items()}
    with torch.no_grad():
        result = projection(torch.from_numpy(features))
    mixed = np.einsum("oi,bihw->bohw", state["body.0.weight"][:, :, 0, 0], features)
    mean, variance = state["body.1.running_mean"], state["body.1.running_var"]
    if training:
        mean, variance = mixed.mean((0, 2, 3)), mixed.var((0, 2, 3))
    column = (slice(None), None, None)
    scaled = (mixed - mean[column]) / np.sqrt(variance[column] + 1e-5) * state["body.1.weight"][column]
    expected = np.maximum(scaled + state["body.1.bias"][column], 0)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert (expected > 0).any()
    assert sum(parameter.numel() for parameter in projection.parameters()) == 5 * 3 + 2 * 3


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
