"""A luma network as one graph from RGB to RGB, for programs that should know nothing of luma and chroma."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self, cast

from torch import Tensor, nn

from hpcdistill.deploy.description import Description
from hpcdistill.errors import UserError
from hpcdistill.ops.colour import luma, with_luma
from hpcdistill.ops.enlargement import REACH, BicubicEnlargement


class RgbGraph(nn.Module):
    """`[B, 3, H, W]` RGB in [0, 1] -> `[B, 3, scale H, scale W]` RGB in [0, 1], clamped.

    Luma (BT.601, studio swing) goes through `network`, chroma through MATLAB's bicubic enlargement.
    """

    def __init__(self, network: nn.Module, scale: int) -> None:
        super().__init__()
        self.network = network
        self.enlargement = BicubicEnlargement(scale, 3)

    def forward(self, image: Tensor) -> Tensor:
        """The enlarged image."""
        return with_luma(self.enlargement(image), self.network(luma(image))).clamp(0, 1)

    def deploy(self) -> Self:
        """A copy for inference, in eval mode."""
        return copy.deepcopy(self).eval()


def rgb_graph(network: nn.Module, about: Description) -> tuple[nn.Module, Description]:
    """`network`, which `about` describes, with colour around it; UserError for one that is not of luma."""
    if about.task != "super-resolution" or about.colour != "luma":
        raise UserError(f"--graph rgb is for networks of luma; this {about.network} takes RGB as it is: leave it out")
    graph = RgbGraph(network, about.scale)
    graph.train(network.training)
    overlap = None if about.overlap is None else max(about.overlap, REACH)
    return graph, replace(about, colour="rgb", overlap=overlap)


def is_rgb_graph(about: Description) -> bool:
    """Whether the network inside is of luma, though RGB goes in."""
    return about.task == "super-resolution" and about.colour == "rgb" and cast(int, about.arguments["channels"]) == 1
