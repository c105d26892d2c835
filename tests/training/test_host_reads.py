"""Between two log points a step reads nothing back to the host: on a GPU each read would wait for all queued work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import METHODS, Ramp, build, samples_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyReader, run
from translation import omgd, samples

from hpcdistill.methods.base import Method
from hpcdistill.methods.output_distillation import OutputDistillation
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.training.segments import place_segments

# What gives Python a number, or a tensor whose shape depends on one.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
STEPS = 4


class HostReads(TorchDispatchMode):
    """The operations that read from the device, by the step in which they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.found: dict[int, list[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = (x.dtype for x in arguments[1] if x is not None) if name in ("index", "index_put_") else ()
        if name in READS or torch.bool in masks:
            self.found.setdefault(self.step, []).append(name)
        return function(*arguments, **(options or {}))

    def before(self, step: int) -> None:
        self.step = step


def reads(method: Method, samples_of_it: Any, folder: Path, **options: Any) -> dict[int, list[str]]:
    """What each step reads; not the last one of a segment, after which a run may be evaluated, nor one that begins with
    weights from a file."""
    watch, evaluator = HostReads(), None
    segments = method.segments()
    steps = sum(segment.steps for segment in segments if segment.steps) + STEPS
    if len(segments) > 1:
        evaluator = Ramp()
    options = {"evaluator": evaluator, "log_every": 100, **options}
    with watch:
        run(method, ToyReader(2, samples_of_it, before=watch.before), folder, steps, **options)
    stretches = place_segments(segments, steps, evaluator is not None)
    others = {stretch.end - 1 for stretch in stretches} | {s.start for s in stretches if s.segment.load}
    return {step: found for step, found in watch.found.items() if step >= 0 and step not in others}


@pytest.mark.parametrize("name", METHODS)
def test_no_method_reads_between_log_points(name: str, tmp_path: Path, vgg: Path) -> None:
    assert reads(build(name, vgg), samples_of(name), tmp_path) == {}


def test_nor_does_omgd_or_output_distillation(tmp_path: Path) -> None:
    assert reads(omgd(), samples, tmp_path / "omgd") == {}
    config = OutputDistillation.Config(scale=2, weight_feature=1.0)
    method = OutputDistillation(config, {"teacher": FSRCNN(2)}).double()
    assert reads(method, samples_of("plain_sr"), tmp_path / "output") == {}


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"accumulation": 2}, {"gradient_norms_every": 1}])
def test_nor_does_an_option(options: dict[str, Any], tmp_path: Path, vgg: Path) -> None:
    assert reads(build("privileged_student", vgg), samples_of("privileged_student"), tmp_path, **options) == {}


def test_the_watch_sees_a_read() -> None:
    watch, number = HostReads(), torch.ones(())
    with watch:
        watch.before(1)
        float(number)
        watch.before(2)
        bool(number > 0)
        watch.before(3)
        number.expand(3)[torch.tensor([True, False, True])]
    assert {step: len(found) > 0 for step, found in watch.found.items()} == {1: True, 2: True, 3: True}


def test_the_watch_sees_the_backward_pass() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float(gradient.sum())

    watch = HostReads()
    with watch:
        Reading.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert watch.found == {-1: ["_local_scalar_dense"]}
