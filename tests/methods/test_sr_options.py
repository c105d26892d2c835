"""Options that every super-resolution student has: residual, collapse, first weights, the finish, VID's ramps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hpcdistill.errors import UserError
from hpcdistill.losses import fourier, l2
from hpcdistill.methods.base import Carry, Method, Progress
from hpcdistill.methods.output_distillation import OutputDistillation
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.models import NETWORKS
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.sr_network import build_network
from hpcdistill.ops.bicubic import upsample
from hpcdistill.settings import identity_values
from tests.training.toy import ToyReader, rows, run

SIDE = 8
WIDE = {"form": "linear", "width": 64}


def samples(numbers: np.ndarray) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(numbers[0]))
    hr = torch.rand(len(numbers), 1, 2 * SIDE, 2 * SIDE, generator=generator)
    return {"hr": hr, "lr2": hr[..., ::2, ::2].contiguous()}


def train(method: Method, folder: Path, steps: int = 2, **options: Any) -> list[dict[str, Any]]:
    """A few steps by the real loop; the lines that it logged."""
    run(method, ToyReader(2, samples), folder, steps, **options)
    return rows(folder)


# The residual


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_residual_adds_the_bicubic_image(name: str, scale: int) -> None:
    torch.manual_seed(0)
    alone = build_network(name, scale, 3, residual="none")
    torch.manual_seed(0)
    adding = build_network(name, scale, 3, residual="bicubic")
    assert alone.state_dict().keys() == adding.state_dict().keys()
    image = torch.rand(1, 3, 6, 5)
    expected = alone(image).double() + upsample(image.double(), scale)
    torch.testing.assert_close(adding(image).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(adding.deploy()(image), adding(image), rtol=0, atol=1e-5)
    assert adding.deploy().arguments == {**adding.deploy().arguments, **_own(name, "bicubic")}


def _own(name: str, residual: str) -> dict[str, str]:
    return {} if residual == NETWORKS[name].RESIDUAL else {"residual": residual}


def test_the_networks_own_residual_is_the_default_of_the_identity() -> None:
    assert (NETWORKS["fsrcnn"].RESIDUAL, NETWORKS["vdsr"].RESIDUAL, NETWORKS["idn"].RESIDUAL) == (
        "none",
        "bicubic",
        "bicubic",
    )
    for network, own in (("fsrcnn", "none"), ("idn", "bicubic")):
        plain = identity_values(PlainSR.Config(scale=2, network=network))
        assert identity_values(PlainSR.Config(scale=2, network=network, residual=own)) == plain
    assert identity_values(PlainSR.Config(scale=2, residual="bicubic"))["residual"] == "bicubic"


def test_the_teacher_adds_the_enlargement_of_what_it_encoded() -> None:
    config = PrivilegedTeacherTraining.Config(scale=2, residual="bicubic")
    torch.manual_seed(0)
    teacher = PrivilegedTeacherTraining(config).teacher
    hr = torch.rand(1, 1, 12, 12)
    assert teacher.encoder is not None
    encoded = teacher.encoder(hr)
    torch.manual_seed(0)
    alone = PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(scale=2)).teacher
    torch.testing.assert_close(teacher(hr), alone(hr) + upsample(encoded, 2), rtol=0, atol=1e-6)
    rebuilt = PrivilegedTeacher(**teacher.arguments)
    rebuilt.load_state_dict(teacher.state_dict())
    assert torch.equal(rebuilt(hr), teacher(hr))


@pytest.mark.parametrize("values", [{"residual": "bicubic"}, {"collapse": WIDE}])
def test_a_student_starts_only_from_a_teacher_of_its_own_form(values: dict[str, Any]) -> None:
    teacher = PrivilegedTeacher(2)
    [key] = values
    with pytest.raises(UserError, match=rf"its {key} is None.*method.{key} alike in both configs .teacher.overrides"):
        PrivilegedStudent(PrivilegedStudent.Config(scale=2, **values), {"teacher": teacher})
    PrivilegedStudent(PrivilegedStudent.Config(scale=2, initialise="random", **values), {"teacher": teacher})


# First weights


def test_pytorchs_first_weights() -> None:
    torch.manual_seed(0)
    method = PlainSR(PlainSR.Config(scale=2, first_weights="pytorch"))
    for name in ("feature.0", "mapping.1.0", "expanding.0"):
        layer = method.student.get_submodule(name)
        weight, bound = layer.weight, 1 / math.sqrt(layer.weight[0].numel())  # type: ignore[union-attr]
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert layer.bias.abs().max() > 0  # type: ignore[union-attr]
    assert "first_weights" not in method.student.arguments
    teacher = PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(scale=2, first_weights="pytorch")).teacher
    for part in (teacher.encoder, teacher.degradation, teacher.network):
        assert part is not None
        first = next(layer for layer in part.modules() if isinstance(layer, torch.nn.Conv2d))
        assert first.bias is not None
        assert first.bias.abs().max() > 0


# The finish


def test_l2_and_the_fourier_loss_by_numpy() -> None:
    generator = np.random.default_rng(0)
    image, target = generator.random((2, 2, 3, 6, 8))
    result = l2(torch.from_numpy(image), torch.from_numpy(target)).item()
    assert result == pytest.approx(((image - target) ** 2).mean(), rel=1e-12)
    transform = np.fft.rfft2(image - target, norm="ortho")
    expected = (np.abs(transform.real) + np.abs(transform.imag)).mean()
    assert fourier(torch.from_numpy(image), torch.from_numpy(target)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["l2", "fourier"])
@pytest.mark.parametrize("kind", [PlainSR, OutputDistillation, PrivilegedStudent])
def test_the_finish_is_the_runs_last_share(loss: str, kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = kind.Config(scale=2, finish={"loss": loss, "share": 0.3})
    method = kind(config, {"teacher": PrivilegedTeacher(2)} if kind is not PlainSR else {})
    rows = train(method, tmp_path, steps=7)
    assert ["finish/reconstruction" in row for row in rows] == [False] * 5 + [True] * 2  # 0.3 of 7 is 2.1
    assert ["student/reconstruction" in row for row in rows] == [True] * 5 + [False] * 2


def test_the_finish_computes_its_loss() -> None:
    torch.manual_seed(0)
    method = PlainSR(PlainSR.Config(scale=2, finish={"loss": "l2", "share": 0.5}))
    batch = samples(np.arange(2))
    _, finish = method.segments()
    terms = finish.phases[0].loss(batch, Carry(), Progress.at(1, 2))
    error = (method.student(batch["lr2"]) - batch["hr"]).detach().double().numpy()
    assert terms["reconstruction"].item() == pytest.approx((error**2).mean(), rel=1e-6)


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ValidationError, match=r"finish.share"):
        PlainSR.Config(scale=2, finish={"loss": "l2", "share": share})


# VID's scale and ramps


def test_the_scale_of_b() -> None:
    def scale_of_b(**values: Any) -> Tensor:
        torch.manual_seed(0)
        method = PrivilegedStudent(PrivilegedStudent.Config(scale=2, **values), {"teacher": PrivilegedTeacher(2)})
        return method.groups["student"].module(torch.ones(1, 1, 4, 4)).b

    torch.testing.assert_close(scale_of_b(vid_scale=1.0), 10 * scale_of_b() - 9e-8, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("values", "factors"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"vid_warm_up": 0.5}, [0, 0.4, 0.8, 1, 1]),
        ({"vid_fade": 0.5}, [1, 1, 1, 0.8, 0.4]),
        ({"vid_warm_up": 0.2, "vid_fade": 0.4}, [0, 1, 1, 1, 0.5]),
    ],
)
def test_the_ramps_of_the_weight(values: dict[str, float], factors: list[float]) -> None:
    torch.manual_seed(0)
    config = PrivilegedStudent.Config(scale=2, weight_vid=0.01, **values)
    method = PrivilegedStudent(config, {"teacher": PrivilegedTeacher(2)})
    batch = samples(np.arange(2))
    full = PrivilegedStudent.Config(scale=2, weight_vid=0.01)
    method.config = full
    whole = method.student_loss(batch, Carry(), Progress.at(0, 5))["vid"].item()
    method.config = config
    weights = [method.student_loss(batch, Carry(), Progress.at(step, 5))["vid"].item() / whole for step in range(5)]
    assert weights == pytest.approx(factors, rel=1e-5)


# All of them train


@pytest.mark.parametrize(
    "values",
    [
        {"residual": "bicubic"},
        {"collapse": WIDE},
        {"collapse": {"form": "edge"}, "residual": "bicubic"},
        {"collapse": {"form": "bottleneck", "width": 56, "repeats": 2, "skip": False, "layers": ["mapping.0.0"]}},
        {"first_weights": "pytorch"},
        {"initialise": "random", "vid_scale": 1.0, "vid_warm_up": 0.5, "vid_fade": 0.5},
    ],
)
@pytest.mark.parametrize("kind", [PlainSR, PrivilegedStudent])
def test_two_steps_change_every_weight_and_deploy_equals(kind: Any, values: dict[str, Any], tmp_path: Path) -> None:
    if kind is PlainSR:
        values = {key: value for key, value in values.items() if "vid" not in key and key != "initialise"}
    shared = {key: value for key, value in values.items() if key in ("residual", "collapse", "first_weights")}
    torch.manual_seed(0)
    teacher = PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(scale=2, **shared)).teacher
    method = kind(kind.Config(scale=2, **values), {} if kind is PlainSR else {"teacher": teacher})
    before = {name: weight.clone() for name, weight in method.student.named_parameters()}
    rows = train(method, tmp_path, ema=0.5, channels_last=True)
    assert len(rows) == 2
    for name, weight in method.student.named_parameters():
        assert not torch.equal(weight, before[name]), name
    image = torch.rand(1, 1, 9, 7)
    method.student.eval()
    torch.testing.assert_close(method.student.deploy()(image), method.student(image), rtol=0, atol=1e-5)
