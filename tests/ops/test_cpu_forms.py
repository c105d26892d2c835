"""The forms for a CPU against PyTorch's own operations in float64: values, gradients, layouts, and where they stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.models.instance_norm import InstanceNorm2d
from hpcdistill.ops import cpu_forms

LAYOUTS = [torch.contiguous_format, torch.channels_last]
Form = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def compare(ours: Form, theirs: Form, *inputs: Tensor, layout: torch.memory_format) -> None:
    """Values and the gradients of all inputs, of which the first is laid out so; float64, so that forms cannot hide."""
    found = []
    for form in (ours, theirs):
        given = [x.detach().clone().requires_grad_() for x in inputs]
        given[0] = given[0].detach().contiguous(memory_format=layout).requires_grad_()
        y = form(*given)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        found.append((y, torch.autograd.grad((y.square() * weights).sum(), given)))
    (value, gradients), (wanted, wanted_gradients) = found
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 5, 6, 4), (3, 4, 9, 7)])
def test_instance_norm(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
    compare(cpu_forms.instance_norm, functional.instance_norm, x, layout=layout)
    given = x.contiguous(memory_format=layout)
    assert cpu_forms.instance_norm(given).is_contiguous(memory_format=layout)
    assert torch.equal(InstanceNorm2d(shape[1])(given), cpu_forms.instance_norm(given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_rounds_little(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """256x256 values around 2 with a deviation of 0.5: what a sum of 65536 numbers loses, against float64."""
    x = (2 + 0.5 * torch.randn(1, 3, 256, 256, dtype=torch.float64)).to(dtype, memory_format=layout)
    worst = (cpu_forms.instance_norm(x).double() - functional.instance_norm(x.double())).abs().max()
    assert worst < (3e-4 if dtype == torch.float32 else 0.05)


# kernel, channels in, out, groups: the reflected convolutions of a generator, and 1x1
KERNELS = [(7, 3, 6, 1), (7, 6, 3, 1), (7, 17, 18, 1), (3, 6, 6, 6), (3, 6, 4, 1), (1, 6, 5, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kernel", "channels", "out", "groups"), KERNELS)
def test_convolution(
    kernel: int, channels: int, out: int, groups: int, threads: int, layout: torch.memory_format
) -> None:
    x = torch.randn(2, channels, 11, 9, dtype=torch.float64)
    weight = torch.randn(out, channels // groups, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda *given: cpu_forms.convolution(*given, groups),
            lambda *given: functional.conv2d(*given, groups=groups),
            x,
            weight,
            bias,
            layout=layout,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided(layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 8, 10, dtype=torch.float64)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    compare(
        lambda *given: cpu_forms.strided(*given, 1),
        lambda *given: functional.conv2d(*given, stride=2, padding=1),
        x,
        weight,
        bias,
        layout=layout,
    )
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    compare(
        lambda *given: cpu_forms.strided(*given, 1, output_padding=1),
        lambda *given: functional.conv_transpose2d(*given, stride=2, padding=1, output_padding=1),
        x,
        weight,
        bias,
        layout=layout,
    )


def test_a_frozen_weight_gets_no_gradient_and_the_image_does() -> None:
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    cpu_forms.strided(x, weight, None, 1).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    of_x, weight.grad = x.grad.clone(), None
    x.grad = None
    cpu_forms.strided(x, weight.detach(), None, 1).sum().backward()
    torch.testing.assert_close(x.grad, of_x)
    assert weight.grad is None


def test_what_is_mapped_or_compiled_sees_pytorch_s_own() -> None:
    seen = []

    def form(x: Tensor) -> Tensor:
        seen.append(cpu_forms.applies(x))
        return cpu_forms.instance_norm(x)

    x = torch.randn(2, 1, 3, 4, 4)
    torch.testing.assert_close(torch.func.vmap(form)(x)[1], form(x[1]))
    torch.func.grad(lambda x: form(x).square().sum())(x[1])
    assert seen == [False, True, False]
    assert not cpu_forms.applies(torch.empty(1, 1, 4, 4, device="meta"))
    torch.use_deterministic_algorithms(True)
    try:
        assert cpu_forms.channels_last(image := x[0]) is image
    finally:
        torch.use_deterministic_algorithms(False)
    assert cpu_forms.channels_last(x[0]).is_contiguous(memory_format=torch.channels_last)
