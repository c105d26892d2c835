"""What `evaluate` gives: tables for the terminal, and a CSV file with a line for each image and model."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from hpcdistill.console import Table
from hpcdistill.errors import UserError, plural
from hpcdistill.metrics.base import ImageMetric, SetResult
from hpcdistill.metrics.reference import BICUBIC
from hpcdistill.storage import write_bytes

_FIRST = ("model", "image")  # columns of every CSV file of ours
_SAME = 0.5  # of the last digit: what is no difference in a table


def one_table(result: SetResult, metrics: Sequence[ImageMetric]) -> Table:
    """A row for each image; the means, and bicubic's, below."""
    table = Table(show_footer=True)
    footer = {f"mean of {result.images}": result.metrics, **({BICUBIC: result.bicubic} if result.bicubic else {})}
    table.add_column("image", footer="\n".join(footer))
    for metric in metrics:
        means = "\n".join(f"{values[metric.name]:.{metric.digits}f}" for values in footer.values())
        table.add_column(escape(metric.label), footer=means, justify="right")
    for row in result.per_image:
        table.add_row(escape(row["name"]), *(f"{row[metric.name]:.{metric.digits}f}" for metric in metrics))
    return table


def metrics_table(result: SetResult) -> Table:
    """A row for each metric of one model."""
    table = Table()
    table.add_column("metric")
    table.add_column(
        f"mean of {result.images}" if result.per_image else plural(result.images, "image"), justify="right"
    )
    for metric, value in result.metrics.items():
        table.add_row(metric, f"{value:.4f}")
    return table


def models_table(results: Mapping[str, SetResult], metrics: Sequence[ImageMetric]) -> Table:
    """A row for each model with its means and, behind them, its difference to the first one."""
    first = next(iter(results.values()))
    table = Table()
    table.add_column("model")
    names = [name for name in first.metrics if all(name in result.metrics for result in results.values())]
    known = {metric.name: metric for metric in metrics}
    for name in names:
        table.add_column(escape(known[name].label if name in known else name), justify="right")
        table.add_column("to the first", justify="right")
    for label, result in results.items():
        cells = []
        for name in names:
            places = known[name].digits if name in known else 4
            cells += [f"{result.metrics[name]:.{places}f}"]
            cells += ["" if result is first else difference(result.metrics[name], first.metrics[name], places)]
        table.add_row(escape(label), *cells)
    return table


def images_table(results: Mapping[str, SetResult], metric: ImageMetric) -> Table:
    """A row for each image: the metric of the first model, and the others' difference to it."""
    (first_label, first), *others = results.items()
    table = Table()
    table.add_column("image")
    table.add_column(escape(f"{metric.label}: {first_label}"), justify="right")
    for label, _ in others:
        table.add_column(escape(f"{label} to it"), justify="right")
    by_name = [{row["name"]: row for row in result.per_image} for _, result in others]
    for row in first.per_image:
        value = row[metric.name]
        changes = [difference(rows[row["name"]][metric.name], value, metric.digits) for rows in by_name]
        table.add_row(escape(row["name"]), f"{value:.{metric.digits}f}", *changes)
    return table


def difference(value: float, reference: float, digits: int) -> str:
    """`+0.123`, `-0.010`, and `0` for what the digits do not show."""
    change = value - reference
    return "0" if abs(change) < _SAME * 10.0**-digits else f"{change:+.{digits}f}"


def check_csv(path: Path) -> None:
    """UserError when the CSV file that is to be written is a folder, or somebody else's file."""
    if path.is_dir():
        raise UserError(f"--csv {path}: is a folder; name the file, e.g. {path / 'images.csv'}")
    if not path.exists():
        return
    with open(path, "rb") as file:
        head = file.read(64)
    if head and not head.startswith(",".join(_FIRST).encode() + b","):
        raise UserError(f"--csv {path}: is there, and was not written by this command; name another file")


def write_csv(
    path: Path, results: Mapping[str, SetResult], metrics: Iterable[str], bicubic: SetResult | None = None
) -> None:
    """A line for each model and image: the metrics, with all their digits, and bicubic's of the same image beside.

    Written whole or not at all; its folder is made.
    """
    names = list(metrics)
    beside = {row["name"]: row for row in bicubic.per_image} if bicubic else {}
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*_FIRST, *names, *(f"{BICUBIC}_{name}" for name in names if bicubic)])
    for label, result in results.items():
        for row in result.per_image:
            values = [row[name] for name in names]
            values += [beside[row["name"]][name] for name in names if bicubic]
            writer.writerow([label, row["name"], *map(repr, values)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lines.getvalue().encode())
