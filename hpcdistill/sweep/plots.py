"""Plots of a table: a metric against each axis, against the networks' cost and over the training; spectra."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hpcdistill.metrics.base import SPECTRAL_ERROR
from hpcdistill.metrics.config import BACKWARDS
from hpcdistill.metrics.measured_cost import is_cost
from hpcdistill.sweep.charts import INK, RULE, SERIES, Chart, Line, figure_svg, page_figure, series_colour
from hpcdistill.sweep.grid import Metric
from hpcdistill.sweep.results import RunResult
from hpcdistill.sweep.table_rows import ResultTable, TableRow
from hpcdistill.training.records import read_row

MACS = "macs"  # the metric that has multiply-accumulates, in units of 10^9
PLOTS = 8  # of a kind and table: more are not looked at
TICKS = 40  # on an axis
CURVES = SERIES - 1  # in a chart; series 0 is grey
REAL = "real"  # the grey curve of a spectrum

_WIDTH = 5.4  # inches
_MARKERS = "osD^vPX"
_LABEL_SIZE = 8.5


@dataclass(frozen=True)
class Plot:
    """A drawing for a page."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """A number on a plot: ours with its deviation, or the paper's."""

    tick: str  # on the axis
    series: str
    value: float
    deviation: float = 0.0
    printed: bool = False


def axis_plots(table: ResultTable, name: str) -> list[Plot]:
    """The first trained metric against each label that varies, for each group of cells that are compared.

    Ours filled, with a bar of one standard deviation to either side; the paper's hollow. `name` begins the ids.
    """
    metric = main_metric(table)
    if metric is None:
        return []
    plots: list[Plot] = []
    for group, rows in _groups(table):
        axes = [axis for axis in _varying(rows) if axis not in table.grid.within]
        for axis in axes:
            others = [other for other in axes if other != axis]
            series = {row.cell.title: ", ".join(row.cell.labels.get(other, "") for other in others) for row in rows}
            ticks = list(dict.fromkeys(row.cell.labels[axis] for row in rows if axis in row.cell.labels))
            named = list(dict.fromkeys(series.values()))
            # A second axis is drawn as colours as long as they can be told apart and are there at several ticks.
            if len(named) > CURVES or len(ticks) < 2 or len(ticks) > TICKS or len(plots) == PLOTS:
                continue
            marks = [
                mark
                for row in rows
                if axis in row.cell.labels
                for mark in _marks(row, metric, row.cell.labels[axis], series[row.cell.title])
            ]
            if len(marks) < 2 or all(mark.printed for mark in marks):
                continue
            title = f"{metric.label} by {axis}" + (f": {', '.join(group)}" if any(group) else "")
            svg = _dot_plot(marks, ticks, named, metric, f"{name}-axis-{len(plots)}", title)
            plots.append(Plot(title, svg))
    return plots


def cost_plots(table: ResultTable, name: str, counted: Callable[[TableRow], float | None]) -> list[Plot]:
    """The first trained metric against the networks' MACs: printed ones, else what `counted` says (10^9).

    For grids that have a metric `macs`: to count takes a second a network, and most ablations are of one.
    """
    metric = main_metric(table)
    if metric is None or not any(other.name == MACS for other in table.grid.metrics):
        return []
    plots: list[Plot] = []
    for group, rows in _groups(table):
        points: list[tuple[float, Mark]] = []
        uses_counted = False
        for row in rows:
            marks = list(_marks(row, metric, row.cell.title, ""))
            macs = row.cell.printed.get(MACS)
            if macs is None and any(not mark.printed for mark in marks):
                macs = counted(row)
                uses_counted |= macs is not None
            if macs is not None and macs > 0:
                points += [(macs, mark) for mark in marks]
        costs = {macs for macs, _ in points}
        if len(costs) < 2 or all(mark.printed for _, mark in points) or len(plots) == PLOTS:
            continue
        title = f"{metric.label} against MACs" + (f": {', '.join(group)}" if any(group) else "")
        note = "MACs as printed" + (", counted by the literature's rule where there are none." if uses_counted else ".")
        shown = {row.cell.title: _short(row, rows) for row in rows}
        plots.append(Plot(title, _scatter(points, shown, metric, f"{name}-cost-{len(plots)}", title), note))
    return plots


def curve_charts(table: ResultTable) -> list[Chart]:
    """The first trained metric over the training, as metrics.jsonl has it; of several seeds the mean."""
    metric = main_metric(table)
    if metric is None:
        return []
    charts: list[Chart] = []
    for group, rows in _groups(table):
        curves = []
        for row in rows[: PLOTS * CURVES]:
            points = _curve(row, metric)
            if points:
                curves.append((_short(row, rows), points))
        for start in range(0, len(curves), CURVES):
            part = curves[start : start + CURVES]
            lines = tuple(Line(label, 1 + number, points) for number, (label, points) in enumerate(part))
            where = ", ".join(group) if any(group) else ""
            title = f"{metric.label} during training" + (f": {where}" if where else "")
            charts.append(Chart(title, "step", metric.label, lines, digits=metric.digits))
    return charts[:PLOTS]


def spectrum_charts(table: ResultTable) -> list[Chart]:
    """The mean radial spectra of real images and of what each row's networks make, of its first run's last evaluation.

    Those that are damaged, or that were not measured, are passed over.
    """
    metric = main_metric(table)
    charts: list[Chart] = []
    for row in table.rows:
        run = next((trial.run for trial in row.trials if trial.run), None)
        if metric is None or run is None:
            continue
        _, test_set, _ = f"{row.cell.of.get(metric.name, '')}//".split("/", 2)
        files = sorted((run.folder / "samples").glob("spectrum-*.json"))
        found = _spectra(files[-1], test_set) if files else {}
        if len(found) < 2 or REAL not in found:
            continue
        if len(charts) == PLOTS:
            charts[-1] = replace(charts[-1], note=f"{charts[-1].note} No more than {PLOTS} rows are drawn.")
            break
        others = sorted((name for name in found if name != REAL), key=lambda name: name == "teacher")[:CURVES]
        lines = tuple(Line(name, number, found[name]) for number, name in enumerate([REAL, *others]))
        title = f"Radial spectrum: {row.cell.title}"
        note = _spectrum_note(run, files[-1], {name: f"{name}/{test_set}/{SPECTRAL_ERROR.name}" for name in others})
        charts.append(Chart(title, "cycles per image", "log10 of power (levels squared)", lines, note=note))
    return charts


def _spectrum_note(run: RunResult, file: Path, metrics: Mapping[str, str]) -> str:
    """Which run and step the spectra in `file` are of, and each network's error, by the names of the `metrics`."""
    digits = file.stem.rpartition("-")[2]
    step = int(digits) if digits.isdecimal() else None
    measured = run.metrics("last") if run.step("last") == step else {}
    errors = [f"{name} {measured[key]:.{SPECTRAL_ERROR.digits}f}" for name, key in metrics.items() if key in measured]
    said = f"Seed {run.result.get('seed', '?')}, step {digits if step is None else step}. "
    said += f"{SPECTRAL_ERROR.name} compares the right half of the axis"
    return f"{said}: {', '.join(errors)}." if errors else f"{said}."


def _spectra(file: Path, test_set: str) -> dict[str, tuple[tuple[float, float], ...]]:
    """Name -> (radius, log10 of power), of those that translate a to b."""
    try:
        curves = json.loads(file.read_bytes())[test_set]
        return {
            name: tuple((1.0 + ring, math.log10(max(float(power), 1e-3))) for ring, power in enumerate(curve))
            for name, curve in curves.items()
            if not name.endswith(BACKWARDS) and curve
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}


def main_metric(table: ResultTable) -> Metric | None:
    """The metric that is plotted: the first that training gives runs."""
    for metric in table.grid.metrics:
        names = [row.cell.of[metric.name] for row in table.rows if metric.name in row.cell.of]
        if not all(map(is_cost, names)):
            return metric
    return None


def curve(run: RunResult, metric: str) -> dict[int, float]:
    """Step -> value of the lines of the run's metrics.jsonl that have `metric`; damaged lines are passed over."""
    try:
        content = (run.folder / "metrics.jsonl").read_bytes()
    except OSError:
        return {}
    wanted = json.dumps(metric).encode()
    points = {}
    at = content.find(wanted)
    while at >= 0:  # a long log has few such lines; only they are parsed
        start, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
        end = len(content) if end < 0 else end
        try:
            if (row := read_row(content[start:end])) is not None:
                points[row["step"]] = float(row[metric])
        except (ValueError, KeyError, TypeError, OverflowError):
            pass
        at = content.find(wanted, end)
    return points


def _curve(row: TableRow, metric: Metric) -> tuple[tuple[float, float], ...]:
    """The mean over the row's seeds, at the steps that all of them have."""
    name = row.cell.of.get(metric.name)
    found = [curve(trial.run, name) for trial in row.trials if trial.run and name]
    found = [points for points in found if points]
    if not found:
        return ()
    steps = sorted(set.intersection(*(set(points) for points in found)))
    means = [(float(step), sum(points[step] for points in found) / len(found)) for step in steps]
    return tuple((step, mean) for step, mean in means if math.isfinite(mean))


def _groups(table: ResultTable) -> Iterator[tuple[tuple[str, ...], list[TableRow]]]:
    for group in dict.fromkeys(row.group for row in table.rows):
        # Not the row of bicubic enlargement: it is on no axis of the grid.
        rows = [row for row in table.rows if row.group == group and (row.trials or row.cell.printed)]
        yield group, rows


def _varying(rows: Sequence[TableRow]) -> list[str]:
    labels = dict.fromkeys(label for row in rows for label in row.cell.labels)
    return [label for label in labels if len({row.cell.labels.get(label) for row in rows}) > 1]


def _short(row: TableRow, rows: Sequence[TableRow]) -> str:
    """What tells the row from the others of its group, `rows`."""
    own = [row.cell.labels[label] for label in _varying(rows) if label in row.cell.labels]
    return ", ".join(own) or row.cell.title


def _marks(row: TableRow, metric: Metric, tick: str, series: str) -> Iterator[Mark]:
    entry = row.entries[metric.name]
    if entry.printed is not None:
        yield Mark(tick, series, entry.printed, printed=True)
    if entry.ours and math.isfinite(entry.ours.mean):
        deviation = entry.ours.deviation
        known = deviation if deviation is not None and math.isfinite(deviation) else 0.0
        yield Mark(tick, series, entry.ours.mean, known)


def _dot_plot(
    marks: Sequence[Mark], ticks: Sequence[str], series: Sequence[str], metric: Metric, name: str, title: str
) -> str:
    """Ticks one below the other, however long their labels; the series of one tick a little apart."""
    apart = 0.6 / max(len(series), 1)
    height = 0.75 + len(ticks) * (0.26 + 0.1 * len(series)) + (0.35 if len(series) > 1 else 0)
    with page_figure((_WIDTH, max(height, 1.6))) as figure:
        axes = figure.add_subplot()
        legend: dict[str, Any] = {}
        for number, one in enumerate(series):
            colour, marker = series_colour(1 + number % CURVES), _MARKERS[number % len(_MARKERS)]
            for printed in (True, False):
                shown = [mark for mark in marks if mark.series == one and mark.printed == printed]
                if not shown:
                    continue
                offset = apart * (number - (len(series) - 1) / 2)
                drawn = axes.errorbar(
                    [mark.value for mark in shown],
                    [ticks.index(mark.tick) + offset for mark in shown],
                    xerr=None if printed else [mark.deviation for mark in shown],
                    fmt=marker,
                    color=colour,
                    markerfacecolor="none" if printed else colour,
                    markersize=7,
                    markeredgewidth=1.4,
                    elinewidth=1.4,
                    capsize=3,
                )
                if not printed:
                    legend[one] = drawn
        axes.set_yticks(range(len(ticks)), labels=list(ticks))
        axes.set_ylim(len(ticks) - 0.5, -0.5)  # from top to bottom, as the table
        axes.set_xlabel(metric.label)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="both")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if len(series) > 1:
            # Given by hand: of itself a legend leaves out what begins with "_".
            columns = min(3, len(legend))
            labels, handles = list(legend), list(legend.values())
            figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5)
        return figure_svg(figure, name, _said(title, marks, metric))


def _scatter(
    points: Sequence[tuple[float, Mark]], shown: Mapping[str, str], metric: Metric, name: str, title: str
) -> str:
    with page_figure((_WIDTH, 3.6)) as figure:
        axes = figure.add_subplot()
        named: dict[tuple[float, str], tuple[float, str]] = {}
        for macs, mark in points:
            colour = series_colour(2 if mark.printed else 1)
            axes.errorbar(
                [macs],
                [mark.value],
                yerr=[mark.deviation] if mark.deviation else None,
                fmt="o",
                color=colour,
                markerfacecolor="none" if mark.printed else colour,
                markersize=6.5,
                markeredgewidth=1.4,
                capsize=3,
            )
            key = (macs, mark.tick)
            if key not in named or not mark.printed:
                named[key] = (mark.value, shown[mark.tick])
        axes.set_xscale("log")
        costs = [macs for macs, _ in points]
        wide = max(costs) > 100 * min(costs)  # no room for numbers between the powers of ten
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.16, y=0.12)
        axes.set_xlabel("MACs (G)")
        axes.set_ylabel(metric.label)
        axes.grid(axis="both")
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        labels = [(macs, value, label) for (macs, _), (value, label) in named.items()]
        _label_points(figure, axes, labels, [(macs, mark.value) for macs, mark in points])
        return figure_svg(figure, name, _said(title, [mark for _, mark in points], metric))


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]
) -> None:
    """Write each label (x, y, text) beside its point, where it covers neither a point nor another label."""
    figure.draw_without_rendering()  # the layout decides where the points are
    unit = figure.dpi / 72  # display units a typographic point
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in axes.transData.transform(points)]
    frame = axes.get_window_extent()
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        at_x, at_y = axes.transData.transform((x, y))
        width, height = 0.58 * _LABEL_SIZE * len(text) * unit, 1.1 * _LABEL_SIZE * unit
        best, least = (6.0, 0.0), math.inf
        for up in (0, 9, -9, 17, -17, 26, -26, 35, -35):
            for right in (6.0, -6.0):
                left = at_x + right * unit - (width if right < 0 else 0)
                low = at_y + up * unit - height / 2
                box = (left, low, left + width, low + height)
                covered = sum(_overlap(box, other) for other in taken)
                outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1) + max(0.0, frame.y0 - box[1])
                cost = covered + 100 * outside + abs(up) * unit
                if cost < least:
                    best, least, chosen = (right, float(up)), cost, box
        taken.append(chosen)
        axes.annotate(
            text,
            (x, y),
            xytext=best,
            textcoords="offset points",
            ha="right" if best[0] < 0 else "left",
            va="center",
            fontsize=_LABEL_SIZE,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": RULE, "linewidth": 0.8, "shrinkB": 3} if abs(best[1]) > 9 else None,
        )


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """The area that two boxes (left, low, right, high) share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _said(title: str, marks: Sequence[Mark], metric: Metric) -> str:
    """What a reader who cannot see the plot is told."""
    numbers = [
        f"{', '.join(part for part in (mark.tick, mark.series) if part)}: {mark.value:.{metric.digits}f}"
        + (" in the paper" if mark.printed else "")
        for mark in marks
    ]
    return f"{title}. " + "; ".join(numbers)
