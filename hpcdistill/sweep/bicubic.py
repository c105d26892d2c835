"""The cells of a table beside bicubic enlargement, which their runs have measured on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdistill.sweep.grid import Grid, Metric

if TYPE_CHECKING:
    from hpcdistill.sweep.tables import TableRow

_NAMED = 4  # of the cells that a line names


def bicubic_of(rows: Sequence[TableRow], metric: Metric) -> float | None:
    """Bicubic's number for a metric, as all runs of `rows` have it; None where they have none or differ."""
    values = {
        round(value, metric.digits): value
        for row in rows
        for trial in row.trials
        if trial.run and metric.name in row.cell.of
        if (value := trial.run.bicubic(row.cell.of[metric.name])) is not None
    }
    return next(iter(values.values())) if len(values) == 1 else None


def below_bicubic(grid: Grid, rows: Sequence[TableRow]) -> list[str]:
    """A line for each metric that cells are below bicubic enlargement in, each by its own runs' measurement of it."""
    lines = []
    for metric in grid.metrics:
        below = []
        for row in rows:
            best, bicubic = row.entries[metric.name].best, bicubic_of([row], metric)
            if best is None or bicubic is None:
                continue
            ahead = best.mean - bicubic if metric.better == "higher" else bicubic - best.mean
            if round(ahead, metric.digits) < 0:
                numbers = f"{best.mean:.{metric.digits}f} against {bicubic:.{metric.digits}f}"
                below.append(f"{row.cell.title} ({numbers})")
        more = f" and {len(below) - _NAMED} more" if len(below) > _NAMED else ""
        if below:
            lines.append(f"Below bicubic in {metric.label}: {', '.join(below[:_NAMED])}{more}.")
    return lines
