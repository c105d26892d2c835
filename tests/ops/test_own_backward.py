"""The backward passes that are written here, beside those of PyTorch's own operations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.models.layers import Conv2d, PReLU
from hpcdistill.ops import own_backward
from hpcdistill.ops.own_backward import conv2d, laplace, prelu, scaled_softplus

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SINGLE = 5e-6  # of the largest gradient: what float32 may differ from float64 here


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of its weighted sum, whose weights differ from place to place."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    result = call(*leaves)
    # In the result's memory layout, as the gradients of the layers behind it are.
    weights = torch.empty_like(result).copy_(torch.linspace(-1, 2, result.numel()).view_as(result))
    return [result.detach(), *torch.autograd.grad((weights * result).sum(), leaves)]


def check(
    call: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, layout: str = "contiguous"
) -> None:
    """`call` in float64 and float32 beside `plain` in float64."""
    exact = gradients(plain, *inputs)
    for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, SINGLE)):
        laid = [
            tensor.to(dtype).contiguous(memory_format=LAYOUTS[layout]) if tensor.ndim == 4 else tensor.to(dtype)
            for tensor in inputs
        ]
        assert own_backward._is_ours(laid[0].requires_grad_(), laid[1])
        for found, expected in zip(gradients(call, *laid), exact, strict=True):
            assert found.dtype == dtype
            largest = max(1.0, float(expected.abs().max()))
            assert float((found.double() - expected).abs().max()) <= allowed * largest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 1.0, 1.7])
def test_prelu(slope: float, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_backward, "PIECE", 64)  # several, the last of them short
    x = draw(3, 5, 4, 7)
    x[0, 0, 0, :3] = 0.0  # where PyTorch takes the slope's side
    check(prelu, functional.prelu, x, torch.tensor([slope], dtype=torch.float64), layout=layout)


def test_prelu_of_other_shapes_and_slopes() -> None:
    check(prelu, functional.prelu, draw(6, 11).t(), torch.tensor([0.3], dtype=torch.float64))
    x, slopes = draw(2, 3, 4, 4), draw(3, seed=1)
    for found, expected in zip(gradients(prelu, x, slopes), gradients(functional.prelu, x, slopes), strict=True):
        assert torch.equal(found, expected)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], tuple[int, int]]] = {
    "3x3": ((2, 4, 6, 9), (5, 4, 3, 3), (1, 1), (1, 1)),
    "1x1": ((2, 4, 5, 5), (3, 4, 1, 1), (1, 1), (0, 0)),
    "of one channel": ((2, 1, 6, 9), (5, 1, 5, 5), (1, 1), (2, 2)),
    "of one channel, no padding": ((2, 1, 7, 6), (5, 1, 3, 2), (1, 1), (0, 0)),
    "to one channel": ((2, 4, 6, 9), (1, 4, 3, 3), (1, 1), (1, 1)),
    "hfrm": ((2, 4, 8, 12), (5, 4, 3, 3), (2, 2), (1, 1)),
    "hfrm, odd sides": ((2, 4, 7, 11), (5, 4, 3, 3), (2, 2), (1, 1)),
    "x3": ((2, 4, 9, 12), (5, 4, 5, 5), (3, 3), (2, 2)),
    "unlike sides": ((2, 4, 11, 13), (5, 4, 7, 5), (2, 3), (3, 1)),
    "no padding": ((2, 4, 11, 13), (5, 4, 4, 5), (2, 2), (0, 0)),
    "pisr": ((2, 4, 8, 12), (5, 4, 5, 5), (4, 4), (2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_backward, "LARGE_IMAGE", 1)
    shape, kernel, stride, padding = CONVOLUTIONS[case]
    x, weight, bias = draw(*shape), draw(*kernel, seed=1), draw(kernel[0], seed=2)
    options = (stride, padding)
    check(
        lambda x, weight, bias: conv2d(x, weight, bias, *options),
        lambda x, weight, bias: functional.conv2d(x, weight, bias, *options),
        *(x, weight, bias),
        layout=layout,
    )
    check(
        lambda x, weight: conv2d(x, weight, None, *options),
        lambda x, weight: functional.conv2d(x, weight, None, *options),
        *(x, weight),
        layout=layout,
    )


def test_the_phases_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    real = own_backward._weight_by_phases
    monkeypatch.setattr(own_backward, "_weight_by_phases", lambda *a: taken.append(a[2].shape) or real(*a))  # type: ignore[func-returns-value]
    for side, kernel, stride, layout in ((8, 3, 2, "channels_last"), (512, 3, 2, "contiguous")):
        x = draw(1, 4, side, side).contiguous(memory_format=LAYOUTS[layout])
        gradients(lambda x, w, s=stride: conv2d(x, w, None, (s, s), (1, 1)), x, draw(4, 4, kernel, kernel))
    assert taken == []
    x = draw(1, 4, 512, 512).contiguous(memory_format=torch.channels_last)
    gradients(lambda x, w: conv2d(x, w, None, (4, 4), (2, 2)), x, draw(4, 4, 5, 5))  # hardly two taps a phase
    assert taken == []
    gradients(lambda x, w: conv2d(x, w, None, (2, 2), (1, 1)), x, draw(4, 4, 3, 3))
    assert taken == [(4, 4, 3, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_laplace(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_backward, "PIECE", 50)
    mu, b, target = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1).abs() + 0.01, draw(2, 3, 4, 5, seed=2)
    mu[0, 0, 0, 0] = target[0, 0, 0, 0]  # where the gradient of |.| is 0
    check(
        lambda mu, b: laplace(mu, b, target.to(mu.dtype)),
        lambda mu, b: (math.log(2) + b.log() + (target - mu).abs() / b).mean(),
        *(mu, b),
        layout=layout,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_softplus(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_backward, "PIECE", 50)
    x = 20 * draw(2, 3, 4, 5)  # to both sides of where PyTorch's softplus is a straight line
    exact = gradients(lambda x: 0.1 * (torch.relu(x) + torch.log1p(torch.exp(-x.abs()))) + 1e-8, x)
    for dtype, allowed in ((torch.float64, 5e-9), (torch.float32, SINGLE)):  # exp(-20) is 2e-9
        laid = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for found, expected in zip(gradients(lambda x: scaled_softplus(x, 0.1, 1e-8), laid), exact, strict=True):
            assert float((found.double() - expected).abs().max()) <= allowed * float(expected.abs().max())


def test_a_gradient_is_asked_for_twice() -> None:
    """As where each term's gradient norm is measured: the backward pass must leave what it needs as it was."""
    network = nn.Sequential(Conv2d(2, 3, 3, padding=1), PReLU(), Conv2d(3, 2, 1)).double()
    mu = network(draw(2, 2, 5, 5))
    loss = laplace(mu, scaled_softplus(mu, 0.1, 1e-8), draw(2, 2, 5, 5, seed=3))
    first = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(network.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_elsewhere_they_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*inputs: Any) -> Tensor:
        raise AssertionError("not here")

    for kind in ("_PReLU", "_Conv2d"):
        monkeypatch.setattr(getattr(own_backward, kind), "apply", refused)
    network = nn.Sequential(Conv2d(2, 3, 3, padding=1), PReLU())
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.PReLU())
    plain.load_state_dict(network.state_dict())
    x = draw(2, 2, 5, 5).float()
    with pytest.raises(AssertionError, match="not here"):
        network(x)
    with torch.no_grad():
        assert torch.equal(network(x), plain(x))
        traced = torch.jit.trace(network, x)
    assert torch.equal(traced(x).detach(), plain(x).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x).detach(), plain(x).detach())
    names = dict(network.named_parameters())
    per_sample = torch.func.vmap(
        torch.func.grad(lambda values, one: torch.func.functional_call(network, values, (one[None],)).sum()), (None, 0)
    )(names, x)
    total = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    for found, expected in zip(per_sample.values(), total, strict=True):
        torch.testing.assert_close(found.sum(0), expected, rtol=1e-5, atol=1e-5)
