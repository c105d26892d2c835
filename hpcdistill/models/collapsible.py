"""Layers that are trained wide and deployed narrow: their kernel is computed from more weights than it has.

A parametrization of a (transposed) convolution's kernel computes it at every step, and the layer uses it like any
other; `collapse` leaves the plain layer. The function is the same all the time, image borders included; what differs
is the path that the optimizer takes. The bias stays a plain one.

- `linear`: k x k to `width` channels, then 1x1 (SESR, Bhardwaj et al., MLSys 2022).
- `edge`: a plain kernel; 1x1 to twice the channels, then k x k; and, for 3x3, 1x1 then scaled Sobel and Laplace masks
  (ECBSR, Zhang et al., ACM MM 2021).
- `bottleneck`: `repeats` times 1x1 to `width` channels, k x k, 1x1 (RepSR's depth without its norms), added up.

A kernel is written [a, b, k, k] below: a = out and b = in of a convolution, the other way round if it is transposed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from hpcdistill.errors import UserError, nearest

Form = Literal["linear", "edge", "bottleneck"]
Layer = nn.Conv2d | nn.ConvTranspose2d

_LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
_SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_MASK_DEVIATION = 1e-3  # of the masks' scales at the start (ECBSR)


def expand(layer: Layer, form: Form, width: int, repeats: int = 1, skip: bool = True) -> None:
    """Give `layer` the weights of `form`; what it computes stays what it is but for a skip, and rounding.

    With `skip` a layer with as many channels out as in starts nearer to the identity: one is added to the middle of
    its kernel. UserError for groups, and for fewer channels of `width` than the layer has.
    """
    name = f"{type(layer).__name__} of {layer.in_channels} to {layer.out_channels} channels"
    if layer.groups != 1:
        raise UserError(f"collapse: a {name} in {layer.groups} groups is not trained wide; leave it out of the layers")
    kernel = layer.weight
    if width < max(kernel.shape[:2]) and form != "edge":
        raise UserError(f"collapse: {width} channels are narrower than a {name}; give {max(kernel.shape[:2])} or more")
    if skip and kernel.shape[0] == kernel.shape[1] and kernel.shape[2] % 2 == 1 and isinstance(layer, nn.Conv2d):
        with torch.no_grad():
            middle = kernel.shape[2] // 2
            kernel[:, :, middle, middle] += torch.eye(kernel.shape[0]).to(kernel)
    block = {"linear": _Linear(width), "edge": _Edge(kernel), "bottleneck": _Bottleneck(width, repeats)}[form]
    parametrize.register_parametrization(layer, "weight", block)


def is_expanded(layer: nn.Module) -> bool:
    """Whether `layer` is trained wide."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or not parametrize.is_parametrized(layer, "weight"):
        return False
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    chain = layer.parametrizations["weight"]
    assert isinstance(chain, nn.ModuleList)
    return isinstance(chain[0], _Linear | _Edge | _Bottleneck)


def collapse(module: nn.Module) -> None:
    """Put a plain layer in the place of every expanded one in `module`."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if is_expanded(layer):
                setattr(parent, name, _plain(layer))


def _plain(layer: nn.Module) -> nn.Module:
    """The plain layer of the same function; its kernel is computed in float64 and rounded once.

    A new one: taking the parametrization away would also take it from whatever `layer` is a copy of.
    """
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    options: dict[str, Any] = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    if isinstance(layer, nn.ConvTranspose2d):
        options["output_padding"] = layer.output_padding
    kind = nn.ConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else nn.Conv2d
    exact = copy.deepcopy(layer).double().weight
    # No first weights: they would be drawn from everybody's generator, and thrown away.
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    plain: Layer = skip_init(kind, **options)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain.weight.copy_(exact)
        if layer.bias is not None:
            assert plain.bias is not None
            plain.bias.copy_(layer.bias)
    plain.requires_grad_(next(layer.parameters()).requires_grad)
    return plain


def chosen_layers(module: nn.Module, wanted: Sequence[str] | None) -> dict[str, Layer]:
    """The (transposed) convolutions of `module` that `wanted` names; for None, all but transposed and grouped ones.

    UserError, with the right names, for one that is no convolution: behind an activation nothing collapses.
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)}
    if wanted is None:
        return {name: part for name, part in layers.items() if isinstance(part, nn.Conv2d) and part.groups == 1}
    for name in wanted:
        if name in layers:
            continue
        inside = [layer for layer in layers if layer.startswith(f"{name}.")]
        if not inside:
            raise UserError(f"collapse.layers: no convolution '{name}'; {nearest(name, layers)}")
        raise UserError(
            f"collapse.layers: {name} is more than a convolution ({_activation(module, name)}), so it does not "
            f"collapse as one; name its convolutions: {', '.join(inside)}"
        )
    return {name: layers[name] for name in wanted}


def _activation(module: nn.Module, name: str) -> str:
    """What stands between the convolutions of the part `name`."""
    between = next(
        (f"{path} is a {type(part).__name__}" for path, part in module.get_submodule(name).named_modules(prefix=name)
         if not any(part.children()) and not isinstance(part, nn.Conv2d | nn.ConvTranspose2d)),
        "several layers",
    )  # fmt: skip
    return between


class _Linear(nn.Module):
    """T[a, b] = sum over m of outer[a, m] inner[m, b]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, outer: Tensor, inner: Tensor) -> Tensor:
        return torch.einsum("am,mbkl->abkl", outer, inner)

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Random weights whose product is `kernel`: `outer` keeps the variance, `inner` has the kernel's."""
        a, b, *sides = kernel.shape
        outer = kernel.new_empty(a, self.width).normal_(std=self.width**-0.5)
        inner = kernel.new_empty(self.width, b, *sides).normal_(std=_deviation(kernel))
        missing = kernel - self(outer, inner)
        return outer, inner + torch.einsum("ma,abkl->mbkl", _right_inverse(outer), missing)


class _Bottleneck(nn.Module):
    """T[a, b] = sum over the repeats and m, n of outer[a, m] middle[m, n] inner[n, b]; the repeats lie side by side."""

    def __init__(self, width: int, repeats: int) -> None:
        super().__init__()
        self.width, self.repeats = width, repeats

    def forward(self, outer: Tensor, middle: Tensor, inner: Tensor) -> Tensor:
        # Four dimensions at most in the weights themselves: channels-last memory takes no more.
        middle = middle.reshape(self.repeats, self.width, *middle.shape[1:])
        inner = inner.reshape(self.repeats, self.width, -1)
        outer = outer.reshape(-1, self.repeats, self.width)
        kernel: Tensor = torch.einsum("arm,rmnkl,rnb->abkl", outer, middle, inner)
        return kernel

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Random weights whose products add up to `kernel`, each repeat an equal share of it."""
        a, b, *sides = kernel.shape
        width, repeats = self.width, self.repeats
        outer = kernel.new_empty(repeats, a, width).normal_(std=width**-0.5)
        inner = kernel.new_empty(repeats, width, b).normal_(std=width**-0.5)
        middle = kernel.new_empty(repeats, width, width, *sides).normal_(std=_deviation(kernel) / repeats**0.5)
        for number in range(repeats):
            product = torch.einsum("am,mnkl,nb->abkl", outer[number], middle[number], inner[number])
            left, right = _right_inverse(outer[number]), _right_inverse(inner[number].T).T
            middle[number] += torch.einsum("ma,abkl,bn->mnkl", left, kernel / repeats - product, right)
        return outer.transpose(0, 1).flatten(1), middle.flatten(0, 1), inner.flatten(0, 1)


class _Edge(nn.Module):
    """T = plain + outer inner (1x1 to twice the channels, then k x k) + scaled masks behind a 1x1, where k is 3."""

    masks: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        sobel = torch.tensor(_SOBEL)
        masks = torch.stack([sobel, sobel.T, torch.tensor(_LAPLACE)])
        self.masked = kernel.shape[2:] == masks.shape[1:]
        self.register_buffer("masks", masks.to(kernel.device), persistent=False)

    def forward(self, plain: Tensor, inner: Tensor, outer: Tensor, *masked: Tensor) -> Tensor:
        kernel = plain + torch.einsum("amkl,mb->abkl", outer, inner)
        if masked:
            scales, mixing = masked
            kernel = kernel + torch.einsum("fa,fab,fkl->abkl", scales, mixing, self.masks.to(kernel.dtype))
        return kernel

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """Random weights whose sum is `kernel`; the plain one makes up for the others."""
        a, b, *sides = kernel.shape
        deviation = _deviation(kernel) / math.sqrt(2)
        inner = kernel.new_empty(2 * a, b).normal_(std=b**-0.5)
        outer = kernel.new_empty(a, 2 * a, *sides).normal_(std=deviation * math.sqrt(b / (2 * a)))
        others = [inner, outer]
        if self.masked:
            scales = kernel.new_empty(len(self.masks), a).normal_(std=_MASK_DEVIATION)
            others += [scales, kernel.new_empty(len(self.masks), a, b).normal_(std=b**-0.5)]
        return kernel - self(torch.zeros_like(kernel), *others), *others


def _deviation(kernel: Tensor) -> float:
    """The standard deviation that the kernel's values were drawn with, about; 1 where there are no values (meta)."""
    return 1.0 if kernel.is_meta else float(kernel.double().square().mean().sqrt())


def _right_inverse(matrix: Tensor) -> Tensor:
    """M with `matrix @ M` the identity, for a matrix that is wider than high."""
    if matrix.is_meta:
        return matrix.T
    inverse: Tensor = torch.linalg.pinv(matrix.double()).to(matrix.dtype)
    return inverse
