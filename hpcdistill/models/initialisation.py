"""The weights that CycleGAN and Pix2Pix start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

DEVIATION = 0.02
POWER_ITERATIONS = 15  # what torch takes when it puts a spectral norm on


def init_gan(module: nn.Module) -> None:
    """Weights N(0, 0.02) in convolutions and linear layers, N(1, 0.02) in BatchNorm; every bias 0.

    Draws from torch's default generator in the order of `module.modules()`. A spectrally normalised weight is drawn
    before its normalisation, and its singular vectors are brought up to it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if parametrize.is_parametrized(layer, "weight"):
                _draw_behind_parametrization(layer)
            else:
                nn.init.normal_(layer.weight, 0.0, DEVIATION)
        elif isinstance(layer, _BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, DEVIATION)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def _draw_behind_parametrization(layer: nn.Module) -> None:
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    chain = layer.parametrizations["weight"]
    assert isinstance(chain, parametrize.ParametrizationList)
    assert isinstance(chain.original, Tensor)
    nn.init.normal_(chain.original, 0.0, DEVIATION)
    training = chain.training
    chain.train()
    for _ in range(POWER_ITERATIONS):
        chain()  # in training mode each pass is one power iteration
    chain.train(training)
