"""Why the numbers of a table may not be comparable, or say nothing good: a line for each thing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from hpcdistill.errors import plural
from hpcdistill.metrics.measured_cost import is_cost
from hpcdistill.sweep.grid import Grid, Metric
from hpcdistill.sweep.results import RunResult
from hpcdistill.sweep.table_rows import TableRow, runs_of

# Not part of how a number is made: what chose the weights (`RunResult.data` compares that), and words that repeat.
_NOT_PROTOCOL = ("selects", "chosen_by", "note")
_NAMED = 4  # of the different things that a flag names
_DEVICE = "the device that times are of"
_EVALUATIONS = "number of evaluations that the best weights are chosen from"


def comparison_flags(grid: Grid, rows: Sequence[TableRow]) -> list[str]:
    """A line for each thing in which runs differ whose numbers are compared."""
    flags = []
    revisions = Counter(run.revision for run in runs_of(rows))
    if len(revisions) > 1:
        flags.append(f"Code of {len(revisions)} revisions: {_counted(revisions)}.")
    if changed := sum(count for revision, count in revisions.items() if revision.endswith("+")):
        flags.append(f"{plural(changed, 'run')} of code with changes that were not committed (+).")
    if any(map(is_cost, _names(rows))):
        flags += [run.cost.damage for run in runs_of(rows) if run.cost.damage]
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


def other_images(grid: Grid, rows: Sequence[TableRow]) -> list[str]:
    """A line for each test set of which runs have measured another number of images than the printed numbers are of.

    FID falls with the number of images: two samples of one distribution are the farther apart the fewer they are.
    """
    lines = []
    for test_set, printed in grid.printed_images.items():
        others: dict[int, dict[str, None]] = {}
        for row in rows:
            for trial in row.trials if test_set in row.cell.test_sets else ():
                protocol = (trial.run.result.get("protocol") or {}) if trial.run else {}
                count = (protocol.get("test_sets") or {}).get(test_set)
                if count not in (None, printed):
                    others.setdefault(count, {})[row.cell.title] = None
        if others:
            # Titles have commas in them.
            ours = ", ".join(f"of {count} ({_first_few(list(titles), '; ')})" for count, titles in others.items())
            lines.append(f"The printed numbers are of {printed} test images of {test_set}; ours are {ours}.")
    return lines


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
            lines.append(f"Below bicubic in {metric.label}: {_first_few(below, '; ')}.")
    return lines


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


def _first_few(named: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return between.join(named[:_NAMED]) + more
