"""Curves as SVG that lives inside a page: its colours are the page's variables, so light and dark come for free."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SERIES = 7  # colours and dash patterns there are; the page's style sheet defines --series-0 .. --series-6
# The dashes tell the lines apart where colours do not. Matplotlib's on-off lengths, in line widths.
DASHES: tuple[tuple[float, ...], ...] = ((2, 2), (), (6, 2), (4, 2, 1, 2), (), (8, 3), (1, 1.5))

_SIZE = (5.4, 3.5)  # inches; drawn as wide as its column
_FONT_SIZE = 11
LINE_WIDTH = 1.9
# Matplotlib wants real colours: each of these stands for a variable and occurs nowhere else in its output.
INK, RULE = "#0a0b0c", "#0a0b0d"
_RC: dict[Any, Any] = {  # matplotlib's keys are a type of their own, another in each version
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's font
    "svg.hashsalt": "hpcdistill",  # the same chart gives the same bytes
    "text.parse_math": False,  # labels are a user's words: a "$" in them begins no formula
    "font.size": _FONT_SIZE,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.linewidth": 1.0,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Line:
    """A curve through `points` (x, y), or with one y and no x range a level that holds everywhere."""

    label: str
    series: int  # 0 .. SERIES - 1: its colour and dashes, the same thing in the same colour all over the page
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. `levels` are drawn across the whole width; their one point's x is not used."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    levels: tuple[Line, ...] = ()
    log_y: bool = False
    y_range: tuple[float, float] | None = None  # None: all that was measured
    digits: int = 2  # of y in the list of numbers
    note: str = ""

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The numbers behind the curves: x, then each line's y (empty where it has none)."""
        columns = [dict(line.points) for line in self.lines]
        places = sorted({x for column in columns for x in column})
        return tuple(
            (f"{x:,.10g}", *(f"{column[x]:.{self.digits}f}" if x in column else "" for column in columns))
            for x in places
        )


def chart_svg(chart: Chart, name: str) -> str:
    """`chart` as one `<svg>` element without any address in it; `name` (a-z, 0-9, -) keeps its ids apart from others'.

    Points outside `y_range` are cut off at the frame.
    """
    with page_figure() as figure:
        axes = figure.add_subplot()
        for line in (*chart.levels, *chart.lines):
            colour, dashes = series_colour(line.series), DASHES[line.series]
            style = (0, dashes) if dashes else "solid"
            if line in chart.levels:
                axes.axhline(line.points[0][1], color=colour, linestyle=style, linewidth=LINE_WIDTH)
            else:
                lonely = len(line.points) == 1  # a single point is no line; show it all the same
                marker, size = ("o", 6.0) if lonely else ("none", 0.0)
                axes.plot(
                    [x for x, _ in line.points],
                    [y for _, y in line.points],
                    color=colour,
                    linestyle=style,
                    linewidth=LINE_WIDTH,
                    marker=marker,
                    markersize=size,
                )
        if chart.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.02)
        if chart.y_range:
            axes.set_ylim(*chart.y_range)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return figure_svg(figure, name, f"{chart.title}. {_description(chart)}")


@contextmanager
def page_figure(size: tuple[float, float] = _SIZE) -> Iterator[Figure]:
    """An empty figure of `size` (inches) in the pages' style; draw with INK, RULE and `series_colour` alone."""
    with rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def figure_svg(figure: Figure, name: str, description: str) -> str:
    """`figure`, inside its `page_figure`, as one `<svg>` element; `name` (a-z, 0-9, -) is of its ids' beginning."""
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(buffer.getvalue(), name, description)


def _description(chart: Chart) -> str:
    """What a reader who cannot see the curves is told."""
    parts = [
        f"{line.label}: {line.points[0][1]:.{chart.digits}f} at {line.points[0][0]:,.10g}, "
        f"{line.points[-1][1]:.{chart.digits}f} at {line.points[-1][0]:,.10g}"
        for line in chart.lines
        if line.points
    ]
    parts += [f"{line.label}: {line.points[0][1]:.{chart.digits}f} throughout" for line in chart.levels]
    return f"{chart.y_label} over {chart.x_label}. " + "; ".join(parts)


def series_colour(series: int) -> str:
    """What stands for the page's `--series-N`."""
    assert 0 <= series < SERIES
    return f"#0a0c{series:02x}"


def _for_a_page(svg: str, name: str, description: str) -> str:
    """The `<svg>` element of matplotlib's file, its size left to the page and its colours to the style sheet."""
    svg = svg[svg.index("<svg") :].strip()
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r" font-family: [^;]*;", "", rest)  # the page's
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)  # would reach out of the figure
    rest = rest.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
    for series in range(SERIES):
        rest = rest.replace(series_colour(series), f"var(--series-{series})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg class="chart" {view_box.group()} role="img" aria-label="{label}">{rest}'
