"""The PatchGAN, the spectral classifier and the projection: functions by hand, activations, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import image_cost
from hpcdistill.models.discriminator import PatchDiscriminator, Projection, SpectralClassifier
from hpcdistill.training.optimization import Freezer


def visible(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def test_cyclegans_size_by_hand() -> None:
    layers = [(3, 64, 128), (64, 128, 64), (128, 256, 32), (256, 512, 31), (512, 1, 30)]  # in, out, side of the output
    counted = image_cost(PatchDiscriminator())
    assert counted.params == sum(16 * a * b + b for a, b, _ in layers) == 2_764_737
    assert counted.macs == counted.true_macs == sum(16 * a * b * side**2 for a, b, side in layers)


def test_pix2pixs_size_by_hand() -> None:
    layers = [(6, 128), (128, 256), (256, 512), (512, 1024), (1024, 1)]
    network = PatchDiscriminator(6, 128, "batch")
    weights = sum(16 * a * b for a, b in layers)
    # biases in the first and in the last convolution, weight and bias of three norms
    assert sum(p.numel() for p in network.parameters()) == weights + 128 + 1 + 2 * (256 + 512 + 1024) == 11_042_433
    assert image_cost(network).params == 11_042_433


def by_hand(image: Tensor, state: dict[str, Tensor], norm: str, strided: int) -> tuple[Tensor, list[Tensor]]:
    """Logits and the activations, each norm over its own axes; uses up the state dict's entries."""
    features, activations = image, []
    for k in range(1, strided + 2):
        weight = state.pop(f"layer{k}.0.weight")
        features = functional.conv2d(functional.pad(features, (1, 1, 1, 1)), weight, stride=2 if k <= strided else 1)
        if k == 1 or norm == "instance":
            features = features + state.pop(f"layer{k}.0.bias")[:, None, None]
        if k > 1:
            axes = (0, 2, 3) if norm == "batch" else (2, 3)
            features = features - features.mean(axes, keepdim=True)
            features = features / (features.square().mean(axes, keepdim=True) + 1e-5).sqrt()
            if norm == "batch":
                features = features * state.pop(f"layer{k}.1.weight")[:, None, None]
                features = features + state.pop(f"layer{k}.1.bias")[:, None, None]
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    del state[f"layer{k}.1.{name}"]
        features = torch.where(features > 0, features, 0.2 * features)
        activations.append(features)
    logits = functional.conv2d(functional.pad(features, (1, 1, 1, 1)), state.pop("logit.weight"))
    return logits + state.pop("logit.bias")[:, None, None], activations


@pytest.mark.parametrize(
    ("norm", "layers", "size"), [("instance", 3, (24, 33)), ("batch", 3, (32, 24)), ("batch", 1, (7, 6))]
)
def test_forward_and_activations_by_hand(norm: str, layers: int, size: tuple[int, int]) -> None:
    network = visible(PatchDiscriminator(2, 3, norm, layers).double())
    image = torch.rand(2, 2, *size, dtype=torch.float64)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected, activations = by_hand(image, state, norm, layers)
    assert not state, "the reference used every weight"
    with torch.no_grad():
        torch.testing.assert_close(network(image), expected, rtol=1e-10, atol=1e-10)
        for k, activation in enumerate(activations, 1):
            result = network.activations(image, k)
            torch.testing.assert_close(result, activation, rtol=1e-10, atol=1e-10)
            assert result.shape[1] == network.activation_channels[k]
        assert torch.equal(network.activations(image), network.activations(image, layers + 1))


def test_a_logit_sees_70_pixels() -> None:
    network = visible(PatchDiscriminator(1, 2, "batch").double()).eval()  # no statistics of the whole image
    image = torch.rand(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    rows, columns = image.grad[0, 0].nonzero(as_tuple=True)
    assert [int(axis.max() - axis.min()) + 1 for axis in (rows, columns)] == [70, 70]


def test_a_feature_map_enters_where_an_image_would() -> None:
    network = PatchDiscriminator(3, 4)
    assert network.activations(torch.rand(2, 3, 64, 64)).shape == (2, 32, 7, 7)
    assert network(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_activations_compute_nothing_behind_them() -> None:
    network = PatchDiscriminator(3, 2)

    def refuse(*_: object) -> None:
        raise AssertionError("a later layer was computed")

    network.layer4.register_forward_pre_hook(refuse)
    network.logit.register_forward_pre_hook(refuse)
    assert network.activations(torch.rand(1, 3, 32, 32), 3).shape == (1, 8, 4, 4)


def test_halves_may_go_through_as_one_batch_with_instance_norm_only() -> None:
    images = torch.rand(4, 3, 24, 24, dtype=torch.float64)
    for norm, alike in (("instance", True), ("batch", False)):
        network = visible(PatchDiscriminator(3, 2, norm).double())
        with torch.no_grad():
            separate = torch.cat([network(half) for half in images.chunk(2)])
            assert torch.allclose(network(images), separate, rtol=1e-10, atol=1e-10) == alike


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_gradients_channels_last_and_half_precision(norm: str) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 8, norm)
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    expected = network(image)
    expected.square().mean().backward()
    assert image.grad.abs().sum() > 0
    assert [n for n, p in network.named_parameters() if n.endswith("weight") and not p.grad.abs().sum()] == []
    last = network.to(memory_format=torch.channels_last)(image.detach().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(image.detach())
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.02


def test_what_it_refuses() -> None:
    network = PatchDiscriminator(3, 2)
    network.check_size(24, 24)
    assert network(torch.rand(1, 3, 24, 25)).shape == (1, 1, 1, 1)
    for refused in (lambda: network.check_size(23, 64), lambda: network(torch.rand(1, 3, 23, 64))):
        with pytest.raises(UserError, match="with 3 layers takes 24x24 pixels or more, not 23x64; enlarge"):
            refused()
    for k in (0, 5, -1):
        with pytest.raises(UserError, match=f"no activation {k}; valid: 1 to 4"):
            network.activations(torch.rand(1, 3, 24, 24), k)
    with pytest.raises(UserError, match="norm is 'batchnorm'; did you mean 'batch'"):
        PatchDiscriminator(norm="batchnorm")
    with pytest.raises(UserError, match="ndf is 0; give 1 or more"):
        PatchDiscriminator(ndf=0)


# The spectral classifier and the projection.


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
