"""The same global batches on 1, 2 and 4 processes, and in 1, 2 and 4 micro-batches: the same run, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import launch
from safetensors.torch import load
from small_methods import METHODS, Ramp, build, samples_of, write_vgg
from toy import ToyReader, newest_tensors, rows, run

STEPS = 20
BATCH = 4
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vgg(tmp_path_factory.mktemp("vgg") / "vgg16.safetensors")


def train(name: str, vgg: Path, folder: Path, ranks: int, steps: int, batch: int, **options: Any) -> None:
    def work(rank: int, of: int) -> None:
        torch.set_num_threads(1)
        reader = ToyReader(batch, samples_of(name), rank, of)
        evaluator = Ramp() if name.startswith("dcd") else None
        settings = {"checkpoint_every": steps, "gradient_norms_every": 5, **options}
        run(build(name, vgg), reader, folder, steps, evaluator, **settings)

    assert launch(ranks, work, seconds=120) == [0] * ranks


def assert_same_run(first: Path, second: Path, rtol: float) -> None:
    """Loss terms and gradient norms, of each term and in all, of every step; weights, Adam's moments, pools at the end.

    Everything is float64 but the weighted terms, whose values (not gradients) are float32.
    """
    one, two = rows(first), rows(second)
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=rtol, abs=1e-9), (left["step"], key)
    tensors, others = newest_tensors(first), newest_tensors(second)
    assert tensors.keys() == others.keys()
    for file in tensors:
        left, right = load(tensors[file]), load(others[file])
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=rtol, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_one_two_and_four_processes(name: str, vgg: Path, tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        train(name, vgg, tmp_path / str(ranks), ranks, STEPS, BATCH)
    lines = [row for row in rows(tmp_path / "1") if "images" in row]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for row in lines for value in row.values())
    assert any(key.startswith("gradient/") and value > 0 for row in lines for key, value in row.items())
    for ranks in (2, 4):
        assert_same_run(tmp_path / "1", tmp_path / str(ranks), 1e-4)


@pytest.mark.parametrize("name", ["privileged_student", "cyclegan"])
def test_accumulation_is_exact(name: str, vgg: Path, tmp_path: Path) -> None:
    """Networks without BatchNorm, of several groups, the pool at work: six steps of eight samples."""
    runs = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
    for ranks, pieces in runs:
        train(name, vgg, tmp_path / f"{ranks}x{pieces}", ranks, 6, 8, accumulation=pieces)
    for ranks, pieces in runs[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / f"{ranks}x{pieces}", 1e-5)
