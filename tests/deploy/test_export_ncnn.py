"""The ncnn exporter: the same numbers as PyTorch, three files that are ours or refused, names that programs expect."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import pnnx
import pytest
import torch
from deployed import (
    RESNET_SIZES,
    SR_NETWORKS,
    SR_SIZES,
    UNET_SIZES,
    as_rgb,
    difference,
    named_network,
    outcome_without_memory,
    set5_psnr,
)
from PIL import Image
from torch import Tensor, nn

import hpcdistill
from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats import ncnn as exporter
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.ncnn import Ncnn, unknown_layers
from hpcdistill.deploy.formats.ncnn_layers import REALESRGAN, DenseEnlargement, PlainRgb
from hpcdistill.deploy.model import load
from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.errors import UserError
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.enlargement import BicubicEnlargement

LUMA = Options()
RGB = Options(graph="rgb")
HALF = Options(half=True)


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


@pytest.mark.parametrize("name", SR_NETWORKS)
def test_any_size_of_picture_is_enlarged_as_by_pytorch(name: str, tmp_path: Path) -> None:
    network, about = named_network(name)
    session = _exported(network, about, tmp_path).session
    for height, width in SR_SIZES:
        assert difference(network, session, (1, about.channels, height, width)) < 2e-5


@pytest.mark.parametrize("name", ["shipped-x2", "shipped-x3", "shipped-x4", "idn-x2", "vdsr-x2"])
def test_with_colour_inside_too(name: str, tmp_path: Path) -> None:
    network, about = as_rgb(name)
    session = _exported(network, about, tmp_path).session
    for height, width in SR_SIZES:
        assert difference(network, session, (1, 3, height, width)) < 2e-5


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet-dense", RESNET_SIZES), ("resnet-separable", RESNET_SIZES), ("unet", UNET_SIZES)],
)
def test_translation(name: str, sizes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    network, about = named_network(name)
    session = _exported(network, about, tmp_path).session
    for height, width in sizes:
        assert difference(network, session, (1, 3, height, width)) < 1e-4


def test_a_batch_is_made_one_by_one(student: Path) -> None:
    network, _ = named_network("shipped-x4")
    assert difference(network, Ncnn().open(student).session, (3, 1, 12, 7)) < 2e-5


def test_images_that_do_not_lie_in_one_piece(tmp_path: Path) -> None:
    network, about = named_network("fsrcnn-rgb")
    session = _exported(network, about, tmp_path).session
    pixels = np.random.default_rng(2).random((9, 13, 3), dtype=np.float32)
    turned = pixels.transpose(2, 0, 1)[None]
    assert not turned.flags.c_contiguous
    assert np.array_equal(session(turned), session(np.ascontiguousarray(turned)))


def test_set5_has_the_psnr_that_it_has_in_pytorch(student: Path, test_data: Path) -> None:
    network, _ = named_network("shipped-x4")

    def by_pytorch(image: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(image)).numpy()

    folder = test_data / "sr_test" / "Set5" / "HR"
    ours, expected = set5_psnr(folder, Ncnn().open(student).session), set5_psnr(folder, by_pytorch)
    assert np.mean(expected) > 30  # the images are the right ones, and enlarged: bicubic has 28.4
    assert np.abs(np.subtract(ours, expected)).max() < 0.01


def test_half_is_half_as_large_and_near(student: Path, tmp_path: Path) -> None:
    network, about = named_network("shipped-x4")
    path, weights, _ = Ncnn().write(network, about, tmp_path / "half.param", HALF)
    assert weights.stat().st_size < 0.55 * student.with_suffix(".bin").stat().st_size
    assert 1e-5 < difference(network, Ncnn().open(path).session, (1, 1, 40, 30)) < Ncnn.half_tolerance


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
    _, about = named_network("shipped-x4")
    assert Ncnn().open(student).about == about
    said = json.loads(student.with_suffix(".json").read_text())
    assert said["in words"]["input"].startswith("[batch, 1, height, width]")


def test_only_three_files_and_not_a_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    network, about = named_network("idn-x2")
    files = Ncnn().write(network, about, tmp_path / "idn.param", LUMA)
    Ncnn().open(files[0])
    assert [file.name for file in files] == ["idn.param", "idn.bin", "idn.json"]
    assert sorted(tmp_path.iterdir()) == sorted([aside, *files])
    assert list(aside.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    for file in files:
        content = file.read_bytes()
        for local in (str(tmp_path), str(Path(hpcdistill.__file__).parent), str(Path.home()) + "/", "site-packages"):
            assert local.encode() not in content


def test_the_same_network_gives_the_same_bytes(student: Path, tmp_path: Path) -> None:
    torch.rand(3)  # whatever else has happened
    again = Ncnn().write(*named_network("shipped-x4"), tmp_path / "other name.param", LUMA)
    assert [file.read_bytes() for file in again] == [student.with_suffix(file.suffix).read_bytes() for file in again]


def test_repeatable_training_does_not_matter(tmp_path: Path) -> None:
    network, about = named_network("resnet-separable")
    before = Ncnn().write(network, about, tmp_path / "before.param", LUMA)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        after = Ncnn().write(network, about, tmp_path / "after.param", LUMA)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [file.read_bytes() for file in before] == [file.read_bytes() for file in after]


def test_training_mode_is_not_exported(tmp_path: Path) -> None:
    network, about = named_network("unet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    session = _exported(network.train(), about, tmp_path).session
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert difference(network.eval(), session, (1, 3, 16, 24)) < 1e-5


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


@pytest.mark.parametrize("suffix", [".param", ".bin"])
def test_a_changed_byte_is_refused_before_ncnn_sees_it(
    suffix: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "NcnnSession", _reached)
    file = copied.with_suffix(suffix)
    whole = file.read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            Ncnn().open(copied)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            Ncnn().open(copied)


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


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_file_that_stayed_behind_is_named(suffix: str, copied: Path) -> None:
    copied.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match=rf"student\{suffix} is not beside it"):
        Ncnn().open(copied)


@pytest.mark.parametrize("suffix", [".param", ".bin", ".json"])
def test_files_of_two_exports_do_not_mix(suffix: str, copied: Path, tmp_path: Path) -> None:
    other = Ncnn().write(*named_network("shipped-x3"), tmp_path / "other.param", LUMA)[0]
    shutil.copy(other.with_suffix(suffix), copied.with_suffix(suffix))
    with pytest.raises(UserError, match="belongs to another export"):
        Ncnn().open(copied)


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"7767517", b"7767517\n3 3\nInput data 0 1 data\n", b"<xml>"])
def test_what_is_not_ours_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "NcnnSession", _reached)
    path = tmp_path / "foreign.param"
    path.write_bytes(content)
    path.with_suffix(".bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"foreign\.(param|json)"):
        Ncnn().open(path)
    path.with_suffix(".json").write_text('{"hpcdistill": {"task": "super-resolution"}, "sha256": 3}')
    with pytest.raises(UserError, match="foreign"):
        Ncnn().open(path)
    assert not Ncnn().is_ours(path)


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """ncnn makes 68x68 of 66x66."""
    session = _exported(*named_network("resnet-dense"), tmp_path).session
    with pytest.raises(UserError, match="multiples of 4 of at least 8, not 3 channels of 66x66"):
        session(np.zeros((1, 3, 66, 66), np.float32))
    with pytest.raises(UserError, match="takes 3 channels"):
        session(np.zeros((1, 1, 64, 64), np.float32))


def test_what_is_not_as_large_as_it_says_is_no_result(tmp_path: Path) -> None:
    network, about = named_network("shipped-x4")
    session = _exported(network, replace(about, scale=3), tmp_path).session
    with pytest.raises(UserError, match=r"makes \(2, 1, 32, 36\) of \(2, 1, 8, 9\)"):
        session(np.zeros((2, 1, 8, 9), np.float32))


def test_too_little_memory_is_an_error(student: Path) -> None:
    assert outcome_without_memory(student) == "MemoryError"


def test_pictures_through_it(student: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (20, 27, 3), dtype=np.uint8))
    made, expected = load(student)(picture), load("pretrained:x4")(picture)
    assert made.size == (108, 80)
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected)).max() <= 1


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


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, student: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ncnn" else found(name))
    with pytest.raises(UserError, match=r"ncnn needs ncnn, which is not installed: .*\[export\]"):
        Ncnn().open(student)


def _exported(network: nn.Module, about: Description, folder: Path) -> Any:
    path = Ncnn().write(network, about, folder / "network.param", LUMA)[0]
    return Ncnn().open(path)


def _reached(*_: Any) -> None:
    raise AssertionError("ncnn was given a damaged file")
