"""The OpenVINO exporter: float32 wherever it runs, names that other programs find, and nobody is told.

What it has in common with others: test_exported_files.py.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino
import openvino_telemetry
import pytest
import torch
from deployed import (
    named_network,
)
from torch import Tensor, nn

from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.openvino import OpenVino
from hpcdistill.errors import UserError

LUMA = Options()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped x4 student, exported once; not to be written to."""
    network, about = named_network("shipped-x4")
    return OpenVino().write(network, about, tmp_path_factory.mktemp("openvino") / "student.xml", LUMA)[0]


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
    said = ElementTree.parse(student).getroot().find("rt_info/hpcdistill/input")
    assert said is not None
    assert said.get("value", "").startswith("[batch, 1, height, width]")


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


class _Unknown(nn.Module):
    """Does what OpenVINO has nothing for."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(image @ image.mT)


def test_an_operation_that_openvino_lacks_is_one_line(tmp_path: Path) -> None:
    about = Description("super-resolution", "Unknown", colour="luma")
    with pytest.raises(UserError, match=r"^OpenVINO cannot convert this Unknown \(No conversion .*eigvalsh.*as onnx$"):
        OpenVino().write(_Unknown(), about, tmp_path / "x.xml", LUMA)
    assert list(tmp_path.iterdir()) == []
