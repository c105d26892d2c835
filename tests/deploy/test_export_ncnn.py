"""The ncnn exporter: its description, the names that programs expect, layers that they lack.

What it has in common with others: test_exported_files.py.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import pnnx
import pytest
import torch
from deployed import (
    as_rgb,
    difference,
    named_network,
)
from torch import Tensor, nn

from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats import ncnn as exporter
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.ncnn import Ncnn, unknown_layers
from hpcdistill.deploy.formats.ncnn_layers import REALESRGAN, DenseEnlargement, PlainRgb
from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.errors import UserError
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.enlargement import BicubicEnlargement

LUMA = Options()
RGB = Options(graph="rgb")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped x4 student, exported once; not to be written to."""
    network, about = named_network("shipped-x4")
    return Ncnn().write(network, about, tmp_path_factory.mktemp("ncnn") / "student.param", LUMA)[0]


@pytest.fixture
def copied(student: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    for suffix in (".param", ".bin", ".json"):
        shutil.copy(student.with_suffix(suffix), tmp_path)
    return tmp_path / student.name


def test_a_batch_is_made_one_by_one(student: Path) -> None:
    network, _ = named_network("shipped-x4")
    assert difference(network, Ncnn().open(student).session, (3, 1, 12, 7)) < 2e-5


def test_programs_find_the_blobs_that_they_ask_for(tmp_path: Path) -> None:
    """As realesrgan-ncnn-vulkan does it: RGB in 0 .. 1 into "data", "output" back."""
    network, about = as_rgb("shipped-x4")
    path, weights, _ = Ncnn().write(network, about, tmp_path / "x4.param", RGB)
    program = ncnn.Net()
    assert program.load_param(str(path)) == 0
    assert program.load_model(str(weights)) == 0
    image = np.random.default_rng(3).random((3, 10, 14), dtype=np.float32)
    extractor = program.create_extractor()
    assert extractor.input("data", ncnn.Mat(image)) == 0
    code, made = extractor.extract("output")
    assert code == 0
    with torch.no_grad():
        expected = network(torch.from_numpy(image[None]))[0].numpy()
    assert np.abs(np.array(made) - expected).max() < 2e-5
    assert expected.min() == 0  # those programs turn negative values into anything: clamped inside
    assert expected.max() == 1


def test_it_says_what_it_is(student: Path) -> None:
    said = json.loads(student.with_suffix(".json").read_text())
    assert said["in words"]["input"].startswith("[batch, 1, height, width]")


class _Sorting(nn.Module):
    """Does what pnnx has no layer for, and says nothing of."""

    def forward(self, image: Tensor) -> Tensor:
        return image.sort(dim=-1).values * 2


def test_an_operation_that_ncnn_lacks_is_named(tmp_path: Path) -> None:
    about = Description("super-resolution", "Sorting", colour="luma")
    with pytest.raises(UserError, match=r"ncnn has no aten::sort.*, which this Sorting needs"):
        Ncnn().write(_Sorting(), about, tmp_path / "x.param", LUMA)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_ncnn_lacks() -> None:
    layers = "7767517\n3 3\nInput in0 0 1 in0\ntorch.narrow narrow_0 1 1 in0 1 dim=1\nReLU relu_0 1 1 1 out0\n"
    assert unknown_layers(layers) == ["torch.narrow"]


def test_pnnx_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pnnx, "EXEC_PATH", shutil.which("false"))
    with pytest.raises(UserError, match=r"pnnx cannot convert this FSRCNN \(code 1\)"):
        Ncnn().write(*named_network("shipped-x2"), tmp_path / "x.param", LUMA)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_description_is_refused_or_says_the_same(copied: Path) -> None:
    about = Ncnn().open(copied).about
    card = copied.with_suffix(".json")
    whole = card.read_bytes()
    chance = random.Random(6)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        card.write_bytes(damaged)
        try:
            assert Ncnn().open(copied).about == about
        except UserError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"7767517", b"7767517\n3 3\nInput data 0 1 data\n", b"<xml>"])
def test_a_foreign_description_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "NcnnSession", _reached)
    path = tmp_path / "foreign.param"
    path.write_bytes(content)
    path.with_suffix(".bin").write_bytes(bytes(100))
    path.with_suffix(".json").write_text('{"hpcdistill": {"task": "super-resolution"}, "sha256": 3}')
    with pytest.raises(UserError, match="foreign"):
        Ncnn().open(path)
    assert not Ncnn().is_ours(path)


def test_who_can_use_it_is_said(tmp_path: Path) -> None:
    luma, (network, rgb) = named_network("shipped-x4")[1], as_rgb("shipped-x4")

    def said(name: str, about: Description) -> tuple[str, ...]:
        path = Ncnn().write(network, about, tmp_path / name, RGB)[0]
        return Ncnn().remarks(path, about, RGB)

    assert "--graph rgb" in Ncnn().remarks(tmp_path / "x4.param", luma, LUMA)[0]
    (only,) = said("dssd-x4.param", rgb)
    assert only.startswith("for realesrgan-ncnn-vulkan and upscayl: ")
    assert only.endswith("-n dssd-x4")
    assert "says x4" in said("student.param", rgb)[1]
    assert "says x4" in said("student-2x4.param", rgb)[1]  # upscayl looks for 2x first
    assert "28 to each side: seams" in said("x4.param", rgb.tiled(28))[1]
    translation = named_network("resnet-dense")[1]
    assert Ncnn().remarks(tmp_path / "r.param", translation, LUMA)[0].endswith("takes -1 .. 1")


def test_layers_that_a_program_lacks_are_said(tmp_path: Path) -> None:
    network, about = as_rgb("idn-x2")
    path = Ncnn().write(network, about, tmp_path / "idn-x2.param", RGB)[0]
    first, second, *_ = Ncnn().remarks(path, about, RGB)
    assert first == "not for realesrgan-ncnn-vulkan, which has no ConvolutionDepthWise, Slice"
    assert second.startswith("for upscayl: ")


@pytest.mark.parametrize("name", ["shipped-x2", "shipped-x3", "shipped-x4"])
def test_the_student_needs_no_layer_that_the_programs_lack(name: str, tmp_path: Path) -> None:
    """realesrgan-ncnn-vulkan is built with 16 kinds of layers; with another one it makes no picture, or crashes."""
    network, about = as_rgb(name)
    text = Ncnn().write(network, about, tmp_path / "x.param", RGB)[0].read_text()
    layers = [line.split() for line in text.splitlines()[2:]]
    assert {words[0] for words in layers} <= REALESRGAN
    # An activation that is part of a convolution (9=) is one of their layers too: 1 ReLU, 2 leaky ReLU, 3 Clip.
    assert {word for words in layers for word in words[4:] if word.startswith("9=")} == {"9=1", "9=2"}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_enlargement_without_groups(scale: int, channels: int) -> None:
    image = torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(7))
    expected = upsample(image.double(), scale)
    made = DenseEnlargement(BicubicEnlargement(scale, channels))(image)
    assert (made - expected).abs().max() < 1e-6


def test_colour_without_groups() -> None:
    network, _ = as_rgb("shipped-x3")
    assert isinstance(network, RgbGraph)
    image = torch.rand(1, 3, 11, 14, generator=torch.Generator().manual_seed(8)) * 1.4 - 0.2
    with torch.no_grad():
        expected, made = network.double()(image.double()), PlainRgb(network.float()).eval()(image)
    assert (made - expected).abs().max() < 5e-6
    assert expected.min() == 0  # clamped at both ends
    assert expected.max() == 1


def _reached(*_: Any) -> None:
    raise AssertionError("ncnn was given a damaged file")
