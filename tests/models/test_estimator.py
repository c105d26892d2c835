"""The variational estimator: size, formula, and float32 whatever surrounds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.losses.variational import gaussian, laplace
from hpcdistill.models.estimator import VIDEstimator


def test_published_parameter_count() -> None:
    assert sum(parameter.numel() for parameter in VIDEstimator().parameters()) == 12_770


def test_equals_the_formula_in_numpy() -> None:
    torch.manual_seed(3)
    estimator = VIDEstimator(5).double()
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter)
    student_map = np.random.default_rng(1).normal(size=(2, 5, 3, 4))
    with torch.no_grad():
        mu, b = estimator(torch.from_numpy(student_map))

    def branch(name: str) -> np.ndarray:
        weights = {key: value.numpy() for key, value in estimator.state_dict().items()}
        features = np.einsum("oi,bihw->bohw", weights[f"{name}.0.0.weight"][:, :, 0, 0], student_map)
        features += weights[f"{name}.0.0.bias"][:, None, None]
        features = np.where(features > 0, features, weights[f"{name}.0.1.weight"] * features)
        result: np.ndarray = np.einsum("oi,bihw->bohw", weights[f"{name}.1.weight"][:, :, 0, 0], features)
        return result + weights[f"{name}.1.bias"][:, None, None]

    np.testing.assert_allclose(mu.numpy(), branch("mu"), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(b.numpy(), 0.1 * np.log1p(np.exp(branch("b"))) + 1e-8, rtol=1e-9)


def test_b_stays_positive_for_extreme_maps() -> None:
    estimator = VIDEstimator(4)
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter)
    for factor in (1e4, -1e4):
        _, b = estimator(factor * torch.randn(1, 4, 8, 8))
        assert b.min() >= 1e-8
        assert b.isfinite().all()


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_autocast_leaves_the_whole_loss_in_float32(loss: object) -> None:
    torch.manual_seed(0)
    estimator = VIDEstimator()
    student_map, target = torch.randn(1, 56, 5, 5), torch.randn(1, 56, 5, 5)
    plain = loss(*estimator(student_map), target)  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mu, b = estimator(student_map)
        value = loss(mu, b, target)  # type: ignore[operator]
        from_half = estimator(student_map.bfloat16())
    assert {mu.dtype, b.dtype, value.dtype, from_half[0].dtype, from_half[1].dtype} == {torch.float32}
    assert value.item() == plain.item()


def test_half_precision_weights_still_give_float32() -> None:
    mu, b = VIDEstimator(4).bfloat16()(torch.randn(1, 4, 3, 3))
    assert {mu.dtype, b.dtype} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda(dtype: torch.dtype) -> None:
    estimator = VIDEstimator(8).cuda()
    with torch.autocast("cuda", dtype=dtype):
        mu, b = estimator(torch.randn(1, 8, 4, 4, device="cuda", dtype=dtype))
        value = laplace(mu, b, torch.zeros_like(mu, dtype=dtype))
    assert {mu.dtype, b.dtype, value.dtype} == {torch.float32}


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_every_parameter_and_the_student_get_gradients(loss: object) -> None:
    torch.manual_seed(0)
    estimator = VIDEstimator(6)
    student_map = torch.randn(1, 6, 5, 5, requires_grad=True)
    target = torch.randn(1, 6, 5, 5, requires_grad=True)
    loss(*estimator(student_map), target).backward()  # type: ignore[operator]
    assert [name for name, parameter in estimator.named_parameters() if not parameter.grad.abs().sum()] == []
    assert student_map.grad.abs().sum() > 0
    assert target.grad is None
