"""The student's losses: equation 16, the two forms of VID, and what the teacher may and may not do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toy import ToyReader, run

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Carry, Progress, Terms
from hpcdistill.methods.privileged_student import PrivilegedStudent, StudentWithEstimator
from hpcdistill.models import NETWORKS
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.settings import identity_values

START = Progress.at(0, 1)

SIDE = 16


def build(teacher: nn.Module | None = None, **values: Any) -> PrivilegedStudent:
    config = PrivilegedStudent.Config(**({"scale": 2, "weight_vid": 0.01} | values))
    if teacher is None:
        torch.manual_seed(0)
        teacher = PrivilegedTeacher(config.scale, config.channels, network=config.network)
    torch.manual_seed(1)
    return PrivilegedStudent(config, {"teacher": teacher})


def batch_of(method: PrivilegedStudent, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scale, channels = method.config.scale, method.config.channels
    sides = {"hr": SIDE * scale, f"lr{scale}": SIDE}
    return {name: torch.rand(2, channels, side, side, generator=generator).to(dtype) for name, side in sides.items()}


def estimator_of(method: PrivilegedStudent) -> nn.Module:
    module = method.groups["student"].module
    assert isinstance(module, StudentWithEstimator)
    assert module.estimator is not None
    return module.estimator


def softplus(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.logaddexp(0, values)


def one_by_one(image: NDArray[np.float64], layer: nn.Conv2d) -> NDArray[np.float64]:
    """A 1x1 convolution as a product of matrices."""
    assert layer.bias is not None
    weight, bias = (value.detach().double().numpy() for value in (layer.weight, layer.bias))
    return np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], image) + bias[None, :, None, None]


def branch(image: NDArray[np.float64], layers: nn.Module) -> NDArray[np.float64]:
    """Conv 1x1, PReLU, conv 1x1 in NumPy."""
    assert isinstance(layers, nn.Sequential)
    (first, activation), last = layers[0], layers[1]
    hidden = one_by_one(image, first)
    hidden = np.where(hidden > 0, hidden, float(activation.weight.item()) * hidden)
    return one_by_one(hidden, last)


@pytest.mark.parametrize("vid", ["laplace", "gaussian", "none"])
@pytest.mark.parametrize(("scale", "channels"), [(2, 1), (3, 3), (4, 1)])
def test_equation_16(scale: int, channels: int, vid: str) -> None:
    """Reconstruction and VID by hand in float64, the estimator included."""
    method = build(scale=scale, channels=channels, vid=vid, initialise="random")
    batch = batch_of(method)
    terms = method.student_loss(batch, Carry(), START)
    assert list(terms) == ["reconstruction"] + (["vid"] if vid != "none" else [])
    wide = {name: value.double() for name, value in batch.items()}
    student = method.student.double()
    with torch.no_grad():
        sr, maps = student(wide[f"lr{scale}"], maps=("expanding",))
    expected = np.abs(sr.numpy() - wide["hr"].numpy()).mean()
    assert terms["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    if vid == "none":
        return
    teacher = method.teacher.double()
    with torch.no_grad():
        _, teacher_maps = teacher.network(teacher.encode(wide["hr"])[-1], maps=("expanding",))
    target, student_map = teacher_maps["expanding"].numpy(), maps["expanding"].numpy()
    assert target.shape == student_map.shape == (2, 56, SIDE, SIDE)
    estimator = estimator_of(method)
    mu = branch(student_map, estimator.get_submodule("mu"))
    b = 0.1 * softplus(branch(student_map, estimator.get_submodule("b"))) + 1e-8
    if vid == "laplace":
        distance = (np.log(2 * b) + np.abs(target - mu) / b).mean()
    else:
        distance = (np.log(b) + (target - mu) ** 2 / (2 * b**2) + 0.5 * math.log(2 * math.pi)).mean()
    assert terms["vid"].item() == pytest.approx(0.01 * distance, rel=1e-4)


def reached(method: PrivilegedStudent, terms: Terms, term: str) -> set[str]:
    """Which parts of the student, estimator and teacher a term's gradient reaches."""
    names, parameters = [], []
    for name, parameter in method.groups["student"].module.named_parameters():
        names.append(".".join(name.split(".")[:2]))
        parameters.append(parameter)
    gradients = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
    return {
        name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and bool(gradient.any())
    }


@pytest.mark.parametrize("vid", ["laplace", "gaussian"])
def test_where_the_gradients_go(vid: str) -> None:
    method = build(vid=vid)
    terms = method.student_loss(batch_of(method), Carry(), START)
    shared = {"network.feature", "network.shrinking", "network.mapping", "network.expanding"}
    assert reached(method, terms, "reconstruction") == shared | {"network.upsampling"}
    assert reached(method, terms, "vid") == shared | {"estimator.mu", "estimator.b"}
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.groups["student"].module.parameters())


def test_the_distilled_layer_can_be_another() -> None:
    method = build(layer="shrinking")
    terms = method.student_loss(batch_of(method), Carry(), START)
    assert reached(method, terms, "vid") == {
        "network.feature",
        "network.shrinking",
        "estimator.mu",
        "estimator.b",
    }
    assert estimator_of(method).get_submodule("mu.1").weight.shape[0] == 12  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("network", "layer", "channels", "parameters"),
    [("fsrcnn", "expanding", 56, 12_770), ("vdsr", "conv19", 64, 16_642), ("idn", "dblock4", 64, 16_642)],
)
def test_every_network_has_its_own_distilled_layer(network: str, layer: str, channels: int, parameters: int) -> None:
    """Default and spelt out: the same layer of student and teacher, and nobody but student and estimator trains."""
    scale = 2
    method, spelt_out = (build(network=network, scale=scale, layer=name) for name in (None, layer))
    assert NETWORKS[network].DISTILLED == method.layer == spelt_out.layer == layer
    assert sum(parameter.numel() for parameter in estimator_of(method).parameters()) == parameters
    batch = batch_of(method)
    terms = method.student_loss(batch, Carry(), START)
    assert terms["vid"].item() == spelt_out.student_loss(batch, Carry(), START)["vid"].item()
    side = SIDE * scale if network == "vdsr" else SIDE
    mu = method.call("student", batch[f"lr{scale}"]).mu
    assert mu.shape == (2, channels, side, side)
    # VID from the maps of student and teacher, by hand.
    with torch.no_grad():
        student_map = method.student.features(batch[f"lr{scale}"], layer)
        target = method.teacher.network.features(method.teacher.encode(batch["hr"])[-1], layer)
        mu, b = (value.double().numpy() for value in estimator_of(method)(student_map))
    expected = 0.01 * (np.log(2 * b) + np.abs(target.double().numpy() - mu) / b).mean()
    assert terms["vid"].item() == pytest.approx(expected, rel=1e-4)
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.groups["student"].module.parameters())
    last = list(method.student.children())[-1]
    gradient = torch.autograd.grad(
        method.student_loss(batch, Carry(), START)["vid"], list(last.parameters()), allow_unused=True
    )
    assert gradient == (None,) * len(gradient), "VID does not reach what lies behind the distilled layer"


@pytest.mark.parametrize("network", ["vdsr", "idn"])
def test_the_other_networks_start_from_the_teachers(network: str) -> None:
    taken, random = (build(network=network, initialise=start) for start in ("teacher", "random"))
    own = taken.teacher.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in taken.student.state_dict().items())
    assert not any(torch.equal(value, own[name]) for name, value in random.student.state_dict().items() if value.any())


def test_the_identity_of_runs_with_fsrcnn_is_what_it_was() -> None:
    """The values that were hashed before there were other networks; spelling a default out changes nothing."""
    config = PrivilegedStudent.Config
    assert identity_values(config(scale=4)) == {"scale": 4}
    assert identity_values(config(scale=4, layer="expanding", network="fsrcnn")) == {"scale": 4}
    assert identity_values(config(scale=4, layer="mapping")) == {"scale": 4, "layer": "mapping"}
    # and of those with another
    assert identity_values(config(scale=4, network="vdsr")) == {"scale": 4, "network": "vdsr"}
    assert identity_values(config(scale=4, network="vdsr", layer="conv19")) == {"scale": 4, "network": "vdsr"}
    assert identity_values(config(scale=4, network="idn", layer="dblock4")) == {"scale": 4, "network": "idn"}
    assert identity_values(config(scale=4, network="idn", layer="fblock"))["layer"] == "fblock"


def never_called(module: nn.Module, inputs: Any) -> None:
    raise AssertionError(f"{type(module).__name__} was called")


@pytest.mark.parametrize("encoder", ["hfrm", "pisr", "bicubic"])
def test_the_teachers_pass_stops_at_the_distilled_layer(encoder: str) -> None:
    torch.manual_seed(0)
    teacher = PrivilegedTeacher(2, 1, encoder=encoder, degradation="none" if encoder != "hfrm" else "sdm")
    method = build(teacher)
    teacher.network.upsampling.register_forward_pre_hook(never_called)
    if teacher.degradation is not None:
        teacher.degradation.register_forward_pre_hook(never_called)
    sizes: list[tuple[int, ...]] = []
    grads: list[bool] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(tuple(inputs[0].shape))
        grads.append(output.requires_grad)

    teacher.network.feature.register_forward_hook(seen)
    with torch.enable_grad():
        method.student_loss(batch_of(method), Carry(), START)
    assert sizes == [(2, 1, SIDE, SIDE)]
    assert grads == [False]


def test_a_teacher_fed_with_the_lr_image() -> None:
    """Table 1's bicubic encoder: F alone, on the LR image of the batch."""
    torch.manual_seed(0)
    teacher = PrivilegedTeacher(2, 1, encoder="bicubic", degradation="none")
    method = build(teacher)
    batch = batch_of(method)
    seen: list[Tensor] = []
    teacher.network.feature.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.student_loss(batch, Carry(), START)
    assert torch.equal(seen[0], batch["lr2"])


def test_the_teacher_is_frozen_and_stays_in_eval_mode() -> None:
    torch.manual_seed(0)
    teacher = PrivilegedTeacher(2).train()
    method = build(teacher)
    for mode in (True, False, True):
        method.train(mode)
        assert not any(module.training for module in teacher.modules())
        assert all(module.training is mode for module in method.groups["student"].module.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trained = {id(parameter) for group in method.groups.values() for parameter in group.module.parameters()}
    assert trained.isdisjoint(id(parameter) for parameter in teacher.parameters())


def test_where_the_students_weights_start() -> None:
    torch.manual_seed(0)
    teacher = PrivilegedTeacher(2)
    taken, random = (build(teacher, initialise=start).student.state_dict() for start in ("teacher", "random"))
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(taken[name], value)
        assert taken[name].data_ptr() != value.data_ptr()  # its own copy
    assert not torch.equal(random["feature.0.weight"], taken["feature.0.weight"])
    torch.manual_seed(1)
    assert torch.equal(random["feature.0.weight"], FSRCNN(2).state_dict()["feature.0.weight"])


def test_without_vid_there_is_no_estimator() -> None:
    method = build(vid="none")
    assert sum(parameter.numel() for parameter in method.groups["student"].module.parameters()) == 12_644
    laplace = build(vid="laplace")
    assert sum(parameter.numel() for parameter in laplace.groups["student"].module.parameters()) == 12_644 + 12_770


def test_a_random_student_without_vid_needs_no_teacher() -> None:
    config = PrivilegedStudent.Config(scale=2, vid="none", initialise="random")
    method = PrivilegedStudent(config)
    assert list(method.student_loss(batch_of(method), Carry(), START)) == ["reconstruction"]


def test_the_weight_is_a_tensor_outside_the_state() -> None:
    method = build()
    assert "weight_vid" not in method.state_dict()
    first = method.student_loss(batch_of(method), Carry(), START)["vid"].item()
    method.weight_vid.mul_(3)
    assert method.student_loss(batch_of(method), Carry(), START)["vid"].item() == pytest.approx(3 * first, rel=1e-6)


def test_the_estimator_works_in_float32_under_autocast() -> None:
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.student_loss(batch_of(method), Carry(), START)
        output = method.call("student", batch_of(method)["lr2"])
    assert {name: term.dtype for name, term in terms.items()} == dict.fromkeys(terms, torch.float32)
    assert (output.sr.dtype, output.mu.dtype, output.b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = method.student_loss(batch_of(method), Carry(), START)
    assert terms["vid"].item() == pytest.approx(exact["vid"].item(), rel=0.05)


def test_the_contract() -> None:
    method = build(scale=4)
    assert method.needs == Needs("lr-hr", 4, (4,), 1)
    assert method.generators == {"student": method.student}
    assert method.config.learns()
    assert [(phase.name, phase.group) for phase in method.phases] == [("student", "student")]


@pytest.mark.parametrize(
    ("teacher", "values", "message"),
    [
        (None, {}, "needs a teacher; name its config under `teacher.config`"),
        (FSRCNN(2), {}, "teacher: is a FSRCNN; a privileged_student needs a privileged_teacher's run"),
        (PrivilegedTeacher(4), {}, "its scale is 4, the student's is 2; set method.scale alike in both configs"),
        (PrivilegedTeacher(2, 3), {}, "its channels is 3, the student's is 1; set method.channels alike"),
        (PrivilegedTeacher(2), {"network": "vdsr"}, "its network is fsrcnn, the student's is vdsr; set method.network"),
        (PrivilegedTeacher(2, network="idn"), {}, "its network is idn, .* teacher.overrides.method.network=fsrcnn"),
        (PrivilegedTeacher(2), {"layer": "expandng"}, "no layer 'expandng'; did you mean 'expanding'"),
        (
            PrivilegedTeacher(2, network="idn"),
            {"network": "idn", "layer": "expanding"},
            "no layer 'expanding'; valid: d",
        ),
        (
            PrivilegedTeacher(2, network="vdsr"),
            {"network": "vdsr", "layer": "conv20"},
            "no layer 'conv20'; did you mean",
        ),
        (None, {"vid": "none"}, "needs a teacher"),  # to start from
        (None, {"initialise": "random"}, "needs a teacher"),  # for VID
    ],
)
def test_refusals(teacher: nn.Module | None, values: dict[str, Any], message: str) -> None:
    config = PrivilegedStudent.Config(**({"scale": 2} | values))
    with pytest.raises(UserError, match=message) as error:
        PrivilegedStudent(config, {"teacher": teacher} if teacher else {})
    assert "\n" not in str(error.value)


def test_training_leaves_the_teacher_alone(tmp_path: Path) -> None:
    method = build()
    parts = {"teacher": method.teacher, "student": method.student, "estimator": estimator_of(method)}
    before = {name: {key: v.clone() for key, v in part.state_dict().items()} for name, part in parts.items()}
    run(method, ToyReader(2, lambda numbers: batch_of(method)), tmp_path, 3)
    moved = {
        name: [key for key, value in part.state_dict().items() if not torch.equal(value, before[name][key])]
        for name, part in parts.items()
    }
    assert moved["teacher"] == []
    assert set(moved["student"]) == set(before["student"])
    assert set(moved["estimator"]) == set(before["estimator"])
    assert not method.teacher.training
