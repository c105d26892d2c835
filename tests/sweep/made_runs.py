"""Runs and grids made by hand, for the tests of collecting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hpcdistill.sweep.grid import Cell, Grid, Metric
from hpcdistill.sweep.plan import Plan

PSNR = Metric("psnr", "Set5 PSNR", "student/set5/psnr", "higher", 2)
NAME = "student/set5/psnr"


def grid(cells: list[Cell], metrics: tuple[Metric, ...] = (PSNR,), **options: Any) -> Grid:
    values: dict[str, Any] = {"name": "toy", "title": "Toys", "paper": "A paper", "table": "3", "seeds": (0,)}
    values |= options
    return Grid(path=Path("toy.yaml"), metrics=metrics, cells=tuple(cells), **values)


def run_cell(label: str, psnr: float | None = None, **labels: str) -> Cell:
    printed = {} if psnr is None else {"psnr": psnr}
    return Cell({"method": label, **labels}, "run", ("base.yaml",), printed, {"psnr": NAME})


def plan(made: Grid) -> Plan:
    """Each cell's run has the key `<first label>-<number of the cell>-<seed>`."""
    cells: dict[tuple[str, int, int], str | None] = {}
    for number, cell in enumerate(made.cells):
        for seed in made.seeds:
            key = f"{next(iter(cell.labels.values()))}-{number}-{seed}"
            cells[made.name, number, seed] = key if cell.kind == "run" else None
    return Plan([made], {}, cells, {made.name: made.seeds})


def save_run(runs: Path, key: str, best: Any, last: Any = None, name: str = NAME, /, **values: Any) -> Path:
    """A run folder with result.json; `best` and `last` are numbers, or whole metrics."""
    folder = runs / f"run-{key}"
    folder.mkdir(parents=True)
    last = best if last is None else last
    result: dict[str, Any] = {
        "name": "run",
        "key": key,
        "method": "plain_sr",
        "steps": 100,
        "seed": 0,
        "best": {"step": 90, "metrics": best if isinstance(best, dict) else {name: best}},
        "last": {"step": 100, "metrics": last if isinstance(last, dict) else {name: last}},
        "protocol": {"metric": "PSNR on luma", "rule": "pisr", "scale": 4, "selects": name, "test_sets": {"set5": 5}},
        "revision": "0123456789ab",
    }
    (folder / "result.json").write_text(json.dumps(result | values), encoding="utf-8")
    return folder


def save_identity(folder: Path, data: list[str], selection: str = "5e7") -> None:
    identity = {"identity": {"data": data, "selection": selection}}
    (folder / "environment.json").write_text(json.dumps(identity), encoding="utf-8")


def age(folder: Path, seconds: float) -> None:
    """Make the run's result older."""
    file = folder / "result.json"
    time = file.stat().st_mtime - seconds
    os.utime(file, (time, time))
