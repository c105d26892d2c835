"""Which grids a page shows when none is named: all of configs/grids and all that were submitted.

Each is planned with the overrides and seeds of its own submission. A page of the last submission alone would drop the
sweeps before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcdistill.errors import UserError
from hpcdistill.storage import user_path
from hpcdistill.sweep.grid import EVERYTHING, GRIDS, Grid, grid_files, load_grids
from hpcdistill.sweep.grid_file import read_grid_file
from hpcdistill.sweep.plan import Plan, make_plan
from hpcdistill.sweep.submissions import Submission, submitted_grids

_RUNS = "runs="


@dataclass
class Gathered:
    """Grids planned as they were submitted."""

    plan: Plan
    submitted: set[str] = field(default_factory=set)  # names of grids that are shown with or without a result
    left_out: list[str] = field(default_factory=list)  # a line for each grid that cannot be shown


@dataclass(frozen=True)
class _Source:
    """A grid's file, and the overrides and seeds that its runs were made with."""

    file: Path
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] | None
    cwd: Path


def gather(
    submissions: Sequence[Submission],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    without: Collection[str] = (),
) -> Gathered:
    """The grids of configs/grids and of `submissions` (newest first) but for those called `without`.

    A submitted grid has the overrides and seeds of its newest submission, unless some are given here. What is wrong
    with one grid leaves that one out; it is a UserError where words were given here, or no grid is left.
    """
    gathered = Gathered(Plan([], {}, {}, {}))
    newest = submitted_grids(submissions)
    sources = {file.stem: _Source(file, (), None, Path()) for file in _own_files(gathered.left_out)}
    for name, submission in newest.items():
        file = submission.grids[name]
        if name in sources and not _is_same(sources[name].file, submission, name):
            gathered.left_out.append(f"{sources[name].file}: has the name of {file}, which was submitted; rename one")
        sources[name] = _source(file, submission)
    gathered.submitted = set(newest) - set(without)
    given = bool(overrides) or seeds is not None
    plans = []
    for name, source in sources.items():
        if name in without:
            continue
        try:
            plans.append(_plan(source, overrides, seeds))
        except UserError as error:
            if given:
                raise
            gathered.left_out.append(str(error))
    if not plans and not without and gathered.left_out:
        raise UserError(gathered.left_out[0])
    gathered.plan = merged(plans)
    return gathered


def gather_named(
    grids: Sequence[Grid], submissions: Sequence[Submission], overrides: Sequence[str], seeds: Sequence[int] | None
) -> Gathered:
    """The same of `grids` alone. Raises UserError for what is wrong with one."""
    newest = submitted_grids(submissions)
    plans = []
    for grid in grids:
        submission = newest.get(grid.name)
        if submission is None or not _is_same(grid.path, submission, grid.name):
            plans.append(_plan(_Source(grid.path, (), None, Path()), overrides, seeds))
            continue
        source = _Source(grid.path, submission.overrides, submission.seeds, Path())
        try:  # here first: a sweep's snapshot is planned with the copy's files
            plans.append(_plan(source, overrides, seeds))
        except UserError:
            if submission.cwd.absolute() == Path.cwd():
                raise
            plans.append(_plan(_source(submission.grids[grid.name], submission), overrides, seeds))
    return Gathered(merged(plans), {grid.name for grid in grids})


def _source(file: Path, submission: Submission) -> _Source:
    return _Source(file, submission.overrides, submission.seeds, submission.cwd)


def _plan(source: _Source, overrides: Sequence[str], seeds: Sequence[int] | None) -> Plan:
    """The grid's plan with its own overrides and seeds, or with those given here, whose paths start here."""
    if overrides or seeds is not None:
        given = [str(user_path(word).absolute()) if user_path(word).is_file() else word for word in overrides]
        with _inside(source.cwd):
            return make_plan(load_grids([str(source.file)]), seeds, given)
    with _inside(source.cwd):
        return make_plan(load_grids([str(source.file)]), source.seeds, source.overrides)


def merged(plans: Sequence[Plan]) -> Plan:
    """One plan of several, which have no grid in common; a run that several of them need is one."""
    whole = Plan([], {}, {}, {})
    for plan in plans:
        whole.grids += plan.grids
        whole.cells |= plan.cells
        whole.seeds |= plan.seeds
        for key, run in plan.runs.items():
            if key in whole.runs:
                whole.runs[key].uses += run.uses
            else:
                whole.runs[key] = run
    return whole


def run_folders(submissions: Sequence[Submission]) -> list[Path]:
    """The folders that the runs of `submissions` were put into, as far as they are there."""
    folders: dict[Path, Path] = {}
    for submission in submissions:
        said = [word.removeprefix(_RUNS) for word in submission.overrides if word.startswith(_RUNS)]
        folder = submission.cwd / (said[-1] if said else "runs")
        if folder.is_dir():
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _own_files(left_out: list[str]) -> list[Path]:
    """The tables of configs/grids, those of the papers first."""
    if not GRIDS.is_dir():
        return []
    papers = GRIDS / f"{EVERYTHING}.yaml"
    files = grid_files(EVERYTHING) if papers.is_file() else []
    for file in sorted(GRIDS.glob("*.yaml")):
        try:
            if file not in files and not read_grid_file(file).include:
                files.append(file)
        except UserError as error:
            left_out.append(str(error))
    return files


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, from which the paths in a grid start; here, where it is gone."""
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(contextlib.chdir(folder))
        yield


def _is_same(file: Path, submission: Submission, name: str) -> bool:
    """Whether `file` is the submitted grid `name`: also in the copy of the code that a sweep's snapshot is."""
    submitted = submission.grids[name]
    return file == submitted or file.resolve() == (submission.cwd / submitted).resolve()
