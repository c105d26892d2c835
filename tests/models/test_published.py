"""Published generators: each built here layer by layer, under the names that its authors' files have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.models.published import LAYOUTS, read_published, read_state
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.unet_generator import UNetGenerator

RAN: list[str] = []


def named(**children: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))


def norm(channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels)


def convolution(channels_in: int, channels_out: int, separable: bool) -> nn.Module:
    """3x3 without padding of its own; GAN Compression's SeparableConv2d keeps three layers in `conv`."""
    if not separable:
        return nn.Conv2d(channels_in, channels_out, 3)
    depthwise = nn.Conv2d(channels_in, channels_in, 3, groups=channels_in)
    return named(conv=nn.Sequential(depthwise, norm(channels_in), nn.Conv2d(channels_in, channels_out, 1)))


class Block(nn.Module):
    def __init__(self, channels: int, inner: int, separable: bool, dropout: bool) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            convolution(channels, inner, separable),
            norm(inner),
            nn.ReLU(),
            *([nn.Dropout(0.0)] if dropout else []),
            nn.ReflectionPad2d(1),
            convolution(inner, channels, separable),
            norm(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv_block(features)


class Clamp(nn.Module):
    """What GAN Compression does to its input before `model`."""

    def forward(self, image: Tensor) -> Tensor:
        return image.clamp(-1, 1)


def published_resnet(widths: Sequence[int], inner: Sequence[int], separable: bool, dropout: bool = True) -> nn.Module:
    stem, down1, down2, up1, up2 = widths
    model = nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, stem, 7), norm(stem), nn.ReLU(),
        nn.Conv2d(stem, down1, 3, stride=2, padding=1), norm(down1), nn.ReLU(),
        nn.Conv2d(down1, down2, 3, stride=2, padding=1), norm(down2), nn.ReLU(),
        *(Block(down2, its, separable, dropout) for its in inner),
        nn.ConvTranspose2d(down2, up1, 3, stride=2, padding=1, output_padding=1), norm(up1), nn.ReLU(),
        nn.ConvTranspose2d(up1, up2, 3, stride=2, padding=1, output_padding=1), norm(up2), nn.ReLU(),
        nn.ReflectionPad2d(3), nn.Conv2d(up2, 3, 7), nn.Tanh(),
    )  # fmt: skip
    return named(clamp=Clamp(), model=model)


class Level(nn.Module):
    """A level of Pix2Pix's U-Net; `model` holds the level inside it as well."""

    def __init__(self, outer: int, width: int, inside: nn.Module | None, outermost: bool) -> None:
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(outer, width, 4, stride=2, padding=1, bias=False)
        up = nn.ConvTranspose2d(2 * width if inside else width, outer, 4, stride=2, padding=1, bias=outermost)
        if outermost:
            assert inside
            layers = [down, inside, nn.ReLU(), up, nn.Tanh()]
        elif inside:
            before = [nn.LeakyReLU(0.2), down, nn.BatchNorm2d(width)]
            layers = [*before, inside, nn.ReLU(), up, nn.BatchNorm2d(outer), nn.Dropout(0.5)]
        else:
            layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        made: Tensor = self.model(features)
        return made if self.outermost else torch.cat([features, made], dim=1)


def published_unet(ngf: int, levels: int) -> nn.Module:
    widths = [3, *(ngf * min(2**k, 8) for k in range(levels))]
    level: nn.Module | None = None
    for k in range(levels, 0, -1):
        level = Level(widths[k - 1], widths[k], level, k == 1)
    assert level
    return named(model=level)


def published_discriminator(channels_in: int, ndf: int, norm: Any = nn.InstanceNorm2d, layers: int = 2) -> nn.Module:
    """PatchGAN as CycleGAN's code has it: no bias before a BatchNorm."""
    widths = [ndf * min(2**k, 8) for k in range(layers + 1)]
    model = [nn.Conv2d(channels_in, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for number, (width, wider) in enumerate(pairwise(widths), 1):
        stride, bias = 2 if number < layers else 1, norm is nn.InstanceNorm2d
        model += [nn.Conv2d(width, wider, 4, stride, 1, bias=bias), norm(wider), nn.LeakyReLU(0.2)]
    return named(model=nn.Sequential(*model, nn.Conv2d(widths[-1], 1, 4, padding=1)))


def visible(network: nn.Module) -> nn.Module:
    """In eval mode, with weights and statistics of a size that a test can see."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    return network.eval()


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


# GAN Compression's sub-network of horse2zebra, 16_16_32_16_32_32_16_16, at a quarter of its widths.
COMPRESSED = ((4, 8, 32, 8, 4), (16, 16, 16, 32, 32, 32, 32, 32, 32))
EVEN = ((4, 8, 16, 8, 4), (16,) * 9)
NETWORKS = {
    "GAN Compression, compressed": lambda: published_resnet(*COMPRESSED, separable=True),
    "GAN Compression, mobile; OMGD": lambda: published_resnet(*EVEN, separable=True),
    "CycleGAN": lambda: published_resnet(*EVEN, separable=False, dropout=False),
    "GAN Compression, full": lambda: published_resnet(*EVEN, separable=False),
    "CycleGAN, six blocks": lambda: published_resnet(EVEN[0], (16,) * 6, separable=False, dropout=False),
    "pruned": lambda: published_resnet((3, 7, 12, 5, 6), (2, 9, 12, 1), separable=False, dropout=False),
    "Pix2Pix": lambda: published_unet(2, 5),
    "Pix2Pix, eight levels": lambda: published_unet(1, 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_output_as_the_published_network(name: str, tmp_path: Path) -> None:
    published = visible(NETWORKS[name]())
    side = 256 if "eight" in name else 32
    image = torch.rand(2, 3, side, side) * 2 - 1
    network, layout = read_published(saved(tmp_path / "latest_net_G.pth", published.state_dict()))
    assert layout.network == type(network).__name__ == ("UNetGenerator" if "Pix2Pix" in name else "ResNetGenerator")
    assert not network.training
    with torch.no_grad():
        expected = published(image)
        # On a CPU the layers have faster forms, the same but for rounding; the normalisations enlarge it.
        torch.testing.assert_close(network(image), expected, rtol=0, atol=5e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize(("norm", "name"), [(nn.InstanceNorm2d, "instance"), (nn.BatchNorm2d, "batch")])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_the_same_logits_as_the_published_discriminator(norm: Any, name: str, layers: int, tmp_path: Path) -> None:
    published = visible(published_discriminator(6, 2, norm, layers))
    state = published.state_dict()
    if name == "instance":
        state |= {"model.3.running_mean": torch.ones(4), "model.3.running_var": torch.ones(4)}  # from before 0.4
    network, layout = read_published(saved(tmp_path / "latest_net_D.pth", state))
    assert (layout.name, network.arguments) == (
        "patchgan",
        {"channels_in": 6, "ndf": 2, "norm": name, "layers": layers},
    )
    image = torch.rand(2, 6, 128, 128) * 2 - 1
    with torch.no_grad():
        expected = published(image)
        torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.02


def test_arguments_are_read_off_the_shapes(tmp_path: Path) -> None:
    def arguments(published: nn.Module) -> Any:
        return read_published(saved(tmp_path / "g.pth", published.state_dict()))[0].arguments

    common = {"channels_in": 3, "channels_out": 3}
    assert arguments(published_resnet(*EVEN, separable=True)) == ResNetGenerator(4, 9, True).arguments
    assert arguments(published_resnet(*COMPRESSED, separable=True)) == {
        **common, "ngf": 4, "blocks": 9, "separable": True, "widths": [*COMPRESSED[0]], "inner": [*COMPRESSED[1]]
    }  # fmt: skip
    assert arguments(published_unet(2, 5)) == UNetGenerator(2, 5).arguments


def test_how_files_wrap_a_network(tmp_path: Path) -> None:
    """DataParallel's prefix; several networks in one file; PyTorch's format before 1.6; statistics from before 0.4."""
    published = visible(published_resnet(*EVEN, separable=False, dropout=False))
    state = published.state_dict()
    plain = read_published(saved(tmp_path / "plain.pth", state))[0].state_dict()
    behind = {f"module.{name}": tensor for name, tensor in state.items()}
    old = state | {"model.2.running_mean": torch.ones(4), "model.10.conv_block.2.running_var": torch.ones(16)}
    several = {"G_A": state, "G_B": {name: tensor + 1 for name, tensor in state.items()}, "epoch": 200, "fid": 62.4}
    for path, part in (
        (saved(tmp_path / "parallel.pth", behind), None),
        (saved(tmp_path / "legacy.pth", state, _use_new_zipfile_serialization=False), None),
        (saved(tmp_path / "old.pth", old), None),
        (saved(tmp_path / "double.pth", {name: tensor.double() for name, tensor in state.items()}), None),
        (saved(tmp_path / "dmad.pth", several), "G_A"),
        (saved(tmp_path / "one.pth", {"params": state, "iter": 5}), None),
    ):
        found = read_published(path, part)[0].state_dict()
        assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(plain, torch.float32)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    with pytest.raises(UserError, match=r"dmad\.pth: holds several networks; choose one with --part: G_A, G_B"):
        read_published(tmp_path / "dmad.pth")
    with pytest.raises(UserError, match=r"--part G_C: not in .*dmad\.pth; "):
        read_published(tmp_path / "dmad.pth", "G_C")
    with pytest.raises(UserError, match=r"plain\.pth: holds one network; leave --part G_A out"):
        read_published(tmp_path / "plain.pth", "G_A")


def test_a_u_net_from_before_batches_were_counted(tmp_path: Path) -> None:
    published = visible(published_unet(2, 5))
    state = {name: value for name, value in published.state_dict().items() if not name.endswith("tracked")}
    network, _ = read_published(saved(tmp_path / "old.pth", state))
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(image), published(image), rtol=0, atol=1e-6)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("ran",)


GOOD = published_resnet(EVEN[0], (16, 16), separable=False, dropout=False).state_dict()
REFUSED: dict[str, tuple[Any, str]] = {
    "code inside": ({**GOOD, "model.1.weight": Bomb()}, "holds more than tensors, or is damaged"),
    "another network": ({"features.0.weight": torch.ones(2, 3)}, "no known network's weights .*features.0.weight is"),
    "affine norms": ({**GOOD, "model.2.weight": torch.ones(4)}, r"no known network's .*\(model\.2\.weight is not"),
    "a layer is missing": (
        {name: tensor for name, tensor in GOOD.items() if not name.startswith("model.4.")}, "incomplete"
    ),
    "a bias is missing": (
        {name: tensor for name, tensor in GOOD.items() if name != "model.4.bias"}, r"down1\.0\.bias is missing"
    ),
    "another shape": ({**GOOD, "model.4.weight": torch.ones(8, 5, 3, 3)}, r"down1\.0\.weight is \[8, 5, 3, 3\]"),
    "no map": (torch.ones(3), "holds no tensors by name"),
    "nothing": ({}, "holds no tensors by name"),
    "numbers": ({"a": 1}, "holds no tensors by name"),
    "not finite": ({**GOOD, "model.4.bias": torch.full((8,), torch.nan)}, r"model\.4\.bias has values that are"),
    "a view": ({**GOOD, "model.1.weight": torch.ones(1).expand(1 << 40, 3, 7, 7)}, r"model\.1\.weight is no plain"),
    "instance norms in a U-Net": (
        {**published_unet(2, 5).state_dict(), "model.model.1.model.1.bias": torch.ones(4)}, "is not part of it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_nothing_runs(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        read_published(saved(tmp_path / "file.pth", content))
    assert "\n" not in str(caught.value)
    assert "file.pth" in str(caught.value)
    assert RAN == []


def test_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(UserError, match=r"page\.pth: is a web page"):
        read_state(tmp_path / "page.pth")
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        read_state(tmp_path / "absent.pth")


def test_layouts_know_nothing_of_each_other() -> None:
    """So that their order does not matter."""
    discriminators = [published_discriminator(3, 2, norm) for norm in (nn.InstanceNorm2d, nn.BatchNorm2d)]
    for network in (*(make() for make in NETWORKS.values()), *discriminators):
        state = network.state_dict()
        assert sum(not layout.renamed(state)[1] for layout in LAYOUTS) == 1
