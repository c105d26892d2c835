"""What the exporters of several files have in common: the same numbers as PyTorch, files that are ours or refused.

What one of them alone does: test_export_ncnn.py, test_export_openvino.py.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
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
from torch import nn

import hpcdistill
from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats import ncnn, openvino
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.ncnn import Ncnn
from hpcdistill.deploy.formats.openvino import OpenVino
from hpcdistill.deploy.model import load
from hpcdistill.errors import UserError

LUMA = Options()
HALF = Options(half=True)


@dataclass(frozen=True)
class Case:
    """A format."""

    exporter: type[Ncnn] | type[OpenVino]
    module: ModuleType
    opens: str  # what the module gives a network to once its files are checked
    suffixes: tuple[str, ...]  # of its files; the second one's are the weights
    tolerance: float  # from PyTorch, of super-resolution
    foreign: str  # what is said of a file that is not ours
    extra: str  # what is said where its package is missing

    def write(self, network: nn.Module, about: Description, stem: Path, options: Options = LUMA) -> tuple[Path, ...]:
        return tuple(self.exporter().write(network, about, stem.with_suffix(self.suffixes[0]), options))

    def open(self, path: Path) -> Any:
        return self.exporter().open(path)

    def exported(self, network: nn.Module, about: Description, folder: Path) -> Any:
        """The session of the network, written and opened."""
        return self.open(self.write(network, about, folder / "network")[0]).session


CASES = {
    "ncnn": Case(
        Ncnn,
        ncnn,
        "NcnnSession",
        (".param", ".bin", ".json"),
        2e-5,
        r"foreign\.(param|json)",
        r"ncnn needs ncnn, which is not installed: .*\[export\]",
    ),
    "openvino": Case(
        OpenVino,
        openvino,
        "_opened",
        (".xml", ".bin"),
        1e-5,
        r"foreign\.xml: is no OpenVINO network that hpcdistill exported",
        r"openvino needs openvino, which is not installed: .*\[openvino\]",
    ),
}
each_format = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def each_file(start: int = 0, stop: int | None = None) -> pytest.MarkDecorator:
    """Of each format, some of its files."""
    pairs = [(name, suffix) for name, case in CASES.items() for suffix in case.suffixes[start:stop]]
    ids = [f"{name}{suffix}" for name, suffix in pairs]
    return pytest.mark.parametrize(("case", "suffix"), [(CASES[name], suffix) for name, suffix in pairs], ids=ids)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """The shipped x4 student, exported once in each format; not to be written to."""
    return {
        case: case.write(*named_network("shipped-x4"), tmp_path_factory.mktemp(name) / "student")[0]
        for name, case in CASES.items()
    }


@pytest.fixture
def student(case: Case, students: dict[Case, Path]) -> Path:
    return students[case]


@pytest.fixture
def copied(case: Case, student: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    for suffix in case.suffixes:
        shutil.copy(student.with_suffix(suffix), tmp_path)
    return tmp_path / student.name


@each_format
@pytest.mark.parametrize("name", SR_NETWORKS)
def test_any_size_of_picture_is_enlarged_as_by_pytorch(name: str, case: Case, tmp_path: Path) -> None:
    network, about = named_network(name)
    session = case.exported(network, about, tmp_path)
    for height, width in SR_SIZES:
        assert difference(network, session, (1, about.channels, height, width)) < case.tolerance


@each_format
@pytest.mark.parametrize("name", ["shipped-x2", "shipped-x3", "shipped-x4", "idn-x2", "vdsr-x2"])
def test_with_colour_inside_too(name: str, case: Case, tmp_path: Path) -> None:
    network, about = as_rgb(name)
    session = case.exported(network, about, tmp_path)
    for height, width in SR_SIZES:
        assert difference(network, session, (1, 3, height, width)) < case.tolerance


@each_format
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet-dense", RESNET_SIZES), ("resnet-separable", RESNET_SIZES), ("unet", UNET_SIZES)],
)
def test_translation(name: str, sizes: tuple[tuple[int, int], ...], case: Case, tmp_path: Path) -> None:
    network, about = named_network(name)
    session = case.exported(network, about, tmp_path)
    for height, width in sizes:
        assert difference(network, session, (1, 3, height, width)) < 1e-4


@each_format
@pytest.mark.parametrize("name", ["shipped-x4", "idn-x2", "resnet-separable", "unet"])
def test_batches(name: str, case: Case, tmp_path: Path) -> None:
    network, about = named_network(name)
    assert difference(network, case.exported(network, about, tmp_path), (3, about.channels, 16, 32)) < 1e-4


@each_format
def test_images_that_do_not_lie_in_one_piece(case: Case, tmp_path: Path) -> None:
    session = case.exported(*named_network("fsrcnn-rgb"), tmp_path)
    pixels = np.random.default_rng(2).random((9, 13, 3), dtype=np.float32)
    turned = pixels.transpose(2, 0, 1)[None]
    assert not turned.flags.c_contiguous
    assert np.array_equal(session(turned), session(np.ascontiguousarray(turned)))


@each_format
def test_a_result_outlives_the_next_one(case: Case, student: Path) -> None:
    session = case.open(student).session
    images = np.random.default_rng(3).random((2, 1, 1, 9, 9), dtype=np.float32)
    first = session(images[0])
    kept = first.copy()
    session(images[1])
    assert np.array_equal(first, kept)


@each_format
def test_set5_has_the_psnr_that_it_has_in_pytorch(case: Case, student: Path, test_data: Path) -> None:
    network, _ = named_network("shipped-x4")

    def by_pytorch(image: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(image)).numpy()

    folder = test_data / "sr_test" / "Set5" / "HR"
    ours, expected = set5_psnr(folder, case.open(student).session), set5_psnr(folder, by_pytorch)
    assert np.mean(expected) > 30  # the images are the right ones, and enlarged: bicubic has 28.4
    assert np.abs(np.subtract(ours, expected)).max() < 0.01


@each_format
def test_half_is_half_as_large_and_near(case: Case, student: Path, tmp_path: Path) -> None:
    network, about = named_network("shipped-x4")
    path, weights, *_ = case.write(network, about, tmp_path / "half", HALF)
    assert weights.stat().st_size < 0.55 * student.with_suffix(".bin").stat().st_size
    assert 1e-5 < difference(network, case.open(path).session, (1, 1, 40, 30)) < case.exporter.half_tolerance


@each_format
def test_it_knows_what_it_is(case: Case, student: Path) -> None:
    _, about = named_network("shipped-x4")
    assert case.open(student).about == about


@each_format
def test_only_its_files_and_not_a_word(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    network, about = named_network("idn-x2")
    files = case.write(network, about, tmp_path / "idn")
    case.open(files[0])
    assert [file.name for file in files] == [f"idn{suffix}" for suffix in case.suffixes]
    assert sorted(tmp_path.iterdir()) == sorted([aside, *files])
    assert list(aside.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    for file in files:
        content = file.read_bytes()
        for local in (str(tmp_path), str(Path(hpcdistill.__file__).parent), str(Path.home()) + "/", "site-packages"):
            assert local.encode() not in content


@each_format
def test_the_same_network_gives_the_same_bytes(case: Case, student: Path, tmp_path: Path) -> None:
    torch.rand(3)  # whatever else has happened
    again = case.write(*named_network("shipped-x4"), tmp_path / "other name")
    assert [file.read_bytes() for file in again] == [student.with_suffix(file.suffix).read_bytes() for file in again]


@each_format
def test_repeatable_training_does_not_matter(case: Case, tmp_path: Path) -> None:
    network, about = named_network("resnet-separable")
    before = case.write(network, about, tmp_path / "before")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        after = case.write(network, about, tmp_path / "after")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [file.read_bytes() for file in before] == [file.read_bytes() for file in after]


@each_format
def test_training_mode_is_not_exported(case: Case, tmp_path: Path) -> None:
    network, about = named_network("unet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    session = case.exported(network.train(), about, tmp_path)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert difference(network.eval(), session, (1, 3, 16, 24)) < 1e-5


@each_file(stop=2)
def test_a_changed_byte_is_refused_before_the_package_sees_it(
    suffix: str, case: Case, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case.module, case.opens, _reached)
    file = copied.with_suffix(suffix)
    whole = file.read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            case.open(copied)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            case.open(copied)


@each_file(start=1)
def test_a_file_that_stayed_behind_is_named(suffix: str, case: Case, copied: Path) -> None:
    copied.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match=rf"student\{suffix} is not beside it"):
        case.open(copied)


@each_file()
def test_files_of_two_exports_do_not_mix(suffix: str, case: Case, copied: Path, tmp_path: Path) -> None:
    other = case.write(*named_network("shipped-x3"), tmp_path / "other")[0]
    shutil.copy(other.with_suffix(suffix), copied.with_suffix(suffix))
    with pytest.raises(UserError, match="belongs to another export"):
        case.open(copied)


@each_format
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 300,
        b"7767517",
        b"7767517\n3 3\nInput data 0 1 data\n",
        b"<xml>",
        b"<html>",
        b"<?xml version='1.0'?><net/>",
    ],
)
def test_what_is_not_ours_is_refused(
    content: bytes, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case.module, case.opens, _reached)
    path = tmp_path / f"foreign{case.suffixes[0]}"
    path.write_bytes(content)
    path.with_suffix(".bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=case.foreign):
        case.open(path)
    assert not case.exporter().is_ours(path)


@each_format
def test_a_size_that_does_not_fit_is_refused(case: Case, tmp_path: Path) -> None:
    """ncnn, and OpenVINO's graph, make 68x68 of 66x66."""
    session = case.exported(*named_network("resnet-dense"), tmp_path)
    with pytest.raises(UserError, match="multiples of 4 of at least 8, not 3 channels of 66x66"):
        session(np.zeros((1, 3, 66, 66), np.float32))
    with pytest.raises(UserError, match="takes 3 channels"):
        session(np.zeros((1, 1, 64, 64), np.float32))


@each_format
def test_what_is_not_as_large_as_it_says_is_no_result(case: Case, tmp_path: Path) -> None:
    network, about = named_network("shipped-x4")
    session = case.exported(network, replace(about, scale=3), tmp_path)
    with pytest.raises(UserError, match=r"makes \(2, 1, 32, 36\) of \(2, 1, 8, 9\)"):
        session(np.zeros((2, 1, 8, 9), np.float32))


@each_format
def test_too_little_memory_is_an_error(case: Case, student: Path) -> None:
    """OpenVINO itself gives an empty array, or the one before, and no error."""
    assert outcome_without_memory(student) == "MemoryError"


@each_format
def test_pictures_through_it(case: Case, student: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (20, 27, 3), dtype=np.uint8))
    made, expected = load(student)(picture), load("pretrained:x4")(picture)
    assert made.size == (108, 80)
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected)).max() <= 1


@each_format
def test_without_the_package_the_extra_is_named(case: Case, monkeypatch: pytest.MonkeyPatch, student: Path) -> None:
    found = importlib.util.find_spec
    package = case.exporter.__name__.lower()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(UserError, match=case.extra):
        case.open(student)


def _reached(*_: Any) -> None:
    raise AssertionError("the package was given a damaged file")
