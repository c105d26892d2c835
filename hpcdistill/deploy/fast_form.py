"""A network's inference form in the operations that runtimes are fast at: the same function, to rounding.

For what only runs. Nothing is saved of it: the names of its weights are others.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.models.upsampling import SubpixelUpsampling
from hpcdistill.ops.enlargement import BicubicEnlargement, mirrored_columns, mirrored_rows
from hpcdistill.ops.precision import full_float32

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


class OneShuffle(nn.Module):
    """An SR network whose residual and bicubic image meet before the pixel shuffle, which is then one.

    The enlargement is one 5x5 convolution: 25 s^2 multiply-accumulates a pixel instead of 5 (s + s^2), and still a
    third of the time, as the two narrow ones that it stands for are none that libraries are made for.
    """

    taps: Tensor

    def __init__(self, network: SRNetwork) -> None:
        super().__init__()
        enlargement, scale, channels = network.enlargement, network.scale, network.channels
        assert enlargement is not None
        rows = enlargement.rows[:scale, 0, :, 0].double()  # the same for each channel
        columns = enlargement.columns[:scale, 0, 0, :].double()
        taps = torch.einsum("ia,jb->ijab", rows, columns).reshape(scale**2, 1, *(2 * (rows.shape[1],)))
        self.network = network
        self.register_buffer("taps", taps.repeat(channels, 1, 1, 1).float(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, channels, H, W]` float32 -> `[B, channels, sH, sW]`."""
        network = self.network
        features = image
        for name in network.MAPS:
            features = getattr(network, name)(features)
        planes: Tensor = network.upsampling.conv(features)  # type: ignore[union-attr,operator]
        with full_float32(image.device.type):
            bicubic = functional.conv2d(mirrored_columns(mirrored_rows(image)), self.taps, groups=network.channels)
        return functional.pixel_shuffle(planes + bicubic, network.scale)


def fast_form(network: nn.Module) -> nn.Module:
    """A copy of `network` (in its inference form) for float32, or what stands in its place."""
    copied = with_leaky_relu(network)
    for parent, name in _places(copied, SRNetwork):
        setattr(parent, name, _one_shuffle(cast(SRNetwork, getattr(parent, name))))
    return _one_shuffle(copied) if isinstance(copied, SRNetwork) else copied


def with_leaky_relu(network: AnyNetwork) -> AnyNetwork:
    """A copy in which a PReLU of one slope is a LeakyReLU, the same to the bit.

    onnxruntime 1.32 computes a PRelu by itself and joins a LeakyRelu with the convolution before it: twice as fast
    (findings/onnxruntime_prelu.sh).
    """
    copied = copy.deepcopy(network)
    for parent, name in _places(copied, nn.PReLU):
        prelu = cast(nn.PReLU, getattr(parent, name))
        if prelu.num_parameters == 1:
            setattr(parent, name, nn.LeakyReLU(float(prelu.weight.detach()), inplace=True))
    return copied


def _one_shuffle(network: SRNetwork) -> nn.Module:
    plain = isinstance(getattr(network, "upsampling", None), SubpixelUpsampling)
    adds = network.global_skip == "bicubic" and isinstance(network.enlargement, BicubicEnlargement)
    return OneShuffle(network).eval() if plain and adds else network


def _places(network: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Every submodule of that kind: whose it is, and its name there."""
    return [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
