"""Loss terms by name, each with its weight: a term of weight 0 is never computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpcdistill.methods.base import NO_TEACHERS, Method, Teachers, constant, weigh


class WeightedTerms(Method):
    """A method whose loss is a sum of named terms."""

    def __init__(self, config: Any, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        self._weights: dict[str, float] = {}

    def add_weights(self, **weights: float) -> None:
        """Loss weights as 0-dim tensors `weight_<name>`."""
        for name, value in weights.items():
            self.register_buffer(f"weight_{name}", constant(value), persistent=False)
            self._weights[name] = value

    def uses(self, *names: str) -> bool:
        """Whether a term of these has a weight."""
        return any(self._weights.get(name) for name in names)

    def weighted(self, name: str, value: Tensor) -> Tensor:
        return weigh(getattr(self, f"weight_{name}"), value)
