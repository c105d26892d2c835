"""The sweep's status on the terminal: how many runs of each grid are in which state, then the runs worth a look."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from hpcdistill.console import Table, out
from hpcdistill.errors import plural
from hpcdistill.sweep.logs import log_lines
from hpcdistill.sweep.status import STATES, RunState, TaskStatus
from hpcdistill.sweep.submissions import SubmittedCell

COLOURS: dict[RunState, str] = {
    "finished": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "bold red",
    "stopped": "yellow",
    "blocked": "magenta",
    "missing": "dim",
}
TEACHERS = "teachers"  # the row of runs that are no cell themselves
LOG_LINES, MOST_LOGS = 3, 3
LOG_LINE = 400  # characters of one that are shown
LEAST_ROWS = 3
REASON = 44  # columns that a reason beside the table needs; with less it stands below
_FIRST: tuple[RunState, ...] = ("failed", "running", "stopped", "blocked", "queued", "missing", "finished")
_WORTH_A_LOOK = ("failed", "running", "stopped", "blocked")


@dataclass
class SweepView:
    """A sweep at this moment: every run once, and the cells that they fill."""

    statuses: Sequence[TaskStatus]
    cells: Mapping[str, Sequence[SubmittedCell]]  # by key; none of a teacher
    problems: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        """Whether something needs its user."""
        return bool(self.problems) or any(status.state == "failed" for status in self.statuses)

    @property
    def over(self) -> bool:
        """Whether nothing runs or waits."""
        return not any(status.state in ("running", "queued") for status in self.statuses)

    def summary(self) -> dict[str, Counter[RunState]]:
        """The number of runs in each state by grid; a run that several grids share counts in each."""
        counted: dict[str, Counter[RunState]] = {}
        for status in self.statuses:
            grids = dict.fromkeys(cell.grid for cell in self.cells.get(status.key, ())) or {TEACHERS: None}
            for grid in grids:
                counted.setdefault(grid, Counter())[status.state] += 1
        return dict(sorted(counted.items(), key=lambda item: item[0] == TEACHERS))


def render(view: SweepView, height: int | None = None, everything: bool = False) -> RenderableType:
    """The tables; with `height` (lines) no more rows than fit, but a few."""
    chosen = [status for status in view.statuses if everything or status.state in _WORTH_A_LOOK]
    chosen.sort(key=lambda status: _FIRST.index(status.state))
    logs = [status for status in chosen if status.state == "failed" and status.log]
    logs = logs if everything else logs[:MOST_LOGS]
    if height is None:
        return _page(view, chosen, len(chosen), logs)
    rows = min(len(chosen), height)
    while True:
        page = _page(view, chosen, rows, logs)
        over = len(out.render_lines(page, pad=False)) - height + 1
        if over <= 0 or (rows <= LEAST_ROWS and not logs):
            return page
        if logs:  # their last lines are mostly the reasons that the rows have
            logs = logs[:-1]
        else:
            rows = max(LEAST_ROWS, rows - max(1, over // 4))  # a reason takes some lines of its own


def _page(view: SweepView, chosen: Sequence[TaskStatus], rows: int, logs: Sequence[TaskStatus]) -> Group:
    """The summary, the first `rows` of `chosen` with their reasons, the ends of `logs`, what is wrong with files."""
    if len(chosen) > rows:  # what runs is of interest even where much has failed
        failed = [status for status in chosen if status.state == "failed"]
        others = [status for status in chosen if status.state != "failed"]
        kept = max(rows // 2, rows - len(others))
        chosen = failed[:kept] + others + failed[kept:]
    parts: list[RenderableType] = [_summary(view)]
    if chosen:
        parts += _runs(view, chosen[:rows])
    if len(chosen) > rows:
        parts.append(Text(f"and {len(chosen) - rows} more; --all without --watch shows every run", style="dim"))
    for status in logs:
        parts += _log(status)
    parts += [Text(problem, style="yellow") for problem in view.problems]
    return Group(*parts)


def _summary(view: SweepView) -> Table:
    table = Table(title=f"{plural(len(view.statuses), 'run')}, {time.strftime('%H:%M:%S')}", title_justify="left")
    table.add_column("grid")
    for state in STATES:
        table.add_column(state, justify="right", style=COLOURS[state])
    rows = view.summary()
    for grid, counted in rows.items():
        table.add_row(Text(grid), *(str(counted[state] or "") for state in STATES))
    if len(rows) > 1:
        total = Counter(status.state for status in view.statuses)
        table.add_section()
        table.add_row("all, each run once", *(str(total[state] or "") for state in STATES))
    return table


def _runs(view: SweepView, statuses: Sequence[TaskStatus]) -> list[RenderableType]:
    """A row a run; columns that none has anything for are left out. Reasons stand below where the screen is narrow."""
    columns: list[tuple[str, list[Text]]] = [
        ("run", [Text(title(view, status)) for status in statuses]),
        ("state", [Text(status.state, style=COLOURS[status.state]) for status in statuses]),
        ("step", [Text(_steps(status)) for status in statuses]),
        ("step/s", [Text(f"{status.rate:.3g}" if status.rate else "") for status in statuses]),
        ("left", [Text(duration(status.left_s) if status.left_s is not None else "") for status in statuses]),
        ("metric", [Text(_metric(status)) for status in statuses]),
        ("try", [Text(str(status.attempts or "")) for status in statuses]),
        ("job", [Text(status.job or "") for status in statuses]),
    ]
    columns = [(name, cells) for name, cells in columns if any(cell.plain for cell in cells)]
    reasons = [Text(status.reason or "") for status in statuses]
    if not any(reasons):
        return [_table(columns)]
    if out.measure(_table(columns)).maximum + REASON <= out.width:
        return [_table([*columns, ("reason", reasons)])]
    said = [Text.assemble((f"{title(view, s)}: ", COLOURS[s.state]), s.reason) for s in statuses if s.reason]
    return [_table(columns), *said]


def _table(columns: Sequence[tuple[str, list[Text]]]) -> Table:
    table = Table(expand=False)
    for name, _ in columns:
        number = name in ("step", "step/s", "left", "metric", "try")
        table.add_column(name, justify="right" if number else "left", min_width=16 if name == "run" else None)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _metric(status: TaskStatus) -> str:
    return f"{status.metric[0].rpartition('/')[2]} {status.metric[1]:.4g}" if status.metric else ""


def title(view: SweepView, status: TaskStatus) -> str:
    """A run's name, and the first cell that it fills."""
    cells = view.cells.get(status.key, ())
    if not cells:
        return f"{status.name} ({status.key[:6]})"
    first = cells[0]
    seed = f", seed {first.seed}" if first.seed is not None else ""
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return f"{first.grid}: {first.title}{seed}{more}"


def _steps(status: TaskStatus) -> str:
    if status.step is None:
        return ""
    if not status.steps:
        return str(status.step)
    return f"{status.step}/{status.steps} {100 * status.step // status.steps}%"


def _log(status: TaskStatus) -> list[RenderableType]:
    assert status.log is not None
    lines = log_lines(status.log)[-LOG_LINES:]
    return [
        Text(f"{status.log}:", style="dim"),
        *(Text(f"  {line[:LOG_LINE]}", overflow="fold") for line in lines),
    ]


def duration(seconds: float) -> str:
    """59 s, 12 min, 3 h 05, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d}" if hours < 24 else f"{hours // 24} d {hours % 24} h"
