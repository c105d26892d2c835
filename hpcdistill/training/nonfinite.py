"""A loss or gradient that is not finite: masked on the device, found at the next log point, named by its term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class NonFiniteGuard:
    """Flags that stay on the device, and the generators' buffers of the last good step.

    A forward pass moves BatchNorm's statistics even while no weight moves; after a non-finite batch they are spoilt.
    """

    def __init__(self, generators: Mapping[str, nn.Module], device: torch.device) -> None:
        self.halted = torch.zeros((), dtype=torch.bool, device=device)  # from then on no update moves a weight
        self._first: dict[str, Tensor] = {}  # term -> 0-dim bool: it was the first to be non-finite
        self._buffers = [buffer for module in generators.values() for buffer in module.buffers()]
        self._good = [buffer.clone() for buffer in self._buffers]

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms, NaN when one of them is not finite: so its gradient is too, on every rank."""
        finite = torch.isfinite(torch.stack([term.detach() for term in terms.values()]))
        for name, good in zip(terms, finite, strict=True):
            first = ~good & ~self.halted
            if name not in self._first:
                self._first[name] = torch.zeros_like(first)
            self._first[name] |= first
        return torch.stack(list(terms.values())).sum() * torch.where(finite.all(), 1.0, math.nan)

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers after a step, unless it was halted."""
        for good, buffer in zip(self._good, self._buffers, strict=True):
            good.copy_(torch.where(self.halted, good, buffer))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the generators the buffers of the last good step."""
        for good, buffer in zip(self._good, self._buffers, strict=True):
            buffer.copy_(good)

    def found(self, accelerator: Accelerator) -> str | None:
        """What was not finite first, in words, on any rank; None while all is well. The flags are read here only."""
        flags = torch.stack([self.halted, *self._first.values()]).float()
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags, "sum")
        values: list[Any] = flags.tolist()
        if not any(values):
            return None
        names = [name for name, flag in zip(self._first, values[1:], strict=True) if flag]
        return f"the loss term {', '.join(names)}" if names else "a gradient (of finite loss terms)"
