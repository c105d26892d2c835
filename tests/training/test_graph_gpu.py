"""`train.graph` on a real GPU: the losses of eager steps, nothing waited for, and a failed capture is survived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import METHODS, Ramp, build, samples_of
from torch import Tensor
from toy import Regression, ToyReader, fit, rows, run

from hpcdistill.methods.base import Batch, Carry, Progress, Terms
from hpcdistill.training import graph

STEPS = 14
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def trained(
    name: str, vgg: Path, folder: Path, before: Callable[[int], None] | None = None, **options: Any
) -> list[dict[str, Any]]:
    method, samples = build(name, vgg), samples_of(name)
    if options.get("precision") == "bf16":
        method = method.float()

    def read(numbers: Any) -> dict[str, Tensor]:
        dtype = next(method.parameters()).dtype
        return {key: x.to(dtype) for key, x in samples(numbers).items()}

    if len(method.segments()) > 1:
        options["evaluator"] = Ramp()
    run(method, ToyReader(2, read, before=before), folder, STEPS, device="cuda", **options)
    return rows(folder)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_learns_what_eager_steps_learn(
    name: str, tmp_path: Path, vgg: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float64 up to the rounding of kernels that add in any order; cuDNN may choose others in a graph."""
    eager = trained(name, vgg, tmp_path / "eager")
    capsys.readouterr()
    assert_close(trained(name, vgg, tmp_path / "graph", graph="on"), eager, 1e-6)
    assert "one CUDA graph from now on" in capsys.readouterr().err


def test_so_in_bf16_with_averages_and_micro_batches(tmp_path: Path, vgg: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16", "ema": 0.9, "accumulation": 2, "gradient_norms_every": 5}
    eager = trained("privileged_student", vgg, tmp_path / "eager", **options)
    assert_close(trained("privileged_student", vgg, tmp_path / "graph", graph="on", **options), eager, 1e-2)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("name", ["privileged_student", "cyclegan", "fesd_unpaired", "pix2pix"])
def test_the_host_waits_for_nothing(name: str, mode: str, tmp_path: Path, vgg: Path) -> None:
    def before(step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 6 <= step < STEPS - 2 else "default")

    try:
        trained(name, vgg, tmp_path, before, graph=mode, log_every=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_is_drawn_anew_at_each_step(tmp_path: Path) -> None:
    for folder, mode in (("eager", "off"), ("graph", "on")):
        fit(tmp_path / folder, STEPS, Regression(dropout=0.5), device="cuda", graph=mode)
    assert_close(rows(tmp_path / "graph"), rows(tmp_path / "eager"), 1e-9)


def test_a_capture_that_fails_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What follows draws, records streams and seeds the generator, which a failed capture may leave in disorder."""

    class Waiting(Regression):
        def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
            terms = super().loss(batch, carry, progress)
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return terms

    fit(tmp_path / "eager", STEPS, Waiting(dropout=0.5), device="cuda")
    capsys.readouterr()
    fit(tmp_path / "graph", STEPS, Waiting(dropout=0.5), device="cuda", graph="auto")
    assert "train.graph: off: the capture failed" in capsys.readouterr().err
    assert_close(rows(tmp_path / "graph"), rows(tmp_path / "eager"), 1e-9)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    number = torch.zeros((), device="cuda")
    again = graph.cuda_capture(lambda: number.add_(1))  # type: ignore[arg-type,return-value]
    assert float(number) == 0
    again()
    assert float(number) == 1
