"""The adversarial losses against their formulas in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.errors import UserError
from hpcdistill.losses.adversarial import discriminator_loss, generator_loss

LOGITS = np.random.default_rng(0).standard_normal((2, 1, 5, 4)) * 3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


GENERATOR = {"lsgan": (LOGITS - 1) ** 2, "hinge": -LOGITS, "vanilla": -np.log(sigmoid(LOGITS))}
REAL = GENERATOR | {"hinge": np.maximum(0, 1 - LOGITS)}
FAKE = {"lsgan": LOGITS**2, "hinge": np.maximum(0, 1 + LOGITS), "vanilla": -np.log(1 - sigmoid(LOGITS))}
KINDS = tuple(GENERATOR)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formulas(kind: str) -> None:
    logits = torch.from_numpy(LOGITS)
    for loss, expected in (
        (generator_loss(logits, kind), GENERATOR[kind]),
        (discriminator_loss(logits, True, kind), REAL[kind]),
        (discriminator_loss(logits, False, kind), FAKE[kind]),
    ):
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected.mean(), rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = generator_loss(logits, kind), discriminator_loss(logits, False, kind)
    for loss, expected in zip(
        losses, (generator_loss(logits.double(), kind), discriminator_loss(logits.double(), False, kind)), strict=True
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_vanilla_is_finite_for_sure_discriminators(logit: float) -> None:
    logits = torch.full((1, 1, 2, 2), logit, requires_grad=True)
    loss = generator_loss(logits, "vanilla") + discriminator_loss(logits, False, "vanilla")
    loss.backward()
    assert loss.item() == 1e4
    assert torch.isfinite(logits.grad).all()


def test_unknown_kind() -> None:
    for call in (
        lambda: generator_loss(torch.zeros(1), "lsgann"),
        lambda: discriminator_loss(torch.zeros(1), True, ""),
    ):
        with pytest.raises(UserError, match=r"no adversarial loss is called .*lsgan"):
            call()
