"""From finished runs to the numbers of a table: means over seeds, differences from the paper, order, what is missing.

Nothing is dropped: a cell without a number says why. How it looks is the business of `table_layout` and `grid_report`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import kendalltau  # type: ignore[import-untyped]

from hpcdistill.errors import plural
from hpcdistill.metrics.measured_cost import is_cost, is_time
from hpcdistill.metrics.selection import choice_of
from hpcdistill.sweep.grid import Cell, Grid, Metric
from hpcdistill.sweep.plan import Plan
from hpcdistill.sweep.results import WHICH, Found, RunResult, Which
from hpcdistill.sweep.status import TaskStatus

TrialState = Literal[
    "finished", "running", "queued", "stopped", "failed", "blocked", "missing", "unreadable", "unmeasured",
    "reported", "measured",
]  # fmt: skip
# Not part of how a number is made: what chose the weights (`RunResult.data` compares that), and words that repeat.
_NOT_PROTOCOL = ("selects", "chosen_by", "note")
BICUBIC_LABEL = "bicubic enlargement"
_NAMED = 4  # of the different things that a flag names
_DEVICE = "the device that times are of"
_EVALUATIONS = "number of evaluations that the best weights are chosen from"


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
        return _runs(self.rows)

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


def make_tables(plan: Plan, found: Found, statuses: Mapping[str, TaskStatus]) -> list[ResultTable]:
    """The tables of `plan` with the results of `found`; `statuses` says by key how runs without a result are."""
    by_folder = {run.folder.name: run for run in found.runs}
    results = dict(found.by_key)
    for key, status in statuses.items():
        # A run of the same identity may have been written under another key, or from before there were any.
        if key not in results and status.state == "finished" and status.run and status.run.name in by_folder:
            results[key] = by_folder[status.run.name]
    damaged = {run.folder.name: run.line for run in found.unreadable}
    unreadable = {run.key: run.line for run in found.unreadable if run.key}
    # A folder whose configuration is gone too is known by its task.
    unreadable |= {s.key: damaged[s.run.name] for s in statuses.values() if s.run and s.run.name in damaged}
    tables = []
    for grid in plan.grids:
        seeds = plan.seeds[grid.name]
        rows = []
        for number, cell in enumerate(grid.cells):
            trials: tuple[Trial, ...] = ()
            if cell.kind == "run":
                keys = {seed: plan.cells[grid.name, number, seed] for seed in seeds}
                trials = tuple(_trial(seed, key, results, unreadable, statuses) for seed, key in keys.items())
            entries = {metric.name: _entry(cell, metric.name, trials, grid.ours) for metric in grid.metrics}
            rows.append(TableRow(cell, grid.group(cell), trials, entries))
        rows += bicubic_rows(grid, rows)
        groups = list(dict.fromkeys(row.group for row in rows))
        rows.sort(key=lambda row: groups.index(row.group))  # stable: explicit cells come to the products of their group
        flags = (*_flags(grid, rows), *other_images(grid, rows), *below_bicubic(grid, rows))
        orders = tuple(_orders(grid, rows))
        tables.append(ResultTable(grid, seeds, tuple(rows), orders, flags, _unmeasured(plan, rows)))
    return tables


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


def _trial(
    seed: int,
    key: str | None,
    results: Mapping[str, RunResult],
    unreadable: Mapping[str, str],
    statuses: Mapping[str, TaskStatus],
) -> Trial:
    assert key is not None, "only reported cells have none"
    if key in results:
        return Trial(seed, key, "finished", results[key])
    if key in unreadable:
        return Trial(seed, key, "unreadable", reason=unreadable[key])
    status = statuses.get(key)
    if status is None:
        return Trial(seed, key, "missing")
    reason = status.reason or ""
    if status.state == "finished":
        return Trial(seed, key, "missing", reason=reason or "it has finished, but its result is not in this folder")
    if status.log and status.state in ("failed", "stopped"):
        reason += f" (log: {status.log})"
    return Trial(seed, key, status.state, reason=reason.strip())


def _entry(cell: Cell, metric: str, trials: Sequence[Trial], which: Which = "best") -> MetricEntry:
    printed = cell.printed.get(metric)
    if metric in cell.measured:
        ours = Summary((cell.measured[metric],))
        return MetricEntry(printed, ours, None, measured=True)
    found: dict[Which, Summary | None] = {}
    for weights in WHICH:
        measured = [trial.run.metrics(weights) for trial in trials if trial.run]
        name = cell.of.get(metric)
        values = tuple(values[name] for values in measured if name in values)
        found[weights] = Summary(values) if values else None
    return MetricEntry(printed, found["best"], found["last"], which=which, time=is_time(cell.of.get(metric, "")))


def _unmeasured(plan: Plan, rows: Sequence[TableRow]) -> tuple[str, ...]:
    """A line for each run and test set of a cell that the run, finished before, was not evaluated on.

    And one for each network whose cost a table asks for and nobody has measured.
    """
    lines: dict[str, None] = {}
    for row in rows:
        for name in row.cell.of.values():
            generator, _, rest = name.partition("/")
            test_set = rest.partition("/")[0]
            for trial in row.trials:
                if trial.run is None or name in trial.run.metrics("best"):
                    continue
                if is_cost(name):
                    if not trial.run.cost.damage:  # which is a flag of the table
                        words = ["python", "-m", "hpcdistill.benchmark", "latency", str(trial.run.folder)]
                        command = shlex.join([*words, "--generator", generator, "--protocol", "paper"])
                        lines[f"what {trial.run.folder.name}'s {generator} takes; `{command}` measures it"] = None
                    continue
                planned = plan.runs.get(str(trial.key))
                folder = planned.loaded.config.data.eval.get(test_set) if planned else None
                words = ["python", "-m", "hpcdistill.evaluate", str(trial.run.folder), "--generator", generator]
                command = f"{shlex.join(words)} --data {shlex.quote(folder) if folder else 'SET'}"
                lines[f"{trial.run.folder.name} has finished without {test_set}; `{command}` measures it"] = None
    named = list(lines)
    more = [f"{len(named) - _NAMED} more, of runs that have finished"] if len(named) > _NAMED else []
    return (*named[:_NAMED], *more)


def bicubic_rows(grid: Grid, rows: Sequence[TableRow]) -> list[TableRow]:
    """A row for each group with the numbers of bicubic enlargement that its runs have measured beside their own.

    None of a group where a grid has one itself, or whose runs do not agree on it.
    """
    found = []
    first = next((label for cell in grid.cells for label in cell.labels if label not in grid.within), None)
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        numbers = {metric.name: bicubic_of(members, metric) for metric in grid.metrics}
        measured = {name: value for name, value in numbers.items() if value is not None}
        if not measured or first is None or any(set(row.cell.measured) & set(measured) for row in members):
            continue
        labels = {first: BICUBIC_LABEL} | {
            label: value for label, value in zip(grid.within, group, strict=True) if value
        }
        cell = Cell(labels, "reported", (), {}, measured=measured)
        entries = {metric.name: _entry(cell, metric.name, ()) for metric in grid.metrics}
        found.append(TableRow(cell, group, (), entries))
    return found


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
            ours, bicubic = row.entries[metric.name].ours, bicubic_of([row], metric)
            if ours is None or bicubic is None:
                continue
            ahead = ours.mean - bicubic if metric.better == "higher" else bicubic - ours.mean
            if round(ahead, metric.digits) < 0:
                numbers = f"{ours.mean:.{metric.digits}f} against {bicubic:.{metric.digits}f}"
                below.append(f"{row.cell.title} ({numbers})")
        if below:
            lines.append(f"Below bicubic in {metric.label}: {_first_few(below)}.")
    return lines


def other_images(grid: Grid, rows: Sequence[TableRow]) -> list[str]:
    """A line for each test set of which runs have measured another number of images than the printed numbers are of.

    FID falls with the number of images: two samples of one distribution are the farther apart the fewer they are.
    """
    lines = []
    for test_set, printed in grid.printed_images.items():
        others: dict[str, None] = {}
        for row in rows:
            for trial in row.trials if test_set in row.cell.test_sets else ():
                protocol = (trial.run.result.get("protocol") or {}) if trial.run else {}
                count = (protocol.get("test_sets") or {}).get(test_set)
                if count not in (None, printed):
                    others[f"{row.cell.title} ({count})"] = None
        if others:
            named = _first_few(list(others))
            lines.append(f"The printed numbers are of {printed} test images of {test_set}; of others: {named}.")
    return lines


def _orders(grid: Grid, rows: Sequence[TableRow]) -> list[Order]:
    orders = []
    for metric in grid.metrics:
        if any(is_cost(row.cell.of.get(metric.name, "")) for row in rows):  # of networks: no training orders them
            continue
        for group in dict.fromkeys(row.group for row in rows):
            pairs = []
            for row in rows:
                entry = row.entries[metric.name]
                if row.group == group and entry.printed is not None and entry.ours is not None:
                    pairs.append((entry.printed, entry.ours.mean))
            pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
            if len(pairs) > 1:
                tau = float(kendalltau(*zip(*pairs, strict=True), variant="b").statistic)
                orders.append(Order(metric, group, tau, len(pairs)))
    return orders


def _flags(grid: Grid, rows: Sequence[TableRow]) -> list[str]:
    """A line for each thing in which runs differ whose numbers are compared."""
    flags = []
    revisions = Counter(run.revision for run in _runs(rows))
    if len(revisions) > 1:
        flags.append(f"Code of {len(revisions)} revisions: {_counted(revisions)}.")
    if changed := sum(count for revision, count in revisions.items() if revision.endswith("+")):
        flags.append(f"{plural(changed, 'run')} of code with changes that were not committed (+).")
    if any(map(is_cost, _names(rows))):
        flags += [run.cost.damage for run in _runs(rows) if run.cost.damage]
    for group in dict.fromkeys(row.group for row in rows):
        facts: dict[str, Counter[str]] = {}
        counted = set()
        for row in rows:
            used = {part for name in row.cell.of.values() for part in name.split("/")[1:2]}
            for trial in row.trials:
                if row.group != group or trial.run is None or trial.run.folder in counted:
                    continue
                counted.add(trial.run.folder)
                facts_of_run = {**_protocol(trial.run, used), **_data(trial.run), **_devices(row, trial.run)}
                if grid.ours == "best" and trial.run.evaluations is not None:  # the best of more is better by chance
                    facts_of_run[_EVALUATIONS] = str(trial.run.evaluations)
                for name, value in facts_of_run.items():
                    facts.setdefault(name, Counter())[value] += 1
        where = f" ({', '.join(group)})" if any(group) else ""
        for name, values in facts.items():
            missing = 0 if name == _DEVICE else len(counted) - values.total()
            if len(values) > 1 or missing:
                values.update({"not given": missing} if missing else {})
                flags.append(f"Cells that are compared{where} differ in {name}: {_counted(values)}.")
    return flags


def _protocol(run: RunResult, used: set[str]) -> dict[str, str]:
    """The protocol by its parts, of the test sets in `used` alone: others may be measured besides."""
    facts = {}
    protocol = run.result.get("protocol") or {}
    for name, value in protocol.items():
        if name in _NOT_PROTOCOL:
            continue
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if key in used}
        facts[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return facts


def _data(run: RunResult) -> dict[str, str]:
    return {name: "+".join(digest[:12] for digest in digests) for name, digests in run.data.items()}


def _devices(row: TableRow, run: RunResult) -> dict[str, str]:
    """What a run's times were measured on, where the table has any."""
    found = dict.fromkeys(run.cost.devices[name] for name in row.cell.of.values() if name in run.cost.devices)
    return {_DEVICE: " and ".join(found)} if found else {}


def _names(rows: Iterable[TableRow]) -> set[str]:
    """The names in result.json of what the cells have."""
    return {name for row in rows for name in row.cell.of.values()}


def _counted(values: Counter[str]) -> str:
    return _first_few([f"{value} ({plural(count, 'run')})" for value, count in values.most_common()])


def _first_few(named: Sequence[str]) -> str:
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def _runs(rows: Iterable[TableRow]) -> list[RunResult]:
    """The finished runs of `rows`, each once."""
    return list({trial.run.folder: trial.run for row in rows for trial in row.trials if trial.run}.values())
