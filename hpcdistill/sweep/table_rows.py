"""What a table of results is made of: its rows with their runs, numbers and states, and the order of the cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hpcdistill.errors import plural
from hpcdistill.metrics.measured_cost import is_time
from hpcdistill.metrics.selection import choice_of
from hpcdistill.sweep.grid import Cell, Grid, Metric
from hpcdistill.sweep.results import RunResult, Which

TrialState = Literal[
    "finished", "running", "queued", "stopped", "failed", "blocked", "missing", "unreadable", "unmeasured",
    "reported", "measured",
]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A cell at one seed."""

    seed: int
    key: str | None
    state: TrialState
    run: RunResult | None = None
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """One number of several runs."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        if math.inf in self.values and -math.inf in self.values:
            return math.nan
        return sum(self.values) / self.n

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); None of a single value."""
        if self.n < 2:
            return None
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (self.n - 1))


@dataclass(frozen=True)
class MetricEntry:
    """One metric of a cell: the paper's number and ours."""

    printed: float | None
    best: Summary | None
    last: Summary | None
    measured: bool = False  # ours is of something that is not trained
    which: Which = "best"  # of the weights that are compared with the paper's (`Grid.ours`)
    time: bool = False  # on another device than the paper's: not to be compared

    @property
    def ours(self) -> Summary | None:
        """What stands beside the paper's number."""
        return self.last if self.which == "last" and not self.measured else self.best

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.printed is None or self.ours is None or self.time else self.ours.mean - self.printed


@dataclass(frozen=True)
class TableRow:
    """A cell with its numbers."""

    cell: Cell
    group: tuple[str, ...]  # what the cells that it is compared with have in common
    trials: tuple[Trial, ...]
    entries: dict[str, MetricEntry]  # by metric

    def states(self, metric: str) -> Counter[TrialState]:
        """How many of its trials have not got `metric`, by the reason; or that it is reported, or measured alone."""
        states: Counter[TrialState] = Counter()
        if self.entries[metric].measured:
            states["measured"] = 1
        elif self.cell.kind == "reported":
            if self.cell.printed or not self.cell.measured:  # not a row of our own that has other metrics
                states["reported"] = 1
        else:
            name = self.cell.of.get(metric)
            for trial in self.trials if name else ():
                if trial.run is None:
                    states[trial.state] += 1
                elif name not in trial.run.metrics("best"):
                    states["unmeasured"] += 1
        return states


@dataclass(frozen=True)
class Order:
    """Whether our order of cells is the paper's: Kendall's tau-b over the cells that have both numbers."""

    metric: Metric
    group: tuple[str, ...]
    tau: float  # NaN where one of the two orders ties everything
    n: int


@dataclass(frozen=True)
class ResultTable:
    """A grid with its numbers."""

    grid: Grid
    seeds: tuple[int, ...]
    rows: tuple[TableRow, ...]  # group by group, otherwise in the grid's order
    orders: tuple[Order, ...]
    flags: tuple[str, ...]  # why its numbers may not be comparable, or say nothing good
    unmeasured: tuple[str, ...] = ()  # how to have what finished runs were not measured on

    @property
    def runs(self) -> list[RunResult]:
        """The finished runs in it, each once."""
        return runs_of(self.rows)

    @property
    def devices(self) -> list[str]:
        """What the times of its runs were measured on, each device once."""
        names = [name for row in self.rows for name in row.cell.of.values() if is_time(name)]
        return list(
            dict.fromkeys(run.cost.devices[name] for name in names for run in self.runs if name in run.cost.devices)
        )

    @property
    def protocols(self) -> list[str]:
        """How the numbers of its runs were made, each way once."""
        return _described(run.result for run in self.runs)

    @property
    def choices(self) -> list[str]:
        """What chose the best weights of its runs, each way once, the usual one first."""
        return [said for said, _ in Counter(filter(None, (choice_of(run.result) for run in self.runs))).most_common()]

    @property
    def evaluations(self) -> str:
        """How many evaluations the best weights of its runs were chosen from: "40", "20 to 100"; "" if not known."""
        counts = sorted({run.evaluations for run in self.runs if run.evaluations is not None})
        return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ""

    @property
    def revisions(self) -> list[str]:
        """The code of its runs, each revision once."""
        return list(dict.fromkeys(run.revision for run in self.runs))

    @property
    def counts(self) -> Counter[TrialState]:
        """Cells and seeds by state; a reported cell counts once."""
        states: Counter[TrialState] = Counter()
        for row in self.rows:
            if row.cell.kind == "reported":
                states["measured" if any(entry.measured for entry in row.entries.values()) else "reported"] += 1
            else:
                states.update(trial.state for trial in row.trials)
        return states


def best_rows(table: ResultTable, metric: Metric, printed: bool) -> set[int]:
    """The numbers of the rows that are the best of their group: by the paper's number or ours, rounded as shown."""
    groups: dict[tuple[str, ...], dict[int, float]] = {}
    for number, row in enumerate(table.rows):
        entry = row.entries[metric.name]
        if entry.time and not printed:  # runs may have been measured on different devices
            continue
        value = entry.printed if printed else entry.ours.mean if entry.ours else None
        if value is not None and math.isfinite(value):
            groups.setdefault(row.group, {})[number] = round(value, metric.digits)
    found = set()
    for values in groups.values():
        if len(values) > 1:  # the best of one is no news
            best = max(values.values()) if metric.better == "higher" else min(values.values())
            found |= {number for number, value in values.items() if value == best}
    return found


def describe_protocol(result: Mapping[str, Any]) -> str:
    """How a run's numbers were made, in one line."""
    return next(iter(_described([result])))


def _described(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The different protocols, each with the test sets that it was used on."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        protocol = result.get("protocol") or {}
        sets = protocol.get("test_sets") or {}
        known = ", ".join(
            [f"{name} {protocol[name]}" for name in ("rule", "scale") if name in protocol] + _lr(protocol)
        )
        said = protocol.get("note") or "; ".join(filter(None, (str(protocol.get("metric", "")), known)))
        images = found.setdefault(str(said) or "nothing was measured", {})
        images.update({f"{name} ({plural(count, 'image')})": None for name, count in sets.items()})
    return [f"{said}; {', '.join(images)}" if images else said for said, images in found.items()]


def _lr(protocol: Mapping[str, Any]) -> list[str]:
    """How a run's LR images were made, and which it took as gray; nothing where an earlier version did not say."""
    said = []
    if rules := sorted({str(rule) for rule in (protocol.get("lr") or {}).values()}):
        said.append(f"LR images {' and '.join(rules)}")
    if names := [str(name) for taken in (protocol.get("gray") or {}).values() for name in taken or ()]:
        said.append(f"taken as gray: {', '.join(dict.fromkeys(names))}")
    return said


def runs_of(rows: Iterable[TableRow]) -> list[RunResult]:
    """The finished runs of `rows`, each once."""
    return list({trial.run.folder: trial.run for row in rows for trial in row.trials if trial.run}.values())
