"""The mean absolute difference behind every supervised level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.losses.supervision import l1


def test_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    image, target = generator.random((2, 3, 5, 4)), generator.random((2, 3, 5, 4))
    result = l1(torch.from_numpy(image), torch.from_numpy(target))
    assert result.shape == ()
    assert result.item() == pytest.approx(np.abs(image - target).mean(), rel=1e-14)


def test_gradient_is_the_sign_over_the_count() -> None:
    image = torch.tensor([[0.2, 0.9], [0.4, 0.1]], requires_grad=True)
    l1(image, torch.full((2, 2), 0.3)).backward()
    assert image.grad.tolist() == [[-0.25, 0.25], [0.25, -0.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    image, target = torch.rand(64, 64).to(dtype), torch.rand(64, 64).to(dtype)
    result = l1(image, target)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx((image.double() - target.double()).abs().mean().item(), rel=1e-6)
    assert l1(image, target.float()).dtype == torch.float32


@pytest.mark.parametrize("other", [(2, 1, 8, 8), (1, 3, 8, 8), (2, 3, 8, 9), (3, 8, 8), ()])
def test_other_shapes_are_refused(other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape, not \[2, 3, 8, 8\] and"):
        l1(torch.zeros(2, 3, 8, 8), torch.zeros(other))
