"""Style, feature and discriminator distillation against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcdistill.losses.discriminator_distillation import dcd, spectral
from hpcdistill.losses.perceptual import feature, style

SHAPES = {"relu1_2": (2, 4, 6, 6), "relu2_2": (2, 8, 3, 3), "relu4_3": (2, 16, 1, 2)}


def maps(seed: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    return {name: torch.from_numpy(generator.standard_normal(shape)) for name, shape in SHAPES.items()}


def test_feature_is_the_sum_of_the_layers_means() -> None:
    student, teacher = maps(1), maps(2)
    expected = sum(np.abs(student[name].numpy() - teacher[name].numpy()).mean() for name in SHAPES)
    result = feature(student, teacher)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-13)
    assert dcd(student, teacher).item() == pytest.approx(expected, rel=1e-13)


def test_style_is_the_sum_of_the_grams_means() -> None:
    student, teacher = maps(1), maps(2)
    expected = 0.0
    for name, (batch, channels, height, width) in SHAPES.items():
        s, t = (x[name].numpy().reshape(batch, channels, -1) for x in (student, teacher))
        grams = [x @ x.transpose(0, 2, 1) / (channels * height * width) for x in (s, t)]
        expected += np.abs(grams[0] - grams[1]).sum() / (batch * channels**2)
    assert style(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_spectral_by_hand() -> None:
    student = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[0.5], [0.0]])}
    teacher = {"b": torch.tensor([[0.0], [1.0]]), "a": torch.tensor([[1.0], [-2.0]])}
    assert spectral(student, teacher).item() == pytest.approx((0 + 4) / 2 + (0.5 + 1) / 2)


@pytest.mark.parametrize("loss", [feature, style, dcd, spectral])
def test_float32_whatever_comes_in(loss) -> None:
    student, teacher = ({name: x.bfloat16() for name, x in maps(seed).items()} for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(student, teacher)
    assert result.dtype == torch.float32
    exact = loss({k: x.double() for k, x in student.items()}, {k: x.double() for k, x in teacher.items()})
    assert result.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [feature, style])
def test_gradients_reach_the_student(loss) -> None:
    student = {name: x.requires_grad_() for name, x in maps(1).items()}
    teacher = maps(2)
    loss(student, teacher).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in student.values())
    assert loss(teacher, teacher) == 0


@pytest.mark.parametrize("loss", [feature, style, dcd, spectral])
def test_other_layers_or_shapes_are_refused(loss) -> None:
    student, teacher = maps(1), maps(2)
    del teacher["relu2_2"]
    with pytest.raises(ValueError, match=r"the same layers are compared.*relu2_2"):
        loss(student, teacher)
    with pytest.raises(ValueError, match="one at least"):
        loss({}, {})
    # Maps of other sizes: their Grams could be compared, and would mean nothing.
    with pytest.raises(ValueError, match="one shape"):
        loss({"a": torch.zeros(1, 2, 4, 4)}, {"a": torch.zeros(1, 2, 8, 8)})
