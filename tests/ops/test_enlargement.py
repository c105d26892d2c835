"""The enlargement as convolutions against the dense float64 matrix of MATLAB's documentation."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from hpcdistill.errors import UserError
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.enlargement import BicubicEnlargement
from tests.ops.test_bicubic import matlab_resize


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (24, 37)], ids=str)
def test_equals_matlab(scale: int, shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).random((2, 3, *shape))
    module = BicubicEnlargement(scale, channels=3)
    single = module(torch.from_numpy(images).float()).double().numpy()
    double = module.double()(torch.from_numpy(images)).numpy()
    for image, in_single, in_double in zip(images, single, double, strict=True):
        for channel in range(3):
            expected = matlab_resize(image[channel], Fraction(scale))
            np.testing.assert_allclose(in_single[channel], expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(in_double[channel], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_does_not_round_the_kernel(dtype: torch.dtype) -> None:
    image = torch.rand(1, 1, 5, 6)
    module = BicubicEnlargement(3)
    expected = module(image.to(dtype).float())
    result = module.to(dtype)(image.to(dtype))
    assert result.dtype == dtype
    assert torch.equal(result, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(image.to(dtype).float()), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_rounds_no_more_than_float32() -> None:
    """TensorFloat-32, which convolutions take by default, would be off by 1e-3."""
    image = torch.rand(2, 3, 40, 30)
    result = BicubicEnlargement(4, 3).cuda()(image.cuda()).cpu()
    torch.testing.assert_close(result.double(), upsample(image.double(), 4), rtol=0, atol=1e-6)


def test_it_has_no_weights_and_passes_gradients() -> None:
    module = BicubicEnlargement(2).double()
    assert module.state_dict() == {}
    assert not list(module.parameters())
    image = torch.rand(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (image,))


def test_exported_for_any_size() -> None:
    """No Python of it looks at a size: one program serves them all."""
    module = BicubicEnlargement(4)
    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(module, (torch.rand(1, 1, 8, 9),), dynamic_shapes=(sizes,)).module()
    for height, width in ((2, 2), (5, 31)):
        image = torch.rand(1, 1, height, width)
        assert torch.equal(program(image), module(image))


@pytest.mark.parametrize("scale", [0, -2, 1.5])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(UserError, match=f"an integer scale of 1 or more, not {scale}"):
        BicubicEnlargement(scale)  # type: ignore[arg-type]
