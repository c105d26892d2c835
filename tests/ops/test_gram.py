"""The Gram matrix against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import torch

from hpcdistill.ops.gram import gram


def test_equals_numpy() -> None:
    maps = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    expected = np.einsum("bchw,bdhw->bcd", maps, maps) / (5 * 3 * 4)
    np.testing.assert_allclose(gram(torch.from_numpy(maps)).numpy(), expected, rtol=1e-13)


def test_by_hand() -> None:
    maps = torch.tensor([[1.0, 2.0], [0.0, -4.0]]).view(1, 2, 1, 2)
    assert torch.equal(gram(maps), torch.tensor([[[5.0, -8.0], [-8.0, 16.0]]]) / 4)


def test_gradient() -> None:
    maps = torch.rand(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram, maps)


def test_half_precision_is_summed_in_float32() -> None:
    maps = (torch.rand(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)) * 300).half()
    expected = gram(maps.double())
    with torch.autocast("cpu", torch.bfloat16):
        result = gram(maps)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)
