"""Layers that are trained wide: against their own stages, run one after the other, and against the plain layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import super_resolution_cost
from hpcdistill.models.collapsible import Form, collapse, expand, is_expanded
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.sr_network import build_network

FORMS: list[Form] = ["linear", "edge", "bottleneck"]
WIDE = {"width": 64, "repeats": 2}


def layers() -> list[nn.Conv2d | nn.ConvTranspose2d]:
    """Of FSRCNN's kinds, and a strided one; float64, so that only a wrong formula differs."""
    torch.manual_seed(0)
    kinds = [
        nn.Conv2d(1, 7, 5, padding=2),
        nn.Conv2d(7, 7, 3, padding=1),
        nn.Conv2d(7, 4, 1),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.ConvTranspose2d(7, 2, 9, stride=4, padding=4, output_padding=3),
    ]
    return [layer.double() for layer in kinds]


def originals(layer: nn.Module) -> list[Tensor]:
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return [tensor for name, tensor in chain.named_parameters() if name.startswith("original")]


def in_stages(layer: nn.Conv2d, form: Form, image: Tensor) -> Tensor:
    """What SESR's and ECBSR's blocks and the bottlenecks compute, layer by layer, without the bias."""
    options: Any = {"stride": layer.stride, "padding": layer.padding}
    weights = originals(layer)
    if form == "linear":
        outer, inner = weights
        return functional.conv2d(functional.conv2d(image, inner, **options), outer[:, :, None, None])
    if form == "bottleneck":
        outer, middle, inner = weights
        repeats, width = WIDE["repeats"], WIDE["width"]
        outer = outer.unflatten(1, (repeats, width)).transpose(0, 1)
        middle, inner = middle.unflatten(0, (repeats, width)), inner.unflatten(0, (repeats, width))
        branches = []
        for number in range(repeats):
            narrow = functional.conv2d(image, inner[number][:, :, None, None])
            wide = functional.conv2d(narrow, middle[number], **options)
            branches.append(functional.conv2d(wide, outer[number][:, :, None, None]))
        return torch.stack(branches).sum(0)
    plain, inner, outer, *masked = weights
    result = functional.conv2d(image, plain, **options)
    result = result + functional.conv2d(functional.conv2d(image, inner[:, :, None, None]), outer, **options)
    if not masked:
        return result
    scales, mixing = masked
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=image.dtype)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=image.dtype)
    for mask, scale, mix in zip((sobel, sobel.T, laplace), scales, mixing, strict=True):
        mixed = functional.conv2d(image, mix[:, :, None, None])
        depthwise = mask.expand(len(scale), 1, 3, 3) * scale[:, None, None, None]
        result = result + functional.conv2d(mixed, depthwise, groups=len(scale), **options)
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(4))
def test_it_computes_its_stages_borders_included(form: Form, number: int) -> None:
    layer = layers()[number]
    assert isinstance(layer, nn.Conv2d)
    expand(layer, form, **WIDE, skip=False)
    for tensor in originals(layer):  # anything, not only what starts near the plain layer
        nn.init.normal_(tensor)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    image = torch.rand(2, layer.in_channels, 9, 6, dtype=torch.float64)
    expected = in_stages(layer, form, image)
    torch.testing.assert_close(layer(image), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(5))
def test_it_starts_as_the_plain_layer_and_collapses_into_it(form: Form, number: int) -> None:
    plain, layer = layers()[number], layers()[number]
    expand(layer, form, **WIDE, skip=False)
    torch.testing.assert_close(layer.weight, plain.weight, rtol=0, atol=1e-12)
    holder = nn.Sequential(layer).float()
    wide = holder[0].weight.detach().clone()
    collapse(holder)
    assert type(holder[0]) is type(plain)
    assert not is_expanded(holder[0])
    assert [name for name, _ in holder[0].named_parameters()] == [name for name, _ in plain.named_parameters()]
    image = torch.rand(1, plain.in_channels, 8, 8)
    torch.testing.assert_close(holder[0].weight, wide, rtol=0, atol=1e-6)
    torch.testing.assert_close(holder(image), plain.float()(image), rtol=0, atol=1e-5)


def test_a_skip_adds_the_image() -> None:
    plain, layer = layers()[1], layers()[1]
    expand(layer, "linear", 64, skip=True)
    image = torch.rand(1, 7, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(image), plain(image) + image, rtol=0, atol=1e-12)
    narrowing = layers()[2]
    expand(narrowing, "linear", 64, skip=True)
    torch.testing.assert_close(narrowing.weight, layers()[2].weight, rtol=0, atol=1e-12)


def test_collapsing_a_copy_leaves_the_original_wide() -> None:
    network = build_network("fsrcnn", 2, collapse={"form": "linear", "width": 64})
    image = torch.rand(1, 1, 9, 9)
    before = network(image)
    network.deploy()
    network.collapsed()
    assert torch.equal(network(image), before)
    assert is_expanded(network.get_submodule("feature.0"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_a_trained_student_deploys_to_the_published_weights(form: Form, residual: str) -> None:
    torch.manual_seed(0)
    options = {"form": form, "width": 64, "layers": ["feature.0", "mapping.1.0", "upsampling.conv"]}
    network = build_network("fsrcnn", 4, residual=residual, collapse=options)
    image, target = torch.rand(2, 1, 7, 8), torch.rand(2, 1, 28, 32)
    adam = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(2):
        adam.zero_grad()
        (network(image) - target).abs().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        adam.step()
    network.eval()
    for narrow in (network.collapsed(), network.deploy()):
        torch.testing.assert_close(narrow(image), network(image), rtol=0, atol=1e-5)
    assert sum(parameter.numel() for parameter in network.collapsed().parameters()) == 12_644
    assert sum(parameter.numel() for parameter in network.parameters()) > 12_644
    counted = super_resolution_cost(network)
    assert counted.params == 12_644
    assert counted.true_macs == super_resolution_cost(FSRCNN(4, residual=residual)).true_macs


def test_saved_and_rebuilt(tmp_path: Any) -> None:
    torch.manual_seed(0)
    options = {"form": "bottleneck", "width": 64, "layers": ["mapping.0.0"]}
    network = build_network("fsrcnn", 3, residual="bicubic", collapse=options).eval()
    image = torch.rand(1, 1, 6, 5)
    for name, saved in (("wide", network), ("narrow", network.deploy())):
        save_generator(saved, tmp_path / name)
        rebuilt, _ = load_generator(tmp_path / name)
        assert torch.equal(rebuilt(image), saved(image))
    assert "collapse" not in load_generator(tmp_path / "narrow")[0].arguments


@pytest.mark.parametrize(
    ("collapse", "message"),
    [
        ({"form": "linear", "width": 64, "layers": ["mapping"]}, r"mapping is more than .*mapping\.0\.1 is a PReLU"),
        ({"form": "linear", "width": 64, "layers": ["featre.0"]}, "no convolution 'featre.0'; did you mean 'feature.0"),
        ({"form": "linear", "width": 20}, "20 channels are narrower than a Conv2d of 1 to 56 channels; give 56"),
    ],
)
def test_what_does_not_collapse_is_named(collapse: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network("fsrcnn", 4, collapse=collapse)
    with pytest.raises(UserError, match="in 4 groups is not trained wide"):
        build_network("idn", 4, collapse={"form": "linear", "width": 256, "layers": ["dblock1.above.1.0"]})


def test_all_layers_are_those_without_groups_and_not_transposed() -> None:
    network = build_network("idn", 4, collapse={"form": "linear", "width": 80})
    wide = {name for name, layer in network.named_modules() if is_expanded(layer)}
    assert {"fblock.0.0", "dblock1.above.0.0", "dblock4.compression.0"} <= wide
    assert not {"dblock1.above.1.0", "upsampling.conv"} & wide


def test_the_plain_layer_is_exact_of_its_kind_and_draws_nothing() -> None:
    plain = nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect").requires_grad_(False)
    expand(plain, "linear", 64, skip=False)
    plain.requires_grad_(False)
    holder = nn.Sequential(plain)
    outer, inner = (tensor.double() for tensor in originals(plain))
    image, state = torch.rand(1, 6, 9, 8), torch.get_rng_state()
    before = holder(image)
    collapse(holder)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(holder[0].weight, torch.einsum("am,mbkl->abkl", outer, inner).float())  # rounded once
    torch.testing.assert_close(holder(image), before, rtol=0, atol=1e-6)
    assert not holder[0].weight.requires_grad


def test_inner_weights_start_with_the_kernel_s_deviation() -> None:
    layer = layers()[1]
    deviation = layer.weight.square().mean().sqrt().item()
    expand(layer, "linear", 256, skip=False)
    outer, inner = originals(layer)
    assert inner.std().item() == pytest.approx(deviation, rel=0.1)
    assert outer.std().item() == pytest.approx(256**-0.5, rel=0.1)


def test_a_wide_teacher_is_saved_and_deployed(tmp_path: Any) -> None:
    torch.manual_seed(0)
    options = {"form": "linear", "width": 64}
    teacher = PrivilegedTeacher(2, residual="bicubic", collapse=options).eval()
    image = torch.rand(1, 1, 12, 16)
    for name, saved in (("wide", teacher), ("narrow", teacher.deploy())):
        save_generator(saved, tmp_path / name)
        rebuilt = load_generator(tmp_path / name)[0]
        assert torch.equal(rebuilt(image), saved(image))
        torch.testing.assert_close(rebuilt(image), teacher(image), rtol=0, atol=1e-5)
