"""A run's numbers beside those of bicubic enlargement, which trains nothing: a network below it has learned nothing.

Nothing here imports torch: tables of finished runs ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpcdistill.metrics.base import SR_METRICS

BICUBIC = "bicubic"  # the key in result.json: test set -> {metric: value}
LEAST = 0.005  # dB: less is not seen in a table


def bicubic_value(result: Mapping[str, Any], metric: str) -> float | None:
    """Bicubic's number for `metric` ("student/set5/psnr") in a result.json; None where it has none."""
    _, _, rest = metric.partition("/")
    test_set, _, name = rest.partition("/")
    sets = result.get(BICUBIC)
    numbers = sets.get(test_set) if isinstance(sets, dict) else None
    value = numbers.get(name) if isinstance(numbers, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def below_bicubic(result: Mapping[str, Any], which: str = "best") -> list[str]:
    """A line for each network and test set of a result.json whose first metric (PSNR) is below bicubic's."""
    lines = []
    for metric, value in ((result.get(which) or {}).get("metrics") or {}).items():
        if (
            not metric.endswith(f"/{SR_METRICS[0].name}")
            or value is None
            or (bicubic := bicubic_value(result, metric)) is None
        ):
            continue
        if bicubic - value >= LEAST:
            generator, test_set, _ = metric.split("/")
            lines.append(f"{generator} on {test_set}: {below(value, bicubic)}")
    return lines


def below(value: float, bicubic: float) -> str:
    """How far a PSNR (dB) is below bicubic's."""
    return f"{bicubic - value:.2f} dB below bicubic ({value:.2f} against {bicubic:.2f} dB)"
