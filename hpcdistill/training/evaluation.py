"""What the loop asks of an evaluator; `metrics/` has them, commands choose one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from accelerate import Accelerator
from torch import nn

T = TypeVar("T")


class EvaluationStopped(Exception):
    """An evaluation was left before its end because a rank was told to stop; nothing was measured."""


def never() -> bool:
    """The `stop` of an evaluation that nothing interrupts."""
    return False


def until_stopped(items: Iterable[T], stop: Callable[[], bool]) -> Iterator[T]:
    """The items one after the other; EvaluationStopped as soon as `stop()` says so, also where there are no items."""
    if stop():
        raise EvaluationStopped
    for item in items:
        if stop():
            raise EvaluationStopped
        yield item


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run's generators."""

    metrics: dict[str, float]  # "student/set5/psnr" -> value
    pictures: dict[str, np.ndarray] = field(default_factory=dict)  # name -> uint8 [H, W, 3], on rank 0
    curves: dict[str, Any] = field(default_factory=dict)  # name -> what is to be drawn, as JSON


class Evaluator(Protocol):
    """Measures generators; every rank calls it, every rank gets the same metrics."""

    selects: str | None  # the metric that chooses the best weights, None = the last are the best
    larger_is_better: bool

    def __call__(
        self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Callable[[], bool] = never
    ) -> Evaluation:
        """Measure. `stop` is this rank's own (a signal has come) and is asked between images.

        EvaluationStopped on every rank when any of them was told to stop, UserError on every rank when one met it;
        the generators' modes are then what they were before.
        """
        ...

    def protocol(self) -> dict[str, Any]:
        """How it measures, for result.json."""
        ...


def is_better(evaluator: Evaluator, metric: str | None, new: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether the evaluation `new` is better than `best` by `metric`; anything is better than none, or than NaN.

    Both are {"step", "metrics"}. `metric` None: the last is the best.
    """
    if metric is None or best is None:
        return True
    # A test set renamed since the last best: it is not known how good that was there.
    value, old = new["metrics"][metric], best["metrics"].get(metric, math.nan)
    return math.isnan(old) or (value > old if evaluator.larger_is_better else value < old)
