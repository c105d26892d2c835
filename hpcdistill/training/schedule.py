"""Learning rate as a function of the step alone: nothing to store, nothing that counts ranks."""

from __future__ import annotations

import math

from hpcdistill.methods.base import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Adam's step size for 0-based `step` of `steps`.

    cosine: lr_n + (lr_0 - lr_n) (1 + cos(pi t)) / 2 with t = step / steps; linear: lr_0 up to `decay_from`, then
    straight to lr_n, reached one step after the last.
    """
    first, last = settings.learning_rate, settings.final_learning_rate
    done = min(step / steps, 1.0)
    if settings.schedule == "cosine":
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "linear":
        return first + (last - first) * max(0.0, (done - settings.decay_from) / (1 - settings.decay_from))
    return first
