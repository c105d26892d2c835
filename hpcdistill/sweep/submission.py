"""A submission's folder: plan.json, and a copy of the code where the profile wants one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdistill.console import warn
from hpcdistill.errors import UserError
from hpcdistill.run import relative_place
from hpcdistill.storage import write_json
from hpcdistill.sweep.grid import Grid
from hpcdistill.sweep.plan import Plan, PlannedRun
from hpcdistill.sweep.results import find_results
from hpcdistill.sweep.task_folder import TaskFolder, utc, write_task
from hpcdistill.training.records import RESULT
from hpcdistill.training.run_folder import code_revision, git_in

if TYPE_CHECKING:
    from hpcdistill.sweep.status import TaskStatus

CLONE = Path(__file__).resolve().parents[2]
_LONGEST = 60  # of the grids' names in a folder's name


class SubmissionFolder:
    """`submissions/<UTC time>-<grids>/`; plan.json is written again after each array, so that none is ever unknown."""

    def __init__(self, folder: Path, plan: Plan, **described: Any) -> None:
        self.path = _new_folder(folder, plan.grids)
        self.jobs: dict[str, str] = {}
        self._content: dict[str, Any] = {
            "time": utc(),
            "grids": {grid.name: _described(plan, grid) for grid in plan.grids},
            "overrides": list(plan.overrides),
            "seeds": None if plan.given_seeds is None else list(plan.given_seeds),
            "place": str(Path.cwd()),
            "runs": {
                run.key: {"name": run.name, "steps": run.steps, "teacher": run.teacher, "arguments": run.arguments}
                for run in plan.runs.values()
            },
            "arrays": [],
            "jobs": self.jobs,
            "collector": None,
            "revision": code_revision(),
            "environment": _environment(),
            **described,
        }

    def add_array(self, name: str, job: str, dependency: str | None, jobs: dict[str, str]) -> None:
        """Note the job of each run of an array."""
        self.jobs.update(jobs)
        self._content["arrays"].append({"name": name, "job": job, "dependency": dependency, "tasks": len(jobs)})
        self.save()

    def note(self, **values: Any) -> None:
        """Note what is known by now."""
        self._content.update(values)
        self.save()

    def save(self) -> None:
        write_json(self.path / "plan.json", self._content)


def write_tasks(folder: Path, plan: Plan, runs: Iterable[PlannedRun]) -> None:
    """The task folders of `runs`, whole on the disk before anything is queued."""
    for run in runs:
        teacher = plan.runs[run.teacher].loaded.config.dump() if run.teacher else None
        write_task(folder / "tasks" / run.key, run.loaded.config.dump(), teacher)
    os.sync()


def set_aside_damaged(runs: Path, started: Sequence[PlannedRun], statuses: Mapping[str, TaskStatus]) -> None:
    """Give the damaged result.json of each run that is to be started another name.

    Training asks for that file first and would refuse to go on; without it the run writes it again from its checkpoint.
    """
    if not (started and runs.is_dir()):
        return
    keys = {run.key for run in started}
    folders = {status.run.name for key in keys if (status := statuses[key]).run}
    for damaged in find_results(runs).unreadable:
        if damaged.key in keys or damaged.folder.name in folders:
            file = damaged.folder / RESULT
            file.replace(aside := file.with_name(f"{RESULT}.damaged"))
            warn(f"{file}: damaged ({damaged.reason}); now {aside.name}, and written again from the last checkpoint")


def task_folder(folder: Path, key: str) -> TaskFolder:
    return TaskFolder(folder / "tasks" / key)


def snapshot_code(destination: Path) -> Path:
    """Copy the clone's files that git knows or would take into `destination`; what it copies is what is run."""
    git = [*git_in(CLONE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, timeout=60).stdout.decode().split("\0")
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"snapshot: {CLONE} is not a git clone; set snapshot: false in the profile") from None
    for name in filter(None, listed):
        source, target = CLONE / name, destination / name
        if source.is_file():  # not one that was deleted and not committed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (destination / "REVISION").write_text(f"{code_revision() or 'unknown'}\n")
    return destination


def needs_folder(plan: Plan, code: Path) -> str | None:
    """The first file or place that `plan` names by its way from this folder and that is not in the copy `code`."""
    for run in plan.runs.values():
        for loaded in (run.loaded, *(teacher.run for teacher in run.loaded.teachers.values())):
            if loaded is None:
                continue
            for file in loaded.files:
                if not file.is_absolute() and not (code / file).is_file():
                    return str(file)
            data = loaded.config.data
            for place in (*data.train, *data.eval.values()):
                if relative_place(place) == str(Path(place).absolute()) != place:
                    return place  # it is known by its whole way, which would begin elsewhere
    return None


def _new_folder(folder: Path, grids: Sequence[Grid]) -> Path:
    names = "+".join(grid.name for grid in grids)
    if len(names) > _LONGEST:
        names = f"{len(grids)}-grids"
    parent = folder / "submissions"
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = parent / (f"{stamp}-{names}" if number == 1 else f"{stamp}-{names}-{number}")
        try:
            path.mkdir()
        except FileExistsError:  # one second, two submissions; the jobs' folder must be a new one
            number += 1
            continue
        return path


def _described(plan: Plan, grid: Grid) -> dict[str, Any]:
    cells = [
        {"title": grid.cells[number].title, "labels": grid.cells[number].labels, "seed": seed, "key": key}
        for (name, number, seed), key in plan.cells.items()
        if name == grid.name
    ]
    return {"path": str(grid.path), "title": grid.title, "paper": grid.paper, "table": grid.table, "cells": cells}


def _environment() -> dict[str, Any]:
    packages = {entry.metadata["Name"]: entry.version for entry in metadata.distributions()}
    return {"python": platform.python_version(), "packages": dict(sorted(packages.items(), key=lambda i: str(i[0])))}
