"""How a plan looks in the terminal: the cells of each table, the runs behind them, the job arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from hpcdistill.console import Table, out, say
from hpcdistill.errors import plural
from hpcdistill.sweep.arrays import Array, Retry, Selection
from hpcdistill.sweep.grid import Grid
from hpcdistill.sweep.plan import Plan, PlannedRun
from hpcdistill.sweep.status import TaskStatus

_WIDE = 140  # columns from which a table has room for keys


def show_cells(plan: Plan, statuses: Mapping[str, TaskStatus]) -> None:
    """A table for each grid: its cells with the paper's numbers, their runs, and other cells that show the same run."""
    for grid in plan.grids:
        out.print(_cells(plan, grid, statuses))
        for line in _shared(plan, grid):
            out.print(f"  {line}", markup=False, soft_wrap=True)
        out.print()


def show_arrays(plan: Plan, selection: Selection, arrays: Sequence[Array], script: str | None) -> None:
    """The runs by stage with their GPU hours, what would be submitted, and the script of the first array."""
    stages = Table(title="Runs")
    for head in ("stage", "runs", "of cells", "teachers only", "to start", "GPU hours"):
        stages.add_column(head, justify="right")
    shown = {key for key in plan.cells.values() if key}
    chosen = {run.key for run in selection.chosen}
    for number, runs in enumerate(plan.stages):
        own = sum(run.key in shown for run in runs)
        to_start = sum(run.key in chosen for run in runs)
        stages.add_row(str(number), str(len(runs)), str(own), str(len(runs) - own), str(to_start), _hours(runs))
    reported = len({use[:2] for use, key in plan.cells.items() if key is None})
    cells = len({use[:2] for use in plan.cells})
    wanted = sum(key is not None for key in plan.cells.values())
    stages.caption = (
        f"{plural(cells, 'cell')}, {reported} of them reported only; {plural(wanted, 'training')} wanted, "
        f"{plural(len(plan.runs), 'distinct run')} with teachers: {_hours(plan.runs.values())} GPU hours"
    )
    out.print(stages)
    say_left(selection, None)
    if arrays:
        table = Table(title=f"{plural(len(selection.chosen), 'run')} in {plural(len(arrays), 'job array')}")
        for head in ("array", "tasks", "at a time", "each asks for", "starts", "GPU hours"):
            table.add_column(head, overflow="fold")
        names = [array.name for array in arrays]
        for array in arrays:
            size, parallel = str(len(array.runs)), str(min(array.parallel, len(array.runs)))
            table.add_row(array.name, size, parallel, str(array.shape), _starts(array, names), _hours(array.runs))
        table.add_row("collect", "1", "1", "CPU", "after all of them (afterany)", "-")
        out.print(table)
    if script:
        out.print("\nThe script of the first array:\n")
        out.print(script, markup=False, soft_wrap=True)


def say_left(selection: Selection, retry: Retry | None) -> None:
    """One line on the runs that are left alone."""
    if not selection.left:
        return
    states = Counter(selection.left.values())
    counted = ", ".join(f"{number} {state}" for state, number in states.most_common())
    hint = "; --retry failed starts those that failed" if "failed" in states and retry != "failed" else ""
    say(f"left alone: {counted}{hint}")


def _cells(plan: Plan, grid: Grid, statuses: Mapping[str, TaskStatus]) -> Table:
    seeds = plan.seeds[grid.name]
    where = f"{grid.paper}, table {grid.table}: " if grid.paper and grid.table else ""
    named = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    # Text: what a grid says is no markup, though it may look like some.
    title = Text(f"{where}{grid.title} ({grid.path}, {named})", style="table.title")
    table = Table(title=title, title_justify="left")
    labels = list(dict.fromkeys(label for cell in grid.cells for label in cell.labels))
    for label in labels:
        table.add_column(Text(label), overflow="fold")
    printed = [metric for metric in grid.metrics if any(metric.name in cell.printed for cell in grid.cells)]
    for metric in printed:
        table.add_column(Text(f"{metric.label} (paper)"), justify="right")
    heads = ("run", "key", "state", "teacher") if out.width >= _WIDE else ("run", "state", "teacher")
    for head in heads:
        table.add_column(head, overflow="fold")
    for number, cell in enumerate(grid.cells):
        keys = [plan.cells[grid.name, number, seed] for seed in seeds]
        numbers = [f"{cell.printed[m.name]:.{m.digits}f}" if m.name in cell.printed else "" for m in printed]
        row = [*(cell.labels.get(label, "") for label in labels), *numbers]
        runs = [plan.runs[key] for key in keys if key is not None]
        if not runs:
            table.add_row(*map(Text, row), "reported", style="dim")
            continue
        states = Counter(statuses[run.key].state for run in runs)
        state = ", ".join(f"{count} {name}" if len(runs) > 1 else name for name, count in states.items())
        teachers = dict.fromkeys(plan.runs[run.teacher].name for run in runs if run.teacher)
        key = [runs[0].key] if "key" in heads else []
        table.add_row(*map(Text, (*row, runs[0].name, *key, state, ", ".join(teachers))))
    return table


def _shared(plan: Plan, grid: Grid) -> list[str]:
    """A line for each cell that shares its run, at the first seed, with other cells."""
    grids = {other.name: other for other in plan.grids}
    lines = []
    for number, cell in enumerate(grid.cells):
        key = plan.cells[grid.name, number, plan.seeds[grid.name][0]]
        if key is None:
            continue
        uses = dict.fromkeys(use[:2] for use in plan.runs[key].uses if plan.cells[use] == key)
        others = [f"{name} ({grids[name].cells[i].title})" for name, i in uses if (name, i) != (grid.name, number)]
        if others:
            lines.append(f"{cell.title}: the same run as {'; '.join(others)}")
    return lines


def _starts(array: Array, names: Sequence[str]) -> str:
    waits = [*(names[number] for number in array.after), *(f"job {job}" for job in array.jobs)]
    words = [f"each after its own of {waits.pop()} (aftercorr)"] if array.paired else []
    if array.behind is not None and names[array.behind] not in waits:
        waits.append(names[array.behind])
    words += [f"after {', '.join(waits)} (afterany)"] if waits else []
    return ", ".join(words) or "at once"


def _hours(runs: Iterable[PlannedRun]) -> str:
    known = [run.hours for run in runs]
    total = sum(hours for hours in known if hours is not None)
    unknown = sum(hours is None for hours in known)
    if unknown == len(known):
        return "unknown" if unknown else "0"
    return f"{total:,.1f}" + (f" + {unknown} unknown" if unknown else "")
