"""A step of every method on a GPU that does not exist: all on one device, and nothing read back to the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import METHODS
from torch.utils import backend_registration

HERE = Path(__file__).resolve().parent
ALL = [*METHODS, "omgd_cyclegan", "omgd_pix2pix"]

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot name a device in Python",
)


@pytest.fixture(scope="module")
def found(vgg: Path) -> dict[str, Any]:
    """What a step of each method did; in a process of its own, as a device type is named once."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, str(HERE / "fake_gpu.py"), str(vgg)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", ALL)
def test_all_is_on_the_device(found: dict[str, Any], name: str) -> None:
    """Weights, buffers, Adam's moments and what is logged; with micro-batches, averaged weights and norms."""
    assert found[name] == {"devices": ["gpu:0"]}


def test_a_tensor_left_on_the_cpu_is_found(found: dict[str, Any]) -> None:
    assert "gpu:0 and cpu" in found["astray"]["error"]


def test_reading_a_number_back_is_found(found: dict[str, Any]) -> None:
    assert "_local_scalar_dense" in found["reading"]["error"]
