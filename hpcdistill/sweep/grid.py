"""Grids: the tables of the papers, and a user's own, as data. A cell is a command line with its labels in the table.

A grid file has `axes`, whose product makes cells, or explicit `cells`, or both; docs/cluster.md says how to write one.
Paths in it are relative to the folder that commands are run in: the clone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import user_path
from hpcdistill.sweep.grid_file import SUFFIXES, CellSpec, GridFile, Part, read_grid_file

GRIDS = Path("configs/grids")
EVERYTHING = "all"
CellKind = Literal["run", "reported"]
# {label}; not an interpolation, ${data.crop}, and not a mapping, data.eval={mine: folder}.
_LABEL = re.compile(r"(?<!\$)\{([^{}:,\s]+)\}")


@dataclass(frozen=True)
class Metric:
    """A number of a cell."""

    name: str
    label: str
    of: str | None  # a name in result.json's metrics, placeholders unfilled (see Cell.of); None = printed only
    better: Literal["higher", "lower"]
    digits: int
    device: str = ""  # that the paper's time was measured on


@dataclass(frozen=True)
class Cell:
    """A row of a table: a run, or a system that is only reported."""

    labels: dict[str, str]  # axis -> value, in the table's order
    kind: CellKind
    arguments: tuple[str, ...]  # train's command line: files, then overrides; empty when reported
    printed: dict[str, float]  # metric -> the paper's number
    of: dict[str, str] = field(default_factory=dict)  # metric -> its name in result.json's metrics, where it has one
    measured: dict[str, float] = field(default_factory=dict)  # metric -> our number where nothing is trained (bicubic)
    note: str = ""  # where a number comes from, for the table's foot

    @property
    def title(self) -> str:
        """The labels as one text."""
        return ", ".join(self.labels.values())

    @property
    def test_sets(self) -> set[str]:
        """The test sets that its numbers are of."""
        return {name.split("/")[1] for name in self.of.values() if name.count("/") == 2}


@dataclass(frozen=True)
class Grid:
    """A table."""

    name: str  # the file's stem
    path: Path
    title: str
    paper: str
    table: str
    metrics: tuple[Metric, ...]  # the first decides order and bold
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    ours: Literal["best", "last"] = "best"  # which of a run's weights stand beside print
    within: tuple[str, ...] = ()  # labels (data set, scale) that cells share to be compared: best and order are theirs
    printed_images: dict[str, int] = field(default_factory=dict)  # test set -> images that the printed numbers are of

    def group(self, cell: Cell) -> tuple[str, ...]:
        """What `cell` has in common with the cells it is compared with."""
        return tuple(cell.labels.get(label, "") for label in self.within)


def load_grids(names: Sequence[str] = (), submitted: Mapping[str, Path] = MappingProxyType({})) -> list[Grid]:
    """The grids that `names` mean (see `grid_file`); without names, those of configs/grids/all.

    Raises UserError for a name or file that there is not and for whatever is wrong in a file.
    """
    paths = [file for name in names or [EVERYTHING] for file in grid_files(name, submitted)]
    grids: dict[str, Grid] = {}
    for path in dict.fromkeys(paths):
        grid = load_grid(path)
        if grid.name in grids:
            raise UserError(f"{path}: has the name of {grids[grid.name].path}; rename one, tables go by it")
        grids[grid.name] = grid
    return list(grids.values())


def load_grid(path: Path) -> Grid:
    """The grid in the file `path`."""
    content = read_grid_file(path)
    if content.include:
        raise UserError(f"{path}: include: names other grids; give it by name, load_grids follows it")
    metrics = tuple(
        Metric(name, spec.label or name, spec.of, spec.better, spec.digits, spec.device)
        for name, spec in content.metrics.items()
    )
    labels = [*content.axes, *dict.fromkeys(label for cell in content.cells for label in cell.labels)]
    if shared := sorted(set(labels) & set(content.metrics)):
        raise UserError(f"{path}: '{shared[0]}' is a metric and a label; rename one")
    for label in content.within:
        if label not in labels:
            raise UserError(f"{path}: within: no label '{label}'; {nearest(label, labels)}")
    cells = _products(path, content) + [_explicit(path, number, content) for number in range(len(content.cells))]
    if not cells:
        raise UserError(f"{path}: has no cells; give axes or cells")
    seen: dict[tuple[tuple[str, str], ...], Cell] = {}
    for cell in cells:
        labelled = tuple(sorted(cell.labels.items()))
        if labelled in seen:
            raise UserError(f"{path}: the cell ({cell.title}) is there twice; leave one out or label them apart")
        seen[labelled] = cell
    used = {test_set for cell in cells for test_set in cell.test_sets}
    for name in content.printed_images:
        if name not in used:
            raise UserError(f"{path}: printed_images: no cell has the test set '{name}'; {nearest(name, used)}")
    return Grid(
        path.stem,
        path,
        content.title or path.stem,
        content.paper,
        content.table,
        metrics,
        tuple(cells),
        tuple(content.seeds),
        content.ours,
        tuple(content.within),
        content.printed_images,
    )


def grid_files(word: str, submitted: Mapping[str, Path] = MappingProxyType({})) -> list[Path]:
    """The files of the grids that `word` means: one, or those that it includes."""
    return _included(grid_file(word, submitted))


def grid_file(word: str, submitted: Mapping[str, Path] = MappingProxyType({})) -> Path:
    """The file of the grid that a command line calls `word`: a path, a name of configs/grids, or one of `submitted`.

    Raises UserError, with the nearest name, when there is none. `submitted`: files by name, of grids from elsewhere.
    """
    path = user_path(word)
    known = {path.stem: path for path in sorted(GRIDS.glob("*.yaml"))}
    named = path.suffix in SUFFIXES
    if named or path.parent != Path():
        if path.is_file():
            return path
        if path.parent == Path() and path.stem in known:
            return known[path.stem]
        files = [entry.name for entry in path.parent.glob("*.y*ml")]
        hint = nearest(path.name, files or [file.name for file in known.values()] or [path.name])
        raise UserError(f"{path}: no such grid file; {hint}")
    if word in known or word in submitted:
        return known.get(word) or submitted[word]
    if not GRIDS.is_dir():
        raise UserError(f"{GRIDS}: no such folder here; run the command in the clone's folder, or give a grid's path")
    raise UserError(f"{word}: no such grid in {GRIDS}; {nearest(word, {*known, *submitted})}")


def _included(path: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """`path`, or the grids that it includes."""
    if path in seen:
        raise UserError(f"{path}: includes itself by way of {seen[-1]}")
    content = read_grid_file(path)
    if not content.include:
        return [path]
    files = []
    for name in content.include:
        file = path.parent / user_path(name, f"{path}: include:")
        if not file.is_file():
            near = nearest(file.name, [entry.name for entry in file.parent.glob("*.yaml") if entry != path])
            raise UserError(f"{path}: include: {file}: no such grid file; {near}")
        files += _included(file, (*seen, path))
    return files


def _products(path: Path, content: GridFile) -> list[Cell]:
    """One cell for each combination of the axes' values, the last axis running fastest."""
    if not content.axes:
        if content.printed:
            raise UserError(f"{path}: printed: there are no axes; give an explicit cell its own `printed:`")
        return []
    for axis, values in content.axes.items():
        if not values:
            raise UserError(f"{path}: axes.{axis}: has no values, so the product is empty; give at least one")
    cells = []
    printed = _printed(path, content)
    for combination in itertools.product(*(values.items() for values in content.axes.values())):
        labels = {axis: value for axis, (value, _) in zip(content.axes, combination, strict=True)}
        numbers = printed.pop(tuple(labels.values()), {})
        cells.append(_cell(path, content, labels, [part for _, part in combination], numbers))
    assert not printed, "checked against the axes"
    return cells


def _printed(path: Path, content: GridFile) -> dict[tuple[str, ...], dict[str, float]]:
    """The printed numbers of the products by their labels."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for number, line in enumerate(content.printed):
        where = f"{path}: printed[{number}]"
        labels, numbers = {}, {}
        for key, value in line.items():
            if key in content.axes:
                labels[key] = str(value)
            elif key in content.metrics and isinstance(value, int | float):
                numbers[key] = float(value)
            elif key in content.metrics:
                raise UserError(f"{where}: {key}: expected a number, got {value!r}")
            else:
                raise UserError(f"{where}: unknown key '{key}'; {nearest(key, [*content.axes, *content.metrics])}")
        for axis, values in content.axes.items():
            if axis not in labels:
                raise UserError(f"{where}: does not say which {axis}; valid: {', '.join(values)}")
            if labels[axis] not in values:
                raise UserError(f"{where}: matches no cell: {axis} '{labels[axis]}'; {nearest(labels[axis], values)}")
        product = tuple(labels[axis] for axis in content.axes)
        if product in found:
            raise UserError(f"{where}: ({', '.join(product)}) is there twice; put its numbers on one line")
        found[product] = numbers
    return found


def _explicit(path: Path, number: int, content: GridFile) -> Cell:
    spec: CellSpec = content.cells[number]
    for key in (*spec.printed, *spec.measured):
        if key not in content.metrics:
            raise UserError(f"{path}: cells[{number}]: no metric '{key}'; {nearest(key, content.metrics)}")
    return _cell(path, content, spec.labels, [spec], spec.printed)


def _cell(
    path: Path, content: GridFile, labels: Mapping[str, str], parts: Sequence[Part], printed: Mapping[str, float]
) -> Cell:
    """A cell: its command line has the grid's own files and overrides, then those of `parts`, the labels filled in."""
    title = ", ".join(labels.values())
    reported = any(part.kind == "reported" for part in parts)

    def label(match: re.Match[str]) -> str:
        if match[1] not in labels:
            raise UserError(f"{path}: ({title}): {match.string}: no label '{match[1]}'; {nearest(match[1], labels)}")
        return labels[match[1]]

    def filled(text: str) -> str:
        return _LABEL.sub(label, text)

    of = {name: spec.of for name, spec in content.metrics.items() if spec.of is not None}
    measured: dict[str, float] = {}
    for part in parts:
        for name in part.of:
            if name not in content.metrics:
                raise UserError(f"{path}: ({title}): of: no metric '{name}'; {nearest(name, content.metrics)}")
        of |= part.of
        measured |= part.measured
    arguments: tuple[str, ...] = ()
    if not reported:
        base = next((part.base for part in reversed(parts) if part.base), content.base)
        if base is None:
            raise UserError(f"{path}: ({title}): has no base; name its configuration, or say `kind: reported`")
        overlays = [*content.overlays, *(overlay for part in parts for overlay in part.overlays)]
        overrides = [*content.set, *(override for part in parts for override in part.set)]
        arguments = tuple(filled(argument) for argument in (base, *overlays, *overrides))
    note = "; ".join(part.note for part in parts if part.note)
    return Cell(
        dict(labels),
        "reported" if reported else "run",
        arguments,
        dict(printed),
        {name: filled(value) for name, value in of.items()},
        measured,
        note,
    )
