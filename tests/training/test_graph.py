"""`train.graph`: a captured step makes the weights and losses of a step that is not, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recording
from small_methods import METHODS, Ramp, build, image_distillation_of, omgd_of, samples_of
from toy import ToyReader, newest_tensors, rows, run

from hpcdistill.methods.base import Method
from hpcdistill.training import graph

ALL = [*METHODS, "omgd_cyclegan", "omgd_pix2pix", "image_distillation"]
STEPS = 12


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a CPU capture; how often each captured step has been replayed."""
    counts: list[int] = []

    def capture(step: graph.Action) -> graph.Action:
        replay = recording.record(step)
        number = len(counts)
        counts.append(0)

        def counted() -> None:
            counts[number] += 1
            replay()

        return counted

    monkeypatch.setitem(graph.CAPTURES, "cpu", capture)
    return counts


def made(name: str, vgg: Path) -> Method:
    if name.startswith("omgd"):
        return omgd_of(name.partition("_")[2], vgg).double()
    if name == "image_distillation":
        return image_distillation_of(vgg).double()
    return build(name, vgg)


def trained(name: str, vgg: Path, folder: Path, steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
    """The lines of metrics.jsonl and the last checkpoint."""
    method = made(name, vgg)
    if len(method.segments()) > 1:
        options = {"evaluator": Ramp(), **options}
    run(method, ToyReader(2, samples_of(name)), folder, steps, **options)
    return rows(folder), newest_tensors(folder)


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_captured_and_learns_the_same(
    name: str, tmp_path: Path, vgg: Path, replays: list[int]
) -> None:
    eager = trained(name, vgg, tmp_path / "eager")
    captured = trained(name, vgg, tmp_path / "captured", graph="on")
    assert captured == eager
    assert sum(replays) > 0
