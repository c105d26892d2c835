"""What upscayl and realesrgan-ncnn-vulkan can run: they build ncnn with few of its layers, and RGB in these few.

A layer that they lack is told in a line on the terminal, if at all; then they crash, or there is no picture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.ops.colour import luma, with_luma
from hpcdistill.ops.enlargement import BicubicEnlargement, mirrored_columns, mirrored_rows

# Options WITH_LAYER_... in src/CMakeLists.txt of xinntao/Real-ESRGAN-ncnn-vulkan (37026f4), as .param files call them.
_FEW: set[str] = {
    "BinaryOp", "Cast", "Concat", "Convolution", "Crop", "Eltwise", "Flatten", "InnerProduct", "Input",
    "Interp", "PReLU", "Packing", "Padding", "PixelShuffle", "ReLU", "Split"
}  # fmt: skip
# The same of upscayl/upscayl-ncnn (d02fa88), which has these too.
_MORE: set[str] = {
    "Clip", "ConvolutionDepthWise", "Deconvolution", "GELU", "LayerNorm", "MemoryData", "Permute", "Pooling",
    "Reduction", "Reorg", "Reshape", "Sigmoid", "Slice", "Swish"
}  # fmt: skip
REALESRGAN = frozenset(_FEW)
UPSCAYL = frozenset(_FEW | _MORE)
PROGRAMS = {"realesrgan-ncnn-vulkan": REALESRGAN, "upscayl": UPSCAYL}


class PlainRgb(nn.Module):
    """`RgbGraph` in convolutions without groups, which both programs can run; the same image to 1e-6."""

    def __init__(self, graph: RgbGraph) -> None:
        super().__init__()
        self.luma = _as_convolution(luma, 3)
        self.network = without_groups(graph.network)
        self.enlargement = DenseEnlargement(graph.enlargement)
        self.colour = _as_convolution(lambda planes: with_luma(planes[:, :3], planes[:, 3:]), 4)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` RGB in [0, 1] -> `[B, 3, scale H, scale W]`, clamped."""
        enlarged = torch.cat([self.enlargement(image), self.network(self.luma(image))], dim=1)
        # Not clamp: pnnx fuses that into the convolution, and ncnn without Clip crashes when it loads such a one.
        return torch.minimum(functional.relu(self.colour(enlarged)), torch.ones(()))


class DenseEnlargement(nn.Module):
    """`BicubicEnlargement` with zeros between the channels in place of groups."""

    rows: Tensor
    columns: Tensor

    def __init__(self, enlargement: BicubicEnlargement) -> None:
        super().__init__()
        self.scale = enlargement.scale
        self.register_buffer("rows", _dense(enlargement.rows, enlargement.channels))
        self.register_buffer("columns", _dense(enlargement.columns, enlargement.channels * enlargement.scale))

    def forward(self, image: Tensor) -> Tensor:
        """`[B, channels, H, W]` -> `[B, channels, scale H, scale W]`."""
        planes = functional.conv2d(mirrored_rows(image), self.rows)
        return functional.pixel_shuffle(functional.conv2d(mirrored_columns(planes), self.columns), self.scale)


def without_groups(network: nn.Module) -> nn.Module:
    """A copy whose bicubic enlargements have no grouped convolutions; its own layers stay what they are."""
    network = copy.deepcopy(network)
    for parent, name in [*_enlargements(network)]:
        setattr(parent, name, DenseEnlargement(getattr(parent, name)))
    return network


def _enlargements(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, BicubicEnlargement):
                yield parent, name


def _dense(weight: Tensor, groups: int) -> Tensor:
    """`[groups n, 1, h, w]` of a convolution with one input channel a group, as `[groups n, groups, h, w]`."""
    count = weight.shape[0] // groups
    dense = weight.new_zeros(weight.shape[0], groups, *weight.shape[2:])
    for group in range(groups):
        own = slice(group * count, (group + 1) * count)
        dense[own, group] = weight[own, 0]
    return dense


def _as_convolution(function: Callable[[Tensor], Tensor], channels: int) -> nn.Conv2d:
    """What `function` does to each pixel's `channels`, which is a sum of multiples and a constant."""
    constant = function(torch.zeros(1, channels, 1, 1, dtype=torch.float64))
    units = function(torch.eye(channels, dtype=torch.float64)[:, :, None, None])
    layer = nn.Conv2d(channels, constant.shape[1], 1)
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_((units - constant).transpose(0, 1))
        layer.bias.copy_(constant.flatten())
    return layer
