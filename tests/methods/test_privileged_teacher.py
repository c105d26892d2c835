"""The teacher's losses: equation 13 and the cells of tables 1 to 3."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcdistill.data.needs import Needs
from hpcdistill.methods.base import Carry, Progress, Terms
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining

START = Progress.at(0, 1)

SIDE = 24


def build(**values: Any) -> PrivilegedTeacherTraining:
    torch.manual_seed(0)
    return PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(**({"scale": 4} | values)))


def batch_of(method: PrivilegedTeacherTraining) -> dict[str, Tensor]:
    """A batch of what the method asks for: independent noise at every size."""
    generator = torch.Generator().manual_seed(1)
    channels = method.needs.channels
    sides = {"hr": SIDE} | {f"lr{scale}": SIDE // scale for scale in method.needs.lr_scales}
    return {name: torch.rand(2, channels, side, side, generator=generator) for name, side in sides.items()}


def l1(first: Tensor, second: Tensor) -> float:
    left: NDArray[np.float64] = first.detach().double().numpy()
    return float(np.abs(left - second.double().numpy()).mean())


def reached(method: PrivilegedTeacherTraining, terms: Terms, term: str) -> set[str]:
    """Which parts of the teacher a term's gradient reaches."""
    names, parameters = zip(*method.teacher.named_parameters(), strict=True)
    gradients = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
    return {
        name.split(".")[0]
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }


def test_equation_13() -> None:
    """Each term by hand in float64: G once and twice, F, D once and twice."""
    method = build(weight_fre=0.3, weight_deg=0.07)
    batch = batch_of(method)
    terms = method.teacher_loss(batch, Carry(), START)
    assert method.needs == Needs("lr-hr", 4, (2, 4), 1)
    teacher = method.double().teacher
    assert teacher.encoder is not None
    assert teacher.degradation is not None
    with torch.no_grad():
        half = teacher.encoder(batch["hr"].double())
        quarter = teacher.encoder(half)
        enlarged = teacher.network(quarter)
        half_again = teacher.degradation(enlarged)
        quarter_again = teacher.degradation(half_again)
    expected = {
        "reconstruction": l1(enlarged, batch["hr"]),
        "encoder_lr2": 0.3 * l1(half, batch["lr2"]),
        "encoder_lr4": 0.3 * l1(quarter, batch["lr4"]),
        "degradation_lr2": 0.07 * l1(half_again, batch["lr2"]),
        "degradation_lr4": 0.07 * l1(quarter_again, batch["lr4"]),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
        assert terms[name].dtype == torch.float32
        assert terms[name].shape == ()


def test_where_the_gradients_go() -> None:
    method = build()
    terms = method.teacher_loss(batch_of(method), Carry(), START)
    assert reached(method, terms, "reconstruction") == {"encoder", "network"}
    assert reached(method, terms, "encoder_lr2") == {"encoder"}
    assert reached(method, terms, "encoder_lr4") == {"encoder"}
    assert reached(method, terms, "degradation_lr2") == {"encoder", "network", "degradation"}
    assert reached(method, terms, "degradation_lr4") == {"encoder", "network", "degradation"}


CELLS: dict[str, tuple[dict[str, Any], tuple[int, ...], list[str]]] = {
    "x2": ({"scale": 2}, (2,), ["encoder_lr2", "degradation_lr2"]),
    "x3": ({"scale": 3}, (3,), ["encoder_lr3", "degradation_lr3"]),
    "rgb": ({"channels": 3}, (2, 4), ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"]),
    "pisr": ({"encoder": "pisr", "degradation": "none"}, (4,), ["encoder_lr4"]),
    "pisr and sdm": ({"encoder": "pisr"}, (2, 4), ["encoder_lr4", "degradation_lr2", "degradation_lr4"]),
    "hfrm alone": ({"degradation": "none"}, (2, 4), ["encoder_lr2", "encoder_lr4"]),
    "bicubic encoder": ({"encoder": "bicubic"}, (2, 4), ["degradation_lr2", "degradation_lr4"]),
    "cnn": ({"degradation": "cnn"}, (2, 4), ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"]),
    "bicubic": (
        {"degradation": "bicubic"},
        (2, 4),
        ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"],
    ),
    "first level": ({"levels": 1}, (2,), ["encoder_lr2", "degradation_lr2"]),
    "no level": ({"levels": 0}, (), []),
    "vdsr": ({"network": "vdsr"}, (2, 4), ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"]),
    "idn": ({"network": "idn"}, (2, 4), ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"]),
    "pisr and idn": ({"network": "idn", "encoder": "pisr", "degradation": "none"}, (4,), ["encoder_lr4"]),
    "tied": ({"tie_sdm": True}, (2, 4), ["encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"]),
}


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_has_its_terms(cell: str) -> None:
    values, scales, names = CELLS[cell]
    method = build(**values, weight_fre=0.5, weight_deg=0.25)
    assert method.needs == Needs("lr-hr", values.get("scale", 4), scales, values.get("channels", 1))
    batch = batch_of(method)
    terms = method.teacher_loss(batch, Carry(), START)
    assert list(terms) == ["reconstruction", *names]
    image = batch["lr4"] if method.teacher.takes == "lr" else batch["hr"]
    with torch.no_grad():
        output = method.double().teacher(image.double(), supervised=True)
    assert terms["reconstruction"].item() == pytest.approx(l1(output.sr, batch["hr"]), rel=1e-5)
    images = dict(zip(names, [*output.encoded, *output.degraded], strict=True))
    for name, level in images.items():
        weight = 0.5 if name.startswith("encoder") else 0.25
        target = batch[name.split("_")[1]]
        assert level.shape == target.shape
        assert terms[name].item() == pytest.approx(weight * l1(level, target), rel=1e-5), name
    # Whatever the cell, nothing is built that does not train.
    method = build(**values)
    sum(method.teacher_loss(batch, Carry(), START).values()).backward()
    assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []


def test_a_term_of_weight_zero_changes_nothing() -> None:
    method = build(weight_fre=0.0, weight_deg=0.0)
    terms = method.teacher_loss(batch_of(method), Carry(), START)
    gradients = []
    for total in (sum(terms.values()), terms["reconstruction"]):
        assert isinstance(total, Tensor)
        parameters = [*method.teacher.network.parameters()]
        gradients.append(torch.autograd.grad(total, parameters, retain_graph=True))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_weights_are_tensors_outside_the_state() -> None:
    """0-dim, so that a captured graph can change them; not saved, so that a checkpoint does not bring back old ones."""
    method = build(weight_fre=0.3)
    assert method.weight_fre.shape == ()
    assert "weight_fre" not in method.state_dict()
    before = method.teacher_loss(batch_of(method), Carry(), START)["encoder_lr2"].item()
    method.weight_fre.fill_(0.6)
    assert method.teacher_loss(batch_of(method), Carry(), START)["encoder_lr2"].item() == pytest.approx(
        2 * before, rel=1e-6
    )


def test_the_contract() -> None:
    method = build()
    assert method.generators == {"teacher": method.teacher}
    assert method.groups["teacher"].module is method.teacher
    assert [(phase.name, phase.group) for phase in method.phases] == [("teacher", "teacher")]
