"""VID's two forms against the densities they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcdistill.losses.variational import gaussian, laplace

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def test_laplace_by_hand() -> None:
    mu, b, target = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])
    # ln(1) + 1/0.5 = 2 and ln(4) + 1/2
    assert laplace(mu, b, target).item() == pytest.approx((2 + math.log(4) + 0.5) / 2)


def test_gaussian_by_hand() -> None:
    mu, b, target = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])
    # ln 0.5 + 1/(2 * 0.25) and ln 2 + 1/(2 * 4), each with ln(2 pi)/2
    expected = (math.log(0.5) + 2 + math.log(2) + 0.125) / 2 + math.log(2 * math.pi) / 2
    assert gaussian(mu, b, target).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "family"), [(laplace, torch.distributions.Laplace), (gaussian, torch.distributions.Normal)]
)
def test_is_the_mean_negative_log_likelihood(loss: Loss, family: type) -> None:
    torch.manual_seed(0)
    mu, target = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    b = torch.rand(2, 3, 4, 5, dtype=torch.float64) + 0.05
    torch.testing.assert_close(loss(mu, b, target), -family(mu, b).log_prob(target).mean(), rtol=1e-12, atol=0)


def test_laplace_is_least_at_the_mean_absolute_difference() -> None:
    difference = np.random.default_rng(0).normal(size=1000)
    target, mu = torch.from_numpy(difference), torch.zeros(1000, dtype=torch.float64)

    def at(b: float) -> float:
        return laplace(mu, torch.full_like(mu, b), target).item()

    best = np.abs(difference).mean()
    assert at(best) < min(at(best * 0.97), at(best * 1.03))


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_half_precision_inputs_are_raised(loss: Loss) -> None:
    mu, target = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16()
    b = torch.full((4, 4), 1e-4).bfloat16()
    value = loss(mu, b, target)
    assert value.dtype == torch.float32
    assert value.item() == loss(mu.float(), b.float(), target.float()).item()


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_smallest_b_is_finite(loss: Loss) -> None:
    mu = torch.zeros(8, requires_grad=True)
    value = loss(mu, torch.full((8,), 1e-8), torch.ones(8))
    value.backward()
    assert value.isfinite()
    assert mu.grad.isfinite().all()


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_shapes_never_broadcast(loss: Loss) -> None:
    whole, part = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    for arguments in ((whole, whole, part), (whole, part, whole), (part, whole, whole)):
        with pytest.raises(ValueError, match=r"not \[2, [13], 4, 4\] and \[2, [13], 4, 4\]"):
            loss(*arguments)
