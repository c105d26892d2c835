"""From finished runs to the numbers of a table: means over seeds, differences from the paper, order, what is missing.

Nothing is dropped: a cell without a number says why. How it looks is the business of `table_layout` and `grid_report`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from scipy.stats import kendalltau  # type: ignore[import-untyped]

from hpcdistill.metrics.measured_cost import is_cost, is_time
from hpcdistill.sweep.grid import Cell, Grid
from hpcdistill.sweep.plan import Plan
from hpcdistill.sweep.results import WHICH, Found, RunResult, Which
from hpcdistill.sweep.status import TaskStatus
from hpcdistill.sweep.table_flags import below_bicubic, bicubic_of, comparison_flags, other_images
from hpcdistill.sweep.table_rows import MetricEntry, Order, ResultTable, Summary, TableRow, Trial

BICUBIC_LABEL = "bicubic enlargement"
_NAMED = 4  # of the runs that were not measured on all that a table asks for


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
        flags = (*comparison_flags(grid, rows), *other_images(grid, rows), *below_bicubic(grid, rows))
        orders = tuple(_orders(grid, rows))
        tables.append(ResultTable(grid, seeds, tuple(rows), orders, flags, _unmeasured(plan, rows)))
    return tables


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
                        words = ["hpcdistill", "benchmark", "latency", str(trial.run.folder)]
                        command = shlex.join([*words, "--generator", generator, "--protocol", "paper"])
                        lines[f"what {trial.run.folder.name}'s {generator} takes; `{command}` measures it"] = None
                    continue
                planned = plan.runs.get(str(trial.key))
                folder = planned.loaded.config.data.eval.get(test_set) if planned else None
                words = ["hpcdistill", "evaluate", str(trial.run.folder), "--generator", generator]
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
