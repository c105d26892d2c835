"""The repeatable forms against PyTorch's own operations, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.models.resnet_generator import ReflectedConv2d
from hpcdistill.ops.repeatable import largest_of_four, reflection_pad, resize


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(value, gradient) of ours and of theirs, for one random gradient from above."""
    found = []
    above: Tensor | None = None
    for run in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = run(leaf)
        above = torch.randn_like(value) if above is None else above
        value.backward(above)
        assert leaf.grad is not None
        found.append((value.detach(), leaf.grad))
    return found


@pytest.mark.parametrize("widths", [(3, 3, 3, 3), (1, 1, 1, 1), (0, 2, 4, 0), (0, 0, 0, 0), (5, 6, 4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reflection(widths: tuple[int, int, int, int], layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    (value, gradient), (wanted, wanted_gradient) = both(
        lambda x: reflection_pad(x, *widths), lambda x: functional.pad(x, widths, mode="reflect"), x
    )
    assert torch.equal(value, wanted)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-14, atol=1e-14)


def test_a_reflection_wider_than_the_image() -> None:
    with pytest.raises(ValueError, match="a side of 5 pixels cannot be mirrored over 5"):
        reflection_pad(torch.zeros(1, 1, 5, 9), 0, 0, 5, 0)


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize(
    "shape", [(8, 8, 2, 2), (9, 7, 4, 5), (5, 6, 13, 12), (4, 4, 16, 16), (6, 6, 6, 6), (3, 1, 5, 4)]
)
def test_resize(mode: str, shape: tuple[int, int, int, int]) -> None:
    height, width, *size = shape
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    (value, gradient), (wanted, wanted_gradient) = both(
        lambda x: resize(x, *size, mode),  # type: ignore[arg-type]
        lambda x: functional.interpolate(x, tuple(size), mode=mode),
        x,
    )
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-13, atol=1e-13)


def test_resize_keeps_float32_under_autocast_and_the_dtype() -> None:
    x = torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(x, 4, 4, "area"), resize(x.clone(), 4, 4, "area").float())
        torch.testing.assert_close(resize(x, 4, 4, "area"), functional.interpolate(x, (4, 4), mode="area"))
        assert resize(x.bfloat16(), 12, 12, "bilinear").dtype == torch.bfloat16


def test_a_matrix_made_without_gradients_can_be_trained_through() -> None:
    with torch.inference_mode():
        resize(torch.zeros(1, 1, 10, 10), 7, 7, "bilinear")
    x = torch.zeros(1, 1, 10, 10, requires_grad=True)
    resize(x, 7, 7, "bilinear").sum().backward()
    assert x.grad is not None


def test_largest_of_four() -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    ours, theirs = both(largest_of_four, lambda x: functional.max_pool2d(x, 2, stride=1), x)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("switched", [True, False])
@pytest.mark.parametrize(("kernel", "groups"), [(7, 1), (3, 1), (3, 4)])
def test_the_reflected_convolution(kernel: int, groups: int, switched: bool) -> None:
    torch.use_deterministic_algorithms(switched)
    ours = ReflectedConv2d(4, 8, kernel, groups=groups)
    theirs = torch.nn.Conv2d(4, 8, kernel, padding=kernel // 2, groups=groups, padding_mode="reflect")
    theirs.load_state_dict(ours.state_dict())
    (value, gradient), (wanted, wanted_gradient) = both(ours, theirs, torch.randn(2, 4, 9, 10))
    torch.testing.assert_close(value, wanted)  # 8 channels out of a 7x7 kernel have a form of their own, ops.cpu_forms
    torch.testing.assert_close(gradient, wanted_gradient)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of PyTorch's kernels as they are called, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


# From the documentation of torch.use_deterministic_algorithms, what our networks could call; they raise on a GPU.
UNREPEATABLE = ("reflection_pad2d", "upsample_bilinear2d", "adaptive_avg_pool2d", "upsample_bicubic2d")


@pytest.mark.parametrize("switched", [True, False])
def test_no_kernel_is_left_that_a_gpu_cannot_repeat(switched: bool) -> None:
    torch.use_deterministic_algorithms(switched)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with Kernels() as kernels:
        y = ReflectedConv2d(4, 4, 3)(x)
        (resize(y, 16, 16, "bilinear").sum() + resize(y, 3, 3, "area").square().sum()).backward()
    bad = [name for name in kernels.names if any(word in name for word in UNREPEATABLE)]
    assert bool(bad) is not switched
