"""The OpenVINO exporter: the same numbers as PyTorch, in float32 wherever it runs, and two files that are ours."""

from __future__ import annotations

import importlib.util
import random
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino
import openvino_telemetry
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
from hpcdistill.deploy.formats import openvino as exporter
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.openvino import OpenVino
from hpcdistill.deploy.model import load
from hpcdistill.errors import UserError

LUMA = Options()
HALF = Options(half=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped x4 student, exported once; not to be written to."""
    network, about = named_network("shipped-x4")
    return OpenVino().write(network, about, tmp_path_factory.mktemp("openvino") / "student.xml", LUMA)[0]


@pytest.fixture
def copied(student: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    for suffix in (".xml", ".bin"):
        shutil.copy(student.with_suffix(suffix), tmp_path)
    return tmp_path / student.name


@pytest.mark.parametrize("name", SR_NETWORKS)
def test_any_size_of_picture_is_enlarged_as_by_pytorch(name: str, tmp_path: Path) -> None:
    network, about = named_network(name)
    session = _exported(network, about, tmp_path).session
    for height, width in SR_SIZES:
        assert difference(network, session, (1, about.channels, height, width)) < 1e-5


@pytest.mark.parametrize("name", ["shipped-x3", "shipped-x4", "idn-x2"])
def test_with_colour_inside_too(name: str, tmp_path: Path) -> None:
    network, about = as_rgb(name)
    session = _exported(network, about, tmp_path).session
    for height, width in SR_SIZES:
        assert difference(network, session, (1, 3, height, width)) < 1e-5


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet-dense", RESNET_SIZES), ("resnet-separable", RESNET_SIZES), ("unet", UNET_SIZES)],
)
def test_translation(name: str, sizes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    network, about = named_network(name)
    session = _exported(network, about, tmp_path).session
    for height, width in sizes:
        assert difference(network, session, (1, 3, height, width)) < 1e-4


@pytest.mark.parametrize("name", ["shipped-x4", "idn-x2", "resnet-separable", "unet"])
def test_batches(name: str, tmp_path: Path) -> None:
    network, about = named_network(name)
    assert difference(network, _exported(network, about, tmp_path).session, (3, about.channels, 16, 32)) < 1e-4


def test_images_that_do_not_lie_in_one_piece(tmp_path: Path) -> None:
    session = _exported(*named_network("fsrcnn-rgb"), tmp_path).session
    pixels = np.random.default_rng(2).random((9, 13, 3), dtype=np.float32)
    turned = pixels.transpose(2, 0, 1)[None]
    assert np.array_equal(session(turned), session(np.ascontiguousarray(turned)))


def test_a_result_outlives_the_next_one(student: Path) -> None:
    session = OpenVino().open(student).session
    images = np.random.default_rng(3).random((2, 1, 1, 9, 9), dtype=np.float32)
    first = session(images[0])
    kept = first.copy()
    session(images[1])
    assert np.array_equal(first, kept)


def test_set5_has_the_psnr_that_it_has_in_pytorch(student: Path, test_data: Path) -> None:
    network, _ = named_network("shipped-x4")

    def by_pytorch(image: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(image)).numpy()

    folder = test_data / "sr_test" / "Set5" / "HR"
    ours, expected = set5_psnr(folder, OpenVino().open(student).session), set5_psnr(folder, by_pytorch)
    assert np.mean(expected) > 30  # the images are the right ones, and enlarged: bicubic has 28.4
    assert np.abs(np.subtract(ours, expected)).max() < 0.01


def test_half_is_half_as_large_and_near(student: Path, tmp_path: Path) -> None:
    network, about = named_network("shipped-x4")
    path, weights = OpenVino().write(network, about, tmp_path / "half.xml", HALF)
    assert weights.stat().st_size < 0.55 * student.with_suffix(".bin").stat().st_size
    assert 1e-5 < difference(network, OpenVino().open(path).session, (1, 1, 40, 30)) < OpenVino.half_tolerance


def test_other_programs_find_names_and_any_size(student: Path) -> None:
    model = openvino.Core().read_model(student)
    assert model.input("input").partial_shape == openvino.PartialShape([-1, 1, -1, -1])
    assert model.output("output").partial_shape.rank == 4
    assert str(model.input("input").element_type) == "<Type: 'float32'>"


def test_float32_is_asked_for(student: Path) -> None:
    """Some processors would compute in bfloat16."""
    compiled: Any = OpenVino().open(student).session
    assert str(compiled.compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"
    assert "bfloat16" in OpenVino().remarks(student, OpenVino().open(student).about, LUMA)[0]


def test_it_says_what_it_is(student: Path) -> None:
    _, about = named_network("shipped-x4")
    assert OpenVino().open(student).about == about
    said = ElementTree.parse(student).getroot().find("rt_info/hpcdistill/input")
    assert said is not None
    assert said.get("value", "").startswith("[batch, 1, height, width]")


def test_only_two_files_and_not_a_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    network, about = named_network("idn-x2")
    files = OpenVino().write(network, about, tmp_path / "idn.xml", LUMA)
    OpenVino().open(files[0])
    assert [file.name for file in files] == ["idn.xml", "idn.bin"]
    assert sorted(tmp_path.iterdir()) == sorted([aside, *files])
    assert list(aside.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    for file in files:
        content = file.read_bytes()
        for local in (str(tmp_path), str(Path(hpcdistill.__file__).parent), str(Path.home()) + "/", "site-packages"):
            assert local.encode() not in content


def test_nobody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """openvino.convert_model tells Google Analytics, and leaves files in the home folder."""

    def told(*_: Any, **__: Any) -> None:
        raise AssertionError("telemetry, or a socket")

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("init", "start_session", "send_event"):
        monkeypatch.setattr(openvino_telemetry.Telemetry, name, told)
    monkeypatch.setattr(socket, "socket", told)
    path = OpenVino().write(*named_network("shipped-x2"), tmp_path / "x2.xml", LUMA)[0]
    OpenVino().open(path).session(np.zeros((1, 1, 4, 4), np.float32))
    assert list(home.iterdir()) == []


def test_the_same_network_gives_the_same_bytes(student: Path, tmp_path: Path) -> None:
    torch.rand(3)  # whatever else has happened
    again = OpenVino().write(*named_network("shipped-x4"), tmp_path / "other name.xml", LUMA)
    assert [file.read_bytes() for file in again] == [student.with_suffix(file.suffix).read_bytes() for file in again]


def test_training_mode_is_not_exported(tmp_path: Path) -> None:
    network, about = named_network("unet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    session = _exported(network.train(), about, tmp_path).session
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert difference(network.eval(), session, (1, 3, 16, 24)) < 1e-5


class _Unknown(nn.Module):
    """Does what OpenVINO has nothing for."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(image @ image.mT)


def test_an_operation_that_openvino_lacks_is_one_line(tmp_path: Path) -> None:
    about = Description("super-resolution", "Unknown", colour="luma")
    with pytest.raises(UserError, match=r"^OpenVINO cannot convert this Unknown \(No conversion .*eigvalsh.*as onnx$"):
        OpenVino().write(_Unknown(), about, tmp_path / "x.xml", LUMA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_a_changed_byte_is_refused_before_openvino_sees_it(
    suffix: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_opened", _reached)
    file = copied.with_suffix(suffix)
    whole = file.read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            OpenVino().open(copied)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            OpenVino().open(copied)


def test_weights_that_stayed_behind_are_named(copied: Path) -> None:
    copied.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"student\.bin is not beside it"):
        OpenVino().open(copied)


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_files_of_two_exports_do_not_mix(suffix: str, copied: Path, tmp_path: Path) -> None:
    other = OpenVino().write(*named_network("shipped-x3"), tmp_path / "other.xml", LUMA)[0]
    shutil.copy(other.with_suffix(suffix), copied.with_suffix(suffix))
    with pytest.raises(UserError, match="belongs to another export"):
        OpenVino().open(copied)


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"<?xml version='1.0'?><net/>", b"<html>"])
def test_what_is_not_ours_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_opened", _reached)
    path = tmp_path / "foreign.xml"
    path.write_bytes(content)
    path.with_suffix(".bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"foreign\.xml: is no OpenVINO network that hpcdistill exported"):
        OpenVino().open(path)
    assert not OpenVino().is_ours(path)


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The graph makes 68x68 of 66x66."""
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
    """OpenVINO itself gives an empty array, or the one before, and no error."""
    assert outcome_without_memory(student) == "MemoryError"


def test_pictures_through_it(student: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (20, 27, 3), dtype=np.uint8))
    made, expected = load(student)(picture), load("pretrained:x4")(picture)
    assert made.size == (108, 80)
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected)).max() <= 1


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, student: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(UserError, match=r"openvino needs openvino, which is not installed: .*\[openvino\]"):
        OpenVino().open(student)


def _exported(network: nn.Module, about: Description, folder: Path) -> Any:
    path = OpenVino().write(network, about, folder / "network.xml", LUMA)[0]
    return OpenVino().open(path)


def _reached(*_: Any) -> None:
    raise AssertionError("OpenVINO was given a damaged file")
