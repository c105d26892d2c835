"""Exponential moving averages of generators (EMA), evaluated and saved in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class Averages:
    """Averaged copies of `generators`: a <- decay * a + (1 - decay) * weight after each step; buffers are copied."""

    def __init__(self, generators: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.generators: dict[str, nn.Module] = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in generators.items()
        }
        self._pairs = [(self.generators[name], module) for name, module in generators.items()]

    @torch.no_grad()
    def update(self) -> None:
        for average, module in self._pairs:
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - self.decay)
            for kept, current in zip(average.buffers(), module.buffers(), strict=True):
                kept.copy_(current)
