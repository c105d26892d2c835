"""Output distillation: every term against a float64 computation, gradients, one teacher's pass, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Carry, Progress
from hpcdistill.methods.output_distillation import OutputDistillation
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.sr_network import build_network

START = Progress.at(0, 1)
WEIGHTS = {"weight_reconstruction": 0.5, "weight_output": 2.0, "weight_feature": 0.25}


def teacher_of(name: str, scale: int = 2, channels: int = 1) -> nn.Module:
    torch.manual_seed(5)
    if name == "privileged":
        return PrivilegedTeacher(scale, channels, encoder="pisr", degradation="none")
    return build_network(name, scale, channels)


def build(teacher: str | None = "idn", **settings: Any) -> OutputDistillation:
    torch.manual_seed(7)
    settings = {"scale": 2, **settings}
    config = OutputDistillation.Config(**settings)
    teachers = {} if teacher is None else {"teacher": teacher_of(teacher, config.scale, config.channels)}
    return OutputDistillation(config, teachers)


def batch_of(method: OutputDistillation) -> dict[str, Tensor]:
    torch.manual_seed(11)
    scale, channels = method.config.scale, method.config.channels
    hr = torch.rand(2, channels, 24, 24)
    return {"hr": hr, f"lr{scale}": nn.functional.avg_pool2d(hr, scale)}


@pytest.mark.parametrize("teacher", ["idn", "fsrcnn", "privileged"])
@pytest.mark.parametrize(("scale", "channels"), [(2, 1), (3, 3)])
def test_the_terms_are_the_formula_s(teacher: str, scale: int, channels: int) -> None:
    method = build(teacher, scale=scale, channels=channels, **WEIGHTS).double()
    batch = {key: value.double() for key, value in batch_of(method).items()}
    lr, hr = batch[f"lr{scale}"], batch["hr"]
    terms = method.student_loss(batch, Carry(), START)
    assert list(terms) == ["reconstruction", "output", "feature"]
    trained = method.groups["student"].module
    student, projection, judge = method.student, trained.projection, method.teacher
    with torch.no_grad():
        sr = student(lr)
        taught = judge(hr if teacher == "privileged" else lr)
        layer = {"idn": "dblock4", "fsrcnn": "expanding", "privileged": "expanding"}[teacher]
        target = judge.features(hr if teacher == "privileged" else lr, layer)
        own = student.features(lr, "expanding")
        # A 1x1 convolution is a matrix product at each pixel.
        mapped = torch.einsum("oi,bihw->bohw", projection.weight[:, :, 0, 0], own) + projection.bias[:, None, None]
    expected = {
        "reconstruction": 0.5 * (sr - hr).abs().mean(),
        "output": 2.0 * (sr - taught).abs().mean(),
        "feature": 0.25 * (mapped - target).abs().mean(),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_gradients_reach_the_student_and_its_projection_alone() -> None:
    method = build(**WEIGHTS)
    sum(method.student_loss(batch_of(method), Carry(), START).values()).backward()
    module = method.groups["student"].module
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert sum(p.numel() for p in module.parameters()) > sum(p.numel() for p in method.student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in method.teacher.parameters())
    assert not method.train().teacher.training
    assert list(method.generators) == ["student"]


@pytest.mark.parametrize(
    ("weights", "calls"),
    [
        ({"weight_output": 1.0}, ["image"]),
        ({"weight_output": 0.0, "weight_feature": 1.0}, ["map"]),
        ({"weight_output": 1.0, "weight_feature": 1.0}, ["both"]),
    ],
)
def test_the_teacher_runs_once_and_no_further_than_it_is_asked(
    weights: dict[str, float], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(**weights)
    teacher: Any = method.teacher
    forward, features, seen = teacher.forward, teacher.features, []

    def watched_forward(image: Tensor, maps: tuple[str, ...] = ()) -> Any:
        assert not torch.is_grad_enabled()
        seen.append("both" if maps else "image")
        return forward(image, maps) if maps else forward(image)

    def watched_features(image: Tensor, name: str) -> Any:
        seen.append("map")
        return features(image, name)

    monkeypatch.setattr(teacher, "forward", watched_forward)
    monkeypatch.setattr(teacher, "features", watched_features)
    method.student_loss(batch_of(method), Carry(), START)
    assert seen == calls


def test_without_a_teacher_s_term_none_is_needed() -> None:
    method = build(None, weight_output=0.0)
    assert not method.config.learns()
    assert list(method.student_loss(batch_of(method), Carry(), START)) == ["reconstruction"]


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        (None, {}, "teacher: the method needs a teacher; name its config under `teacher.config`"),
        ("vdsr", {"weight_feature": 1.0}, "expanding has 8x8 pixels where the teacher's conv19 has 16x16"),
        ("idn", {"weight_feature": 1.0, "layer": "expandin"}, "did you mean 'expanding'"),
        ("idn", {"weight_feature": 1.0, "teacher_layer": "expanding"}, "method.teacher_layer: no layer 'expanding'"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: str | None, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(teacher, **settings)


@pytest.mark.parametrize(("key", "value"), [("scale", 4), ("channels", 3)])
def test_a_teacher_of_another_shape_is_refused(key: str, value: int) -> None:
    config = OutputDistillation.Config(scale=2)
    arguments = {"scale": 2, "channels": 1, key: value}
    with pytest.raises(
        UserError, match=f"teacher: its {key} is {value}, the student's is {arguments and config.model_dump()[key]}"
    ):
        OutputDistillation(config, {"teacher": teacher_of("fsrcnn", **arguments)})


def test_something_must_be_learnt() -> None:
    with pytest.raises(ValueError, match="all are 0"):
        OutputDistillation.Config(scale=2, weight_reconstruction=0, weight_output=0)
