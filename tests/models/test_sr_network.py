"""What holds for every network F: shapes, maps, inference form, saving, and being the teacher's F."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpcdistill.errors import UserError
from hpcdistill.models import NETWORKS
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.idn import IDN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import METADATA_KEY, load_generator, save_generator
from hpcdistill.models.sr_network import SRNetwork, build_network

ALL = sorted(NETWORKS)


def visible(network: torch.nn.Module) -> torch.nn.Module:
    """Last layers start near zero; give them values that tests can see."""
    torch.manual_seed(7)
    for name, parameter in network.named_parameters():
        if "upsampling" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def build(name: str, scale: int, channels: int = 1) -> SRNetwork:
    network = visible(build_network(name, scale, channels))
    assert isinstance(network, SRNetwork)
    return network


def test_the_names() -> None:
    assert set(NETWORKS) == {"fsrcnn", "vdsr", "idn"}
    assert type(build_network("idn", 4)) is IDN
    subpixel = build_network("idn", 4, upsampling="subpixel")
    assert (subpixel.arguments["upsampling"], subpixel.training) == ("subpixel", True)
    with pytest.raises(UserError, match="unknown network 'vsdr'; did you mean 'vdsr'"):
        build_network("vsdr", 4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_maps(name: str, scale: int, channels: int) -> None:
    network = build(name, scale, channels)
    assert (network.scale, network.channels, network.takes) == (scale, channels, "lr")
    image = torch.rand(2, channels, 7, 6)
    result, maps = network(image, maps=network.MAPS)
    assert result.shape == (2, channels, 7 * scale, 6 * scale)
    assert torch.equal(result, network(image))
    assert list(maps) == list(network.MAPS) == list(network.map_channels)
    size = (7 * scale, 6 * scale) if name == "vdsr" else (7, 6)
    for layer, features in maps.items():
        assert features.shape == (2, network.map_channels[layer], *size)
        assert torch.equal(features, network.features(image, layer))
    assert network.MAPS[-1] == network.DISTILLED
    _, one = network(image, maps=(network.DISTILLED,))
    assert list(one) == [network.DISTILLED]
    assert one[network.DISTILLED].requires_grad


@pytest.mark.parametrize("name", ALL)
def test_features_computes_nothing_behind_the_layer(name: str) -> None:
    network = build(name, 2)

    def refuse(*_: object) -> None:
        raise AssertionError("computed behind the layer")

    for child in (network.get_submodule(network.MAPS[-1]), list(network.children())[-1]):
        child.register_forward_pre_hook(refuse)
    network.features(torch.rand(1, 1, 4, 4), network.MAPS[-2])
    with pytest.raises(AssertionError, match="behind"):
        network.features(torch.rand(1, 1, 4, 4), network.MAPS[-1])


@pytest.mark.parametrize("name", ALL)
def test_unknown_map_names_the_network_and_the_valid_ones(name: str) -> None:
    network = build(name, 2)
    for call in (lambda: network(torch.rand(1, 1, 4, 4), maps=("no",)), lambda: network.features(torch.rand(1), "no")):
        with pytest.raises(
            UserError, match=f"{type(network).__name__} has no feature map 'no'; valid: .*{network.MAPS[-1]}"
        ):
            call()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_deploy_is_the_same_function_in_a_copy(
    name: str, scale: int, channels: int, dtype: torch.dtype, tolerance: float
) -> None:
    network = build(name, scale, channels).to(dtype).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    deployed = network.deploy()
    assert (network.training, deployed.training) == (True, False)
    assert not any(isinstance(module, torch.nn.ConvTranspose2d) for module in deployed.modules())
    image = torch.rand(2, channels, 11, 9, dtype=dtype)
    with torch.no_grad():
        expected, result = network(image), deployed(image)
        assert torch.equal(deployed.deploy()(image), result)
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    if name != "vdsr":
        assert (network.arguments["upsampling"], deployed.arguments["upsampling"]) == ("transposed", "subpixel")
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", ["network", "deployed", "teacher", "deployed teacher"])
def test_saved_and_loaded_again(name: str, form: str, tmp_path: Path) -> None:
    teacher = visible(PrivilegedTeacher(4, 3, network=name))
    generator = {
        "network": lambda: build(name, 3, 3),
        "deployed": lambda: build(name, 3, 3).deploy(),
        "teacher": lambda: teacher,
        "deployed teacher": teacher.deploy,
    }[form]()
    save_generator(generator, tmp_path / "g.safetensors", {"steps": 5})
    loaded, notes = load_generator(tmp_path / "g.safetensors")
    assert notes == {"steps": 5}
    assert type(loaded) is type(generator)
    assert loaded.arguments == generator.arguments
    image = torch.rand(1, 3, 12, 8)
    with torch.no_grad():
        assert torch.equal(loaded(image), generator.eval()(image))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_as_the_teachers_network(name: str, scale: int) -> None:
    teacher = visible(PrivilegedTeacher(scale, network=name))
    assert type(teacher.network) is NETWORKS[name]
    assert teacher.arguments["network"] == name
    assert teacher.network.training
    image = torch.rand(1, 1, 24, 24)
    output = teacher(image, supervised=True)
    assert output.sr.shape == image.shape
    assert torch.equal(output.sr, teacher.network(output.encoded[-1]))
    layer = teacher.network.DISTILLED
    assert torch.equal(teacher.features(image, layer), teacher.network.features(output.encoded[-1], layer))
    output.sr.abs().mean().backward()
    assert all(parameter.grad.any() for parameter in teacher.network.parameters() if parameter.dim() > 1)
    assert all(parameter.grad.any() for parameter in teacher.encoder.parameters() if parameter.dim() > 1)
    with torch.no_grad():
        expected, result = teacher(image), teacher.deploy()(image)
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_teacher_saved_before_there_were_other_networks_loads(tmp_path: Path) -> None:
    teacher = visible(PrivilegedTeacher(2))
    arguments = {key: value for key, value in teacher.arguments.items() if key not in ("network", "upsampling")}
    description = {"class": "PrivilegedTeacher", "arguments": arguments, "notes": {}}
    save_file(teacher.state_dict(), tmp_path / "old.safetensors", {METADATA_KEY: json.dumps(description)})
    loaded, _ = load_generator(tmp_path / "old.safetensors")
    assert type(loaded.network) is FSRCNN
    image = torch.rand(1, 1, 16, 16)
    assert torch.equal(loaded(image), teacher.eval()(image))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    description = {
        "class": "PrivilegedTeacher",
        "arguments": PrivilegedTeacher(2, network="vdsr").arguments,
        "notes": {},
    }
    metadata = {METADATA_KEY: json.dumps(description)}
    save_file(PrivilegedTeacher(2, network="idn").state_dict(), tmp_path / "g.safetensors", metadata)
    with pytest.raises(
        UserError, match=r"not the weights of this PrivilegedTeacher: network\.conv1\.0\.weight is missing"
    ):
        load_generator(tmp_path / "g.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build(name, 2)
    network(torch.rand(2, 1, 8, 8)).abs().mean().backward()
    assert [key for key, parameter in network.named_parameters() if not parameter.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vdsr", {"scale": 0}, "VDSR: scale is 0; give 1 or more"),
        ("fsrcnn", {"scale": 2, "channels": 0}, "FSRCNN: channels is 0"),
        ("fsrcnn", {"scale": 2, "upsampling": "transpose"}, "did you mean 'transposed'"),
        ("idn", {"scale": 2, "channels": -1}, "IDN: channels is -1"),
        ("idn", {"scale": 2, "upsampling": "subpixels"}, "IDN: upsampling is 'subpixels'; did you mean 'subpixel'"),
    ],
)
def test_impossible_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NETWORKS[name](**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_on_cuda_as_on_the_cpu(name: str) -> None:
    network = build(name, 4).double()
    image = torch.rand(1, 1, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        expected, result = network(image), network.cuda()(image.cuda()).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_half_precision_stays_half_precision(name: str, residual: str) -> None:
    network = visible(build_network(name, 2, residual=residual)).to(torch.bfloat16)
    assert network(torch.rand(1, 1, 6, 6).to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_one_exported_program_for_every_size(name: str, residual: str) -> None:
    """No Python in a forward pass looks at an image's size: what exporters stumble over."""
    network = visible(build_network(name, 3, residual=residual)).deploy()
    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(network, (torch.rand(1, 1, 6, 7),), dynamic_shapes=(sizes,))
    image = torch.rand(1, 1, 9, 4)
    torch.testing.assert_close(program.module()(image), network(image), rtol=0, atol=1e-6)
