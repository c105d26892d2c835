"""What a sweep came to, as files: index.html (self-contained), results.csv, and every table in four formats."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from hpcdistill.data.outputs import check_page
from hpcdistill.errors import UserError
from hpcdistill.storage import write_bytes, write_json
from hpcdistill.sweep.charts import chart_svg
from hpcdistill.sweep.plots import Plot, axis_plots, cost_plots, curve_charts, main_metric, spectrum_charts
from hpcdistill.sweep.report import Charts, template
from hpcdistill.sweep.results import Found, RunResult
from hpcdistill.sweep.table_formats import as_json, html, latex, markdown, tidy_csv
from hpcdistill.sweep.table_layout import Layout, lay_out, notes, number_text, order_text
from hpcdistill.sweep.table_rows import ResultTable, TableRow, TrialState

PICTURE_BYTES = 1 << 20  # of one picture
PICTURES_BYTES = 24 << 20  # of all pictures of the page
PICTURES = 12  # in a table's section
TROUBLES = 40  # cells without a result that are named with their reason

_CARDS: tuple[tuple[TrialState, str], ...] = (
    ("finished", "finished"),
    ("running", "running"),
    ("queued", "in the queue"),
    ("stopped", "stopped"),
    ("failed", "failed"),
    ("blocked", "blocked"),
    ("unreadable", "damaged"),
    ("missing", "not run"),
    ("reported", "reported only"),
)


@dataclass(frozen=True)
class About:
    """What the page says about itself."""

    title: str
    command: str  # that made it
    runs: str  # the folders that were read
    time: str  # UTC
    left_out: tuple[str, ...] = ()  # a line for each grid that could not be shown


@dataclass(frozen=True)
class Picture:
    """A run's newest samples, as the run saved them."""

    label: str
    run: str
    file: str
    address: Markup
    width: int
    height: int


@dataclass
class TableSection:
    """A table's part of the page."""

    layout: Layout
    anchor: str
    notes: list[str]
    orders: list[str]
    troubles: list[tuple[str, str]]  # a cell and why it has no result
    plots: list[Plot]
    charts: Charts
    pictures: list[Picture] = field(default_factory=list)
    elsewhere: list[tuple[str, str, str]] = field(default_factory=list)  # label, anchor and title: shown there
    left_out: list[str] = field(default_factory=list)

    @property
    def table(self) -> ResultTable:
        return self.layout.table

    @property
    def markup(self) -> Markup:
        """The table's HTML."""
        return Markup(html(self.layout))

    @property
    def order(self) -> str:
        """The first metric's order against the paper's, short."""
        metric = main_metric(self.table)
        orders = [order for order in self.table.orders if order.metric == metric and not math.isnan(order.tau)]
        found = [f"{', '.join(order.group)} {order.tau:.2f} (n = {order.n})".strip() for order in orders]
        return f"tau-b {', '.join(found)}" if found else ""

    @property
    def printed(self) -> bool:
        """Whether there are a paper's numbers to compare with."""
        return any(entry.printed is not None for row in self.table.rows for entry in row.entries.values())

    @property
    def progress(self) -> str:
        """How much of it is there."""
        counts = self.table.counts
        runs = sum(len(row.trials) for row in self.table.rows)
        return f"{counts['finished']} of {runs} finished" if runs else "reported only"


def write_report(
    folder: Path,
    tables: Sequence[ResultTable],
    found: Found,
    others: Sequence[RunResult],
    about: About,
    counted: Callable[[TableRow], float | None] = lambda _: None,
) -> Path:
    """Write everything below `folder`, whole or not at all file by file; index.html is returned.

    `others` are runs that belong to no table; `counted` says the MACs (10^9) of a row's network.
    """
    make_folder(folder)
    made = folder / "tables"
    layouts = [lay_out(table) for table in tables]
    for layout in layouts:
        name = layout.table.grid.name
        write_bytes(made / f"{name}.md", markdown(layout).encode())
        write_bytes(made / f"{name}.tex", latex(layout).encode())
        write_bytes(made / f"{name}.html", html(layout).encode())
        write_json(made / f"{name}.json", as_json(layout.table))
    write_bytes(folder / "results.csv", tidy_csv(tables, others).encode())
    page = folder / "index.html"
    write_bytes(page, report_page(layouts, found, others, about, counted).encode())
    _remove_others(made, {layout.table.grid.name for layout in layouts})
    return page


def _remove_others(folder: Path, shown: Collection[str]) -> None:
    """Remove the tables in `folder` that an earlier page had and this one has not: their numbers would grow old.

    Only what is certainly ours goes: the four files beside a JSON that says it is this table.
    """
    for file in sorted(folder.glob("*.json")):
        if file.stem in shown:
            continue
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and content.get("grid") == file.stem and {"cells", "metrics"} <= set(content):
            for kind in ("md", "tex", "html", "json"):
                file.with_name(f"{file.stem}.{kind}").unlink(missing_ok=True)


def report_page(
    layouts: Sequence[Layout],
    found: Found,
    others: Sequence[RunResult],
    about: About,
    counted: Callable[[TableRow], float | None] = lambda _: None,
) -> str:
    """The page as HTML: no network, no other file, one small script that sorts the tables."""
    sections: list[TableSection] = []
    for layout in layouts:
        table = layout.table
        anchor = anchor_of(table.grid.name)
        if any(section.anchor == anchor for section in sections):  # mine_1 and mine-1: ids are there once
            anchor += f"-no{len(sections)}"
        alone = len({order.metric for order in table.orders}) < 2
        below = [note for note in notes(layout, legend=False) if not note.startswith(("Attention", "Our order"))]
        plots = [*axis_plots(table, anchor), *cost_plots(table, anchor, counted)]
        orders = [order_text(order, alone) for order in table.orders]
        charts = Charts((*curve_charts(table), *spectrum_charts(table)))
        sections.append(TableSection(layout, anchor, below, orders, list(_troubles(table)), plots, charts))
    _add_pictures(sections)
    counts: Counter[TrialState] = Counter()
    for layout in layouts:
        counts.update(layout.table.counts)
    drawings = {
        id(chart): Markup(chart_svg(chart, f"{section.anchor}-curve-{number}"))
        for section in sections
        for number, chart in enumerate(section.charts.charts)
    }
    return (
        template("grid_report.html.j2")
        .render(
            about=about,
            sections=sections,
            drawings=drawings,
            cards=[(state, name, counts[state]) for state, name in _CARDS if counts[state]],
            unreadable=[run.line for run in found.unreadable],
            twice=found.twice,
            others=[_other(run) for run in others],
            Markup=Markup,
        )
        .strip()
        + "\n"
    )


def anchor_of(name: str) -> str:
    """A grid's place on the page, and the beginning of the ids in it."""
    return "table-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def newest_sample(run: RunResult, generator: str) -> Path | None:
    """The run's last picture: of `generator` if there is one, of a translation, else any."""
    files = sorted((run.folder / "samples").glob("*.png"), key=lambda file: (_step(file), file.name))
    for wanted in (generator, "translation", ""):
        if of_it := [file for file in files if file.name.startswith(f"{wanted}-" if wanted else "")]:
            return of_it[-1]
    return None


def _step(file: Path) -> int:
    digits = re.search(r"(\d+)$", file.stem)
    return int(digits.group(1)) if digits else -1


def _troubles(table: ResultTable) -> Iterator[tuple[str, str]]:
    """Each cell and seed that something went wrong with, what can be mended first; not those that just wait."""
    rank: dict[TrialState, int] = {"unreadable": 0, "failed": 1, "blocked": 2, "stopped": 3}
    found = [
        (
            rank[trial.state],
            f"{row.cell.title}, seed {trial.seed}",
            f"{trial.state}: {trial.reason or 'no reason known'}",
        )
        for row in table.rows
        for trial in row.trials
        if trial.state in rank
    ]
    found.sort(key=lambda trouble: trouble[0])
    yield from ((cell, reason) for _, cell, reason in found[:TROUBLES])
    if len(found) > TROUBLES:
        yield f"{len(found) - TROUBLES} more", "see results.csv"


def _add_pictures(sections: Sequence[TableSection]) -> None:
    """The newest samples of each row's first finished run, each once on the page, as far as they are not too large."""
    total = 0
    shown: dict[Path, TableSection] = {}
    for section in sections:
        metric = main_metric(section.table)
        for row in section.table.rows:
            run = next((trial.run for trial in row.trials if trial.run), None)
            if run is None or metric is None:
                continue
            file = newest_sample(run, row.cell.of.get(metric.name, "").partition("/")[0])
            if file is None:
                continue
            if file in shown:
                there = shown[file]
                if there is not section:
                    section.elsewhere.append((row.cell.title, there.anchor, there.layout.caption))
                continue
            try:
                content = file.read_bytes()
                with Image.open(file) as image:
                    width, height = image.size
            except (OSError, SyntaxError) as error:  # Pillow's word for a damaged PNG
                section.left_out.append(f"{file}: {error}")
                continue
            if len(section.pictures) == PICTURES or len(content) > PICTURE_BYTES or total > PICTURES_BYTES:
                section.left_out.append(str(file))
                continue
            total += len(content)
            shown[file] = section
            address = Markup("data:image/png;base64,{}").format(base64.b64encode(content).decode())
            section.pictures.append(Picture(row.cell.title, run.folder.name, file.name, address, width, height))


def _other(run: RunResult) -> dict[str, str]:
    """A run that belongs to no table, by what it says of itself."""
    metrics = {which: run.metrics("best" if which == "best" else "last") for which in ("best", "last")}
    chosen = (run.result.get("protocol") or {}).get("selects") or next(iter(metrics["best"]), "")
    values = {which: metrics[which].get(chosen, math.nan) if chosen else None for which in metrics}
    return {
        "run": run.folder.name,
        "method": str(run.result.get("method", "")),
        "seed": str(run.result.get("seed", "")),
        "steps": str(run.result.get("steps", "")),
        "metric": str(chosen),
        **{which: "" if value is None else number_text(value, 4) for which, value in values.items()},
        "evaluations": "" if run.evaluations is None else str(run.evaluations),
        "revision": run.revision,
    }


def make_folder(folder: Path) -> None:
    """Make the report's folder, before the work is done; UserError when that cannot be."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    check_page(folder / "index.html")
    try:
        (folder / "tables").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); give another folder with --out") from None
