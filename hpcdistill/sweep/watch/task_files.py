"""What the files of a sweep say: each run's state.json and config.json, and the result.json in the run folders.

Nothing that is damaged raises: it is described in a few words, for the run's reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpcdistill.errors import UserError
from hpcdistill.storage import JSON_OBJECT, Damaged, read_json
from hpcdistill.sweep.jobs.task_folder import TaskFolder
from hpcdistill.sweep.watch.submissions import Submission
from hpcdistill.training.records import RESULT, read_result

_HEALED = "it is set aside, and the run writes it again from its last checkpoint"


@dataclass
class Results:
    """The result.json of a folder of runs."""

    by_key: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)  # run folder's name -> one line


@dataclass
class TaskFiles:
    """What the files say of a run."""

    key: str
    folder: Path  # tasks/<key>
    state: dict[str, Any] = field(default_factory=dict)  # state.json; {} = none
    damage: str | None = None  # why state.json cannot be read
    jobs: list[tuple[Submission, str]] = field(default_factory=list)  # newest first

    @property
    def job(self) -> str | None:
        job = self.state.get("job")
        return str(job) if job else None

    @property
    def attempts(self) -> int:
        attempt = self.state.get("attempt")
        return attempt if isinstance(attempt, int) else 0

    @cached_property
    def log(self) -> Path | None:
        """The log of the last attempt; where state.json says, or below the task's folder when that was moved."""
        if not (said := self.state.get("log")):
            return None
        path = Path(str(said))
        return path if path.is_file() else self.folder / path.parent.name / path.name

    def config(self, section: str) -> dict[str, Any]:
        """A section of config.json; {} when it cannot be read."""
        found = self._config.get(section)
        return found if isinstance(found, dict) else {}

    @property
    def runs(self) -> Path | None:
        """The folder of runs that its configuration names; None when that cannot be read."""
        found = self._config.get("runs")
        return Path(found) if isinstance(found, str) else None

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            return read_json(TaskFolder(self.folder).config, JSON_OBJECT, "")
        except (OSError, ValueError):
            return {}


def task_keys(folder: Path) -> list[str]:
    """The keys of all tasks in a sweep's folder."""
    return _names(folder / "tasks")


def check_sweep(folder: Path) -> None:
    """UserError when nothing has been submitted from `folder`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; submit first, `python slurm/submit_ablations.py`, or give --folder")


def read_task(folder: Path) -> TaskFiles:
    """What `folder` (tasks/<key>) says."""
    try:
        return TaskFiles(folder.name, folder, TaskFolder(folder).read_state())
    except (FileNotFoundError, NotADirectoryError):
        return TaskFiles(folder.name, folder)
    except (OSError, ValueError) as error:
        return TaskFiles(folder.name, folder, damage=str(error))


def read_results(runs: Path) -> Results:
    """Each `runs`/*/result.json by the key in it; of two with one key the newer."""
    results = Results()
    times: dict[str, float] = {}
    for name in _names(runs):
        path = runs / name
        file = path / RESULT
        try:
            content = read_result(path)
        except (OSError, ValueError) as error:
            why = error.why if isinstance(error, Damaged) else str(error)
            results.damaged[name] = damage(file, why)
            continue
        if content is None:
            continue
        key = content.get("key")
        if isinstance(key, str):
            written = file.stat().st_mtime
            if key not in results.by_key or written >= times[key]:
                results.by_key[key], times[key] = (path, content), written
    return results


def damage(file: Path, why: str) -> str:
    """What status and the tables alike say of a result.json that cannot be read."""
    return f"{file}: damaged ({why:.100}); submit again with --retry failed: {_HEALED}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
