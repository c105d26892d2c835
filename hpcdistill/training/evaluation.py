"""What the loop asks of an evaluator; `metrics/` has them, commands choose one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run's generators."""

    metrics: dict[str, float]  # "student/set5/psnr" -> value
    pictures: dict[str, np.ndarray] = field(default_factory=dict)  # name -> uint8 [H, W, 3], on rank 0


class Evaluator(Protocol):
    """Measures generators; every rank calls it, every rank gets the same metrics."""

    selects: str | None  # the metric that chooses the best weights, None = the last are the best
    larger_is_better: bool

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator) -> Evaluation: ...

    def protocol(self) -> dict[str, Any]:
        """How it measures, for result.json."""
        ...
