"""The folder of a submission that is being made: its plan.json, as `submissions` reads it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcdistill.storage import write_json
from hpcdistill.sweep.grid import Grid
from hpcdistill.sweep.plan import Plan
from hpcdistill.sweep.submissions import utc
from hpcdistill.training.run_folder import code_revision

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
