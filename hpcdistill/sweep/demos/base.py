"""What both demos are made of: a training by the project's own configurations, measured rows, and blocks of a page."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape

from hpcdistill import console
from hpcdistill.config import RunConfig
from hpcdistill.console import out
from hpcdistill.metrics.cost import Cost
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.run import Run, load_run
from hpcdistill.storage import CLONE, write_json
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.report import (
    Card,
    Cards,
    Commands,
    Crop,
    Download,
    Image,
    Page,
    Row,
    Section,
    Table,
    View,
    write_page,
)
from hpcdistill.training.records import read_environment, read_row
from hpcdistill.training.run_folder import RunFolder, describe_session

SHORTEST_CADENCE = 10  # steps between evaluations; each takes as long as many steps
LEVEL = 0.05  # dB; below it two results count as level
_FORMATS = {"onnx": "For onnxruntime", "shader": "For mpv and other video players"}
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


@dataclass(frozen=True)
class Measured:
    """A row: one generator, or a baseline that learned nothing, on photographs that were not trained on."""

    name: str  # in results.json
    title: str
    series: int  # its colour all over the page
    metrics: Mapping[str, float]  # means over the images: "psnr" in dB, ...
    per_image: Sequence[Mapping[str, Any]]  # the "name" and the metrics of each
    cost: Cost  # of a baseline: nothing

    @property
    def psnr(self) -> float:
        return self.metrics["psnr"]

    def to_json(self) -> dict[str, Any]:
        """The row for results.json, without its images."""
        return {"name": self.name, **self.metrics, **self.cost._asdict()}


@dataclass(frozen=True)
class Stage:
    """A finished training, read from its run folder."""

    config: RunConfig
    folder: Path
    result: Mapping[str, Any]  # result.json
    log: Sequence[Mapping[str, Any]]  # metrics.jsonl
    session: Mapping[str, Any]  # the last one of environment.json
    command: str  # that trains it again

    @property
    def steps(self) -> int:
        return int(self.result["steps"])

    def curve(self, key: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of the lines that have `key`."""
        return tuple((float(line["step"]), float(line[key])) for line in self.log if key in line)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Where and with what it was trained."""
        result, session = self.result, self.session
        device = "" if result["device"] == "cpu" else f"{result['device']}; "
        return (
            ("Hardware", device + session["cpu"]),
            ("Precision", result["precision"]),
            ("Software", ", ".join(f"{name} {version}" for name, version in session["packages"].items())),
            ("Code revision", str(result["revision"] or "not a git clone")),
        )


def resolve(arguments: Sequence[str]) -> Run:
    """The run that `hpcdistill train ARGUMENTS` trains in the clone; the folder we are in may be another."""
    return load_run([os.path.relpath(CLONE / word) if word.startswith("configs/") else word for word in arguments])


def train_stage(arguments: Sequence[str], signals: StopSignals | None = None) -> tuple[Run, Stage] | None:
    """Train what `arguments` say, or find it finished; None when it was stopped."""
    from hpcdistill.trainer import train

    run = resolve(arguments)
    return None if train(run, signals) is None else (run, read_stage(run, arguments))


def read_stage(run: Run, arguments: Sequence[str] = ()) -> Stage:
    """What the folder of the finished `run` says of it."""
    folder = RunFolder(run.folder)
    result = folder.result()
    assert result is not None
    log = [row for line in folder.metrics.read_bytes().splitlines() if (row := read_row(line)) is not None]
    session = (read_environment(run.folder)["sessions"] or [describe_session()])[-1]
    command = shlex.join(["hpcdistill", "train", *arguments])
    return Stage(run.config, run.folder, result, log, session, command)


def shortened(full: RunConfig, steps: int) -> list[str]:
    """The overrides that make a run as short as `steps`, logged and evaluated as often in all as the `full` one."""
    assert full.train.steps is not None
    return [
        f"train.steps={steps}",
        f"train.log_every={max(1, full.train.log_every * steps // full.train.steps)}",
        f"eval.every={max(SHORTEST_CADENCE, full.eval.every * steps // full.train.steps)}",
    ]


def yaml_path(path: Path) -> str:
    """The path as YAML reads it back: what is no plain path with a slash may be a number, a word, a list."""
    return str(path) if re.fullmatch(r"[\w.-]*/[\w./-]*", str(path)) else json.dumps(str(path))


def own_command(name: str, options: argparse.Namespace, default_out: Path) -> str:
    """How the demo `name` was called, for its page."""
    given = {option: value for option, value in vars(options).items() if value not in (None, default_out)}
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    return shlex.join(["hpcdistill", name, *words]) if words else f"make {name}"


def publish(folder: Path, results: Mapping[str, Any], page: Page, table: Table, words: Sequence[str]) -> None:
    """Write results.json and the page; print the `table`, the `words` and where to look."""
    numbers, html = folder / "results.json", folder / "report" / "index.html"
    write_json(numbers, results)
    write_page(html, page)
    shown = console.Table(title=table.caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, column in enumerate(table.columns):
        shown.add_column(escape(column.removesuffix(" [dB]")), justify="right" if place else "left")
    for row in table.rows:
        shown.add_row(*map(escape, row.cells))
    out.print(shown)
    for line in (*words, f"Look at {html} (the numbers: {numbers})."):
        out.print(line, markup=False, soft_wrap=True)


def compared(row: Measured, baseline: Measured) -> str:
    """`0.42 dB above bicubic`."""
    gain, other = row.psnr - baseline.psnr, baseline.title.lower()
    if abs(gain) < LEVEL:
        return f"level with {other} ({gain:+.2f} dB)"
    return f"{abs(gain):.2f} dB {'above' if gain > 0 else 'below'} {other}"


def gain_over(row: Measured, baseline: Measured) -> str:
    """The PSNR above the baseline's, for a table."""
    return "-" if row is baseline else f"{row.psnr - baseline.psnr:+.2f}"


def cards(rows: Sequence[Measured], *further: Card) -> Cards:
    """A card for each row's PSNR; the first row is the baseline."""
    notes = ["the baseline: nothing is learned", *(compared(row, rows[0]) for row in rows[1:])]
    found = (Card(row.title, f"{row.psnr:.2f}", "dB", note, row.series) for row, note in zip(rows, notes, strict=True))
    return Cards((*found, *further))


def by_photograph(
    rows: Sequence[Measured], caption: str, photograph: Callable[[str], str] = lambda image: image
) -> Table:
    """PSNR by `photograph`, the mean over those of its images."""
    names = list(dict.fromkeys(photograph(image["name"]) for image in rows[0].per_image))

    def mean(row: Measured, name: str) -> str:
        values = [image["psnr"] for image in row.per_image if photograph(image["name"]) == name]
        return f"{sum(values) / len(values):.2f}"

    lines = tuple(Row((row.title, *(mean(row, name) for name in names)), row.series) for row in rows)
    return Table(caption, ("Method", *names), lines)


def view(photograph: str, place: str, box: Box | None, pictures: Sequence[tuple[str, Image, str, int | None]]) -> View:
    """The `place` of a photograph at `box` (None: all of it): label, picture, note and colour of each method."""
    crops = (
        Crop(label, image, note, f"{photograph}, {place}: {label}", series) for label, image, note, series in pictures
    )
    return View(place, box, tuple(crops))


def cut(picture: Image, box: Box) -> Image:
    """The pixels of `picture` inside `box`."""
    top, left, height, width = box
    return picture[top : top + height, left : left + width]


def psnr_chart(
    stages: Sequence[tuple[Measured, Stage, str]], levels: Sequence[Measured], images: str = "photographs"
) -> Chart:
    """PSNR over the steps, by each stage's metric; `levels` were measured once.

    The first steps climb from far below; in full they would press the rest into one line.
    """
    lines = tuple(Line(row.title, row.series, stage.curve(metric)) for row, stage, metric in stages)
    level_lines = tuple(Line(row.title, row.series, ((0.0, row.psnr),)) for row in levels)
    values = [value for line in (*lines, *level_lines) for _, value in line.points]
    baseline = levels[0].psnr
    arrived = all(line.points and line.points[-1][1] > baseline - 2 for line in lines)
    bottom = max(min(values), baseline - 2.5) if arrived else min(values)
    cut_off = " The frame cuts the first steps off." if bottom > min(values) else ""
    return Chart(
        title=f"PSNR on the {images} not trained on",
        x_label="step",
        y_label="PSNR [dB]",
        lines=lines,
        levels=level_lines,
        y_range=(bottom - 0.1, max(values) + 0.15),
        note="The rows of the table are the last weights; to choose the best point of a curve would be to choose by "
        f"the test {images}.{cut_off}",
    )


def clock(seconds: float | None) -> str:
    """`1 min 05 s`, `42 s`, or a dash when it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def take_away(stage: Stage, formats: Sequence[str], *offered: Download) -> Section:
    """The student's weights, and what to do with them: a picture of one's own, and other programs' formats."""
    run = shlex.quote(str(stage.folder))
    weights = stage.folder / "generators" / "last" / "student.safetensors"
    commands = [("A picture of your own", f"hpcdistill infer {run} my_picture.jpg --which last --out made")]
    commands += [
        (_FORMATS[name], f"hpcdistill export {name} {run} --which last --out student.{suffix}")
        for name, suffix in (("onnx", "onnx"), ("shader", "glsl"))
        if name in formats
    ]
    own = Download("The student's weights", f"{stage.config.name}.safetensors", weights.read_bytes())
    return Section("Take it away", (own, *offered, Commands(tuple(commands))))


def digits(value: float, count: int) -> str:
    """`60,000`, `4.1`: so many significant digits."""
    return f"{float(f'{value:.{count}g}'):,.10g}"
