"""Exponential moving averages of generators (EMA), evaluated and saved in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Averages:
    """Averaged copies of `generators`: a <- decay * a + (1 - decay) * weight after each step; buffers are copied."""

    def __init__(self, generators: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.generators: dict[str, nn.Module] = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in generators.items()
        }
        self._pairs = [(self.generators[name], module) for name, module in generators.items()]

    @torch.no_grad()
    def update(self, halted: Tensor) -> None:
        """Take in the weights of a step; with `halted` (0-dim bool) everything stays as it is."""
        for average, module in self._pairs:
            averaged: list[Tensor] = list(average.parameters())
            if averaged:
                share = (~halted).to(averaged[0].dtype) * (1 - self.decay)
                differences: list[Tensor] = list(torch._foreach_sub(list(module.parameters()), averaged))
                torch._foreach_mul_(differences, share)
                torch._foreach_add_(averaged, differences)
            for kept, buffer in zip(average.buffers(), module.buffers(), strict=True):
                kept.copy_(torch.where(halted, kept, buffer))
