"""What fp16 loses of a gradient: by hand, and measured through CPU autocast in fp16."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcdistill.methods.base import Carry, Progress
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.training.underflow import UnderflowWatch, lost_share

START = Progress.at(0, 1)


def student(weight: float) -> tuple[PrivilegedStudent, dict[str, Tensor]]:
    torch.manual_seed(0)
    frozen = {"teacher": PrivilegedTeacher(4, 1)}
    method = PrivilegedStudent(PrivilegedStudent.Config(scale=4, weight_vid=weight), frozen)
    return method, {"lr4": torch.rand(4, 1, 24, 24), "hr": torch.rand(4, 1, 96, 96)}


def test_dssds_weight_of_vid() -> None:
    """Most of the estimator's gradients at weight 1e-6 are below Adam's eps and below fp16's smallest number."""
    method, batch = student(1e-6)
    estimator = method.groups["student"].module.estimator
    assert isinstance(estimator, nn.Module)
    gradients = torch.autograd.grad(method.student_loss(batch, Carry(), START)["vid"], list(estimator.parameters()))
    values = torch.cat([gradient.flatten().abs() for gradient in gradients])
    values = values[values > 0]
    assert (values.half() == 0).double().mean() > 0.9
    assert (values < 1e-8).double().mean() > 0.8
    assert ((values * 1e6).half() == 0).double().mean() < 0.01


def test_fp16_switches_vid_off_unless_the_loss_is_scaled() -> None:
    method, batch = student(1e-6)
    with torch.autocast("cpu", torch.float16):
        terms = method.student_loss(batch, Carry(), START)
    parameters = list(method.student.parameters())
    shares = {scale: lost_share(terms["vid"], parameters, scale) for scale in (1.0, 2.0**10, 2.0**16)}
    assert shares[1.0] == 1.0
    assert shares[2.0**10] is not None
    assert shares[2.0**16] is not None
    assert 0 < shares[2.0**16] < shares[2.0**10] < 0.01
    found = lost_share(terms["reconstruction"], parameters, 1.0)
    assert found is not None
    assert found < 0.02
    assert lost_share(terms["reconstruction"], parameters, 2.0**30) is None  # overflows


def half_line(weight: float) -> tuple[nn.Linear, Tensor]:
    """A term whose gradient with respect to the four weights is weight * (1, 2^-8, 2^-16, 0), all through fp16."""
    line = nn.Linear(4, 1, bias=False)
    inputs = torch.tensor([[1.0, 2.0**-8, 2.0**-16, 0.0]])
    with torch.autocast("cpu", torch.float16):
        output = line(inputs)
    assert output.dtype == torch.float16
    return line, weight * output.float().sum()


@pytest.mark.parametrize(
    ("weight", "scale", "lost"),
    [(1.0, 1.0, 0.0), (2.0**-12, 1.0, 1 / 3), (2.0**-20, 1.0, 2 / 3), (2.0**-20, 2.0**20, 0.0), (2.0**-30, 1.0, 1.0)],
)
def test_the_measured_share_of_known_gradients(weight: float, scale: float, lost: float) -> None:
    line, term = half_line(weight)
    assert lost_share(term, [line.weight], scale) == pytest.approx(lost)


def test_terms_without_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert lost_share(torch.tensor(1.0), [weight], 1.0) == 0.0
    assert lost_share((2 * nn.Parameter(torch.ones(2))).sum(), [weight], 1.0) == 0.0
    assert lost_share(weight.sum(), [], 1.0) == 0.0


class Scaler:
    def get_scale(self) -> float:
        return 2.0**3


def test_the_watch_warns_once_of_each_term(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator: Any = SimpleNamespace(mixed_precision="fp16", scaler=Scaler())
    watch = UnderflowWatch(accelerator)
    line, term = half_line(2.0**-20)
    for _ in range(2):
        shares = watch.measure("student", {"vid": term, "l1": term * 2.0**18}, [line.weight])
        assert {name: round(value.item(), 3) for name, value in shares.items()} == {
            "underflow/student/vid": 0.667,
            "underflow/student/l1": 0.0,
        }
    assert watch.scale == 8
    assert capsys.readouterr().err == (
        "warning: train.precision: fp16 loses 67% of the gradient of student/vid (zero with the loss scale 2^3): "
        "this term hardly trains; use train.precision=bf16 or fp32, or give it more weight\n"
    )


def test_other_precisions_are_not_measured() -> None:
    line, term = half_line(2.0**-20)
    accelerator: Any = SimpleNamespace(mixed_precision="bf16", scaler=None)
    watch = UnderflowWatch(accelerator)
    assert (watch.measure("student", {"vid": term}, [line.weight]), watch.scale) == ({}, 1.0)


def test_a_term_that_overflows_keeps_its_place_in_the_log() -> None:
    """Left out on the rank where it overflows, the ranks' sums would no longer be of the same terms."""
    accelerator: Any = SimpleNamespace(mixed_precision="fp16", scaler=Scaler())
    line, term = half_line(2.0**-20)
    shares = UnderflowWatch(accelerator).measure("student", {"vid": term, "l1": term * 2.0**40}, [line.weight])
    assert list(shares) == ["underflow/student/vid", "underflow/student/l1"]
    assert shares["underflow/student/l1"].isnan()
