"""What a table of results shows, in no format yet: columns, numbers as text, signs, notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from hpcdistill.errors import plural
from hpcdistill.metrics.measured_cost import is_cost, is_time
from hpcdistill.sweep.grid import Metric
from hpcdistill.sweep.results import Which
from hpcdistill.sweep.table_rows import MetricEntry, Order, ResultTable, Summary, TableRow, TrialState, best_rows


class Sign(NamedTuple):
    """How a state is shown."""

    text: str
    latex: str
    meaning: str


SIGNS: dict[TrialState, Sign] = {
    "reported": Sign("\u2020", r"$\dagger$", "reported by the paper, not trained here"),
    "measured": Sign("\u2021", r"$\ddagger$", "measured or counted; nothing is trained for it"),
    "running": Sign("\u25b7", r"$\triangleright$", "running"),
    "queued": Sign("\u25cb", r"$\circ$", "waiting in the queue"),
    "stopped": Sign("\u2016", r"$\parallel$", "stopped, can go on"),
    "failed": Sign("\u2717", r"$\times$", "failed"),
    "blocked": Sign("\u2298", r"$\oslash$", "blocked: its teacher is missing"),
    "missing": Sign("\u2014", "---", "missing: not run"),
    "unreadable": Sign("\u26a0", "(!)", "its result.json is damaged"),
    "unmeasured": Sign("?", "?", "finished, but this was not measured"),
}
PLUS_MINUS = "\u00b1"
ARROWS = {"higher": ("\u2191", r"$\uparrow$"), "lower": ("\u2193", r"$\downarrow$")}

_PANEL = 9  # columns of numbers that fit on a page

ColumnKind = Literal["label", "paper", "ours", "difference", "last", "best"]


@dataclass(frozen=True)
class Column:
    """A column: a label, or a side of a metric."""

    kind: ColumnKind
    head: str
    metric: Metric | None = None
    begins: bool = False  # the first of its metric


@dataclass(frozen=True)
class TableCell:
    """What stands in a table's cell."""

    text: str = ""
    spread: str = ""  # standard deviation
    n: int = 0  # runs, where they are several
    bold: bool = False
    signs: tuple[tuple[TrialState, int], ...] = ()  # why runs are missing, and how many
    value: float | None = None  # to sort by
    explained: str = ""  # what a reader is told who points at it


@dataclass(frozen=True)
class Panel:
    """As many metrics of a table as fit on a page, behind the labels."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[TableCell, ...], ...]  # in the order of the table's

    @property
    def naming(self) -> int:
        """The label that tells most rows apart, of equal ones the last: a page keeps it in sight."""
        labels = [number for number, column in enumerate(self.columns) if column.metric is None]
        return max(labels, key=lambda number: (len({row[number].text for row in self.rows}), number), default=0)

    @property
    def spans(self) -> list[tuple[Metric | None, int]]:
        """Columns side by side of one metric; labels have None."""
        spans: list[tuple[Metric | None, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.metric:
                spans[-1] = (column.metric, spans[-1][1] + 1)
            else:
                spans.append((column.metric, 1))
        return spans


@dataclass(frozen=True)
class Layout:
    """A table as it is shown, in no format yet."""

    table: ResultTable
    panels: tuple[Panel, ...]

    @property
    def cells(self) -> list[TableCell]:
        """All that stands in it."""
        return [cell for panel in self.panels for row in panel.rows for cell in row]

    @property
    def legend(self) -> list[tuple[Sign, str]]:
        """The signs that are in it, and what they mean."""
        used = {state for cell in self.cells for state, _ in cell.signs}
        return [(sign, sign.meaning) for state, sign in SIGNS.items() if state in used]

    @property
    def caption(self) -> str:
        """What the table is, and which of the paper."""
        grid = self.table.grid
        of = f"{grid.paper}, table {grid.table}" if grid.table else grid.paper
        return f"{grid.title} ({of})" if of else grid.title


def lay_out(table: ResultTable) -> Layout:
    """The panels of `table`: labels, then of each metric the paper's number, ours, the difference, our other one."""
    grid = table.grid
    labels = [Column("label", label) for label in dict.fromkeys(label for cell in grid.cells for label in cell.labels)]
    blocks: list[list[Column]] = []  # that stay together: a trained metric; all that are only printed, side by side
    bold: dict[tuple[str, ColumnKind], set[int]] = {}
    only_printed = False
    for metric in grid.metrics:
        trained = any(metric.name in cell.of for cell in grid.cells)
        printed = any(metric.name in cell.printed for cell in grid.cells)
        columns = [Column("paper", "paper", metric)] if printed else []
        if trained or any(metric.name in cell.measured for cell in grid.cells):
            columns.append(Column("ours", "ours", metric))
        if trained:
            names = [cell.of[metric.name] for cell in grid.cells if metric.name in cell.of]
            columns += [Column("difference", "diff.", metric)] if printed and not any(map(is_time, names)) else []
            other: Which = "best" if grid.ours == "last" else "last"
            if not all(map(is_cost, names)):  # which is of the network, whatever its weights
                columns.append(Column(other, f"ours, {other}", metric))
            bold[metric.name, "paper"] = best_rows(table, metric, printed=True)
            bold[metric.name, "ours"] = best_rows(table, metric, printed=False)
        if trained or not only_printed:
            blocks.append([])
        blocks[-1] += [replace(column, begins=not number) for number, column in enumerate(columns)]
        only_printed = not trained
    panels: list[list[Column]] = []
    for block in blocks:
        if not panels or len(panels[-1]) + len(block) > _PANEL:
            panels.append([])
        panels[-1] += block
    return Layout(table, tuple(_panel(table, [*labels, *columns], bold) for columns in panels))


def _panel(table: ResultTable, columns: Sequence[Column], bold: Mapping[tuple[str, ColumnKind], set[int]]) -> Panel:
    rows = []
    for number, row in enumerate(table.rows):
        cells = []
        for column in columns:
            if column.metric is None:
                cells.append(TableCell(row.cell.labels.get(column.head, "")))
            else:
                best = number in bold.get((column.metric.name, column.kind), ())
                cells.append(_table_cell(row, column.kind, column.metric, best))
        rows.append(tuple(cells))
    return Panel(tuple(columns), tuple(rows))


def order_text(order: Order, alone: bool = False) -> str:
    """One order of cells in words; `alone`: the table has no other metric that it could be of."""
    where = ", ".join(part for part in ("" if alone else order.metric.label, *order.group) if part)
    if math.isnan(order.tau):
        said = f"one of the two orders ties all cells (n = {order.n})"
    else:
        same = "the same order" if order.tau > 1 - 1e-9 else "the reverse order" if order.tau < -1 + 1e-9 else ""
        said = f"Kendall tau-b {order.tau:.2f} (n = {order.n})" + (f", {same}" if same else "")
    return f"{where}: {said}" if where else said


def notes(layout: Layout, legend: bool = True) -> list[str]:
    """What is to be read below the table."""
    table = layout.table
    lines = [f"Attention: {flag}" for flag in table.flags]
    seeds = ", ".join(map(str, table.seeds))
    several = any(cell.n > 1 for cell in layout.cells)
    ours = f"Ours: the run's {table.grid.ours} weights"
    if table.choices:
        of = f" from {table.evaluations} evaluations" if table.evaluations else ""
        ours += f"; its best are chosen{of} by {'; or by '.join(table.choices)}"
    ours += f"; mean {PLUS_MINUS} sample standard deviation (number of runs)" if several else ""
    lines.append(f"{ours}; seed {seeds}." if len(table.seeds) == 1 else f"{ours}; seeds {seeds}.")
    alone = len({order.metric for order in table.orders}) < 2
    lines += [f"Our order of the cells against the paper's: {order_text(order, alone)}." for order in table.orders]
    lines += [f"Protocol: {protocol}." for protocol in table.protocols]
    lines += _device_notes(table)
    lines += [f"Not measured: {line}." for line in table.unmeasured]
    if table.revisions:
        lines.append(f"Code: {', '.join(table.revisions)}.")
    lines += dict.fromkeys(row.cell.note for row in table.rows if row.cell.note)
    if legend and layout.legend:
        lines.append("Signs: " + "; ".join(f"{sign.text} {meaning}" for sign, meaning in layout.legend) + ".")
    return lines


def _device_notes(table: ResultTable) -> list[str]:
    """What our times were measured on, beside the paper's."""
    if not table.devices:
        return []
    metrics = [m for m in table.grid.metrics if any(is_time(cell.of.get(m.name, "")) for cell in table.grid.cells)]
    lines = []
    for metric in metrics:
        paper = f"the paper's on {metric.device}" if metric.device else "the paper's on a device of its own"
        ours = "; ".join(table.devices)
        lines.append(f"{metric.label}: ours on {ours}; {paper}: not to be compared.")
    return lines


def number_text(value: float, digits: int, signed: bool = False) -> str:
    """`value` with `digits` after the point; zero has no sign."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.lstrip("+-") if not float(text) else text


def _table_cell(row: TableRow, kind: ColumnKind, metric: Metric, bold: bool) -> TableCell:
    entry: MetricEntry = row.entries[metric.name]
    if kind == "paper":
        value = entry.printed
        return TableCell() if value is None else TableCell(number_text(value, metric.digits), bold=bold, value=value)
    if kind == "difference":
        value = entry.difference
        return TableCell() if value is None else TableCell(number_text(value, metric.digits, signed=True), value=value)
    which: Which = entry.which if kind == "ours" else "best" if kind == "best" else "last"
    summary = entry.ours if kind == "ours" else entry.best if kind == "best" else entry.last
    signs = tuple(row.states(metric.name).items()) if kind == "ours" else ()
    explained = _explained(row, metric, summary, which)
    if summary is None:
        return TableCell(signs=signs, explained=explained)
    spread = "" if summary.deviation is None else number_text(summary.deviation, metric.digits)
    text = number_text(summary.mean, metric.digits)
    return TableCell(text, spread, summary.n, bold, signs, summary.mean, explained)


def _explained(row: TableRow, metric: Metric, summary: Summary | None, which: Which) -> str:
    """Each seed's number and where it is from, or why it has none."""
    cost = is_cost(row.cell.of.get(metric.name, ""))
    lines = [f"{which} weights"] if summary and not cost and not row.entries[metric.name].measured else []
    for trial in row.trials:
        if trial.run is None:
            meaning = SIGNS[trial.state].meaning if trial.state in SIGNS else trial.state
            lines.append(f"seed {trial.seed}: {meaning}" + (f" ({trial.reason})" if trial.reason else ""))
        else:
            values = trial.run.metrics(which)
            value = values.get(row.cell.of.get(metric.name, ""))
            text = "not measured" if value is None else number_text(value, metric.digits + 2)
            count = trial.run.evaluations if which == "best" and not cost else None
            chosen = f", of {plural(count, 'evaluation')}" if count else ""
            lines.append(f"seed {trial.seed}: {text}, {trial.run.folder.name}{chosen}")
    return "\n".join(lines)
