"""Rows of a grid with paired differences: `python docs/results/paired.py RESULTS.csv [--to LABEL=VALUE ...]`.

Reads what `slurm/collect.py` wrote and prints a Markdown table of the last weights: mean and sample standard deviation
over the seeds, and of the differences, seed by seed, to one row (the first, or the one of the labels that are given).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Values = dict[str, dict[int, float]]  # metric -> seed -> value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.csv")
    parser.add_argument("--to", nargs="+", default=[], metavar="LABEL=VALUE", help="the row that others differ from")
    options = parser.parse_args()
    cells = read(options.results)
    if not cells:
        raise SystemExit(f"error: {options.results}: no finished run in it; collect again when there is one")
    wanted = dict(label.split("=", 1) for label in options.to)
    chosen = [labels for labels in cells if wanted.items() <= dict(labels).items()]
    if not chosen:
        raise SystemExit(f"error: --to {' '.join(options.to)}: no such row in {options.results}")
    sys.stdout.write("\n".join(table(cells, chosen[0])) + "\n")


def read(path: Path) -> dict[tuple[tuple[str, str], ...], Values]:
    """The values of each cell's last weights, cells in the file's order."""
    cells: dict[tuple[tuple[str, str], ...], Values] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["which"] == "last" and row["value"] and row["seed"]:
                values = cells.setdefault(tuple(json.loads(row["labels"]).items()), {})
                values.setdefault(row["metric"], {})[int(row["seed"])] = float(row["value"])
    return cells


def table(cells: Mapping[tuple[tuple[str, str], ...], Values], base: tuple[tuple[str, str], ...]) -> list[str]:
    """The lines of the table."""
    labels = list(dict(base))
    metrics = list(cells[base])
    head = [*labels, *(text for metric in metrics for text in (metric, f"{metric}, difference"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(labels) + "---:|" * (2 * len(metrics))]
    for cell, values in cells.items():
        if dict(cell).keys() != dict(base).keys():
            continue  # what was not trained: the bicubic enlargement
        row = [dict(cell)[label] for label in labels]
        for metric in metrics:
            own, other = values[metric], cells[base][metric]
            row += [spread(list(own.values())), spread([own[seed] - other[seed] for seed in own if seed in other], "+")]
        if cell == base:
            row[len(labels) + 1 :: 2] = ["-"] * len(metrics)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation, and how many values they are of."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation} ({len(values)})"


if __name__ == "__main__":
    main()
