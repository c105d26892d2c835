"""Freezing all groups but the one whose phase it is: no gradients, no moving statistics, no spectral-norm updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm


class Freezer:
    """Switches between groups. A frozen module still normalises as in training, but remembers nothing of it.

    What a method itself has frozen inside a group stays frozen.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._parameters = {
            name: [parameter for parameter in module.parameters() if parameter.requires_grad]
            for name, module in modules.items()
        }
        self._norms = {
            name: [part for part in module.modules() if isinstance(part, _NormBase) and part.track_running_stats]
            for name, module in modules.items()
        }
        self._spectral = {
            name: [part for part in module.modules() if isinstance(part, _SpectralNorm)]
            for name, module in modules.items()
        }
        self._active: str | None = None
        self._marked: list[tuple[Tensor, Tensor]] = []  # vectors of the power iterations, and what they were

    def only(self, group: str) -> None:
        """Let `group` train and freeze the others; free of work when `group` was active already."""
        if group == self._active:
            return
        # Freeze first: a parameter that two groups share must end up trainable.
        for name in sorted(self._parameters, key=lambda name: name == group):
            active = name == group
            for parameter in self._parameters[name]:
                parameter.requires_grad_(active)
            for norm in self._norms[name]:
                norm.track_running_stats = active
            for spectral in self._spectral[name]:
                spectral.training = active
        self._active = group

    @torch.no_grad()
    def mark(self) -> None:
        """Remember where the power iterations of the active group stand, for `rewind`."""
        assert self._active is not None
        vectors = [vector for part in self._spectral[self._active] for vector in part.buffers(recurse=False)]
        self._marked = [(vector, vector.clone()) for vector in vectors]

    @torch.no_grad()
    def rewind(self) -> None:
        """Put the power iterations back to the mark. No weight moves between the micro-batches of a phase, so that
        each repeats the iterations of the first: it sees the same weights, and they end where one batch ends."""
        for vector, marked in self._marked:
            vector.copy_(marked)

    def release(self) -> None:
        """Undo every freeze, for evaluation and saving."""
        for name in self._parameters:
            for parameter in self._parameters[name]:
                parameter.requires_grad_(True)
            for norm in self._norms[name]:
                norm.track_running_stats = True
            for spectral in self._spectral[name]:
                spectral.training = True
        self._active = None
