"""Super-resolution without distillation: one term, one network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.data.needs import Needs
from hpcdistill.methods.base import Carry, Progress
from hpcdistill.methods.plain_sr import PlainSR

START = Progress.at(0, 1)


def build(scale: int, channels: int, network: str = "fsrcnn") -> PlainSR:
    torch.manual_seed(0)
    return PlainSR(PlainSR.Config(scale=scale, channels=channels, network=network))


@pytest.mark.parametrize("network", ["fsrcnn", "vdsr", "idn"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_term_is_the_mean_absolute_error(scale: int, channels: int, network: str) -> None:
    method = build(scale, channels, network)
    assert type(method.student).__name__.lower() == network
    batch = {
        "hr": torch.rand(2, channels, 12 * scale, 9 * scale),
        f"lr{scale}": torch.rand(2, channels, 12, 9),
    }
    terms = method.student_loss(batch, Carry(), START)
    assert list(terms) == ["reconstruction"]
    with torch.no_grad():
        output = method.double().student(batch[f"lr{scale}"].double())
    expected = np.abs(output.numpy() - batch["hr"].double().numpy()).mean()
    assert terms["reconstruction"].shape == ()
    assert terms["reconstruction"].item() == pytest.approx(expected, rel=1e-6)


def test_every_weight_gets_its_gradient() -> None:
    method = build(2, 1).double()
    batch = {"hr": torch.rand(1, 1, 16, 16).double(), "lr2": torch.rand(1, 1, 8, 8).double()}
    method.student_loss(batch, Carry(), START)["reconstruction"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    # The last bias moves every pixel alike: its gradient is the mean sign of the error.
    with torch.no_grad():
        error = method.student(batch["lr2"]) - batch["hr"]
    bias = method.student.get_parameter("upsampling.conv.bias").grad
    assert bias is not None
    assert bias.item() == pytest.approx(np.sign(error.numpy()).mean(), abs=1e-12)


def test_an_unknown_network_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="unknown network 'edsr'; did you mean 'vdsr'"):
        PlainSR.Config(scale=2, network="edsr")


def test_the_contract() -> None:
    method = build(3, 3)
    assert method.needs == Needs("lr-hr", 3, (3,), 3)
    [phase] = method.phases
    assert (phase.name, phase.group) == ("student", "student")
    [segment] = method.segments()
    assert (segment.phases, segment.steps, segment.load) == (method.phases, None, ())
    assert method.generators == {"student": method.student}
    assert method.groups["student"].module is method.student
    assert method.groups["student"].optimizer == method.config.optimizer
    assert not method.config.learns()


def test_the_networks_pass_goes_through_the_wrapper() -> None:
    method = build(2, 1)
    calls = []

    def wrapper(image: torch.Tensor) -> torch.Tensor:
        calls.append(image.shape)
        output: torch.Tensor = method.student(image)
        return output

    method.bind("student", wrapper)
    method.student_loss({"hr": torch.rand(1, 1, 8, 8), "lr2": torch.rand(1, 1, 4, 4)}, Carry(), START)
    assert calls == [(1, 1, 4, 4)]


def test_images_of_another_size_are_refused() -> None:
    method = build(2, 1)
    with pytest.raises(ValueError, match=r"not \[1, 1, 8, 8\] and \[1, 1, 12, 12\]"):
        method.student_loss({"hr": torch.rand(1, 1, 12, 12), "lr2": torch.rand(1, 1, 4, 4)}, Carry(), START)
