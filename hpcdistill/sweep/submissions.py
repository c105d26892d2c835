"""What has been submitted: the plan.json of each submission, as `submission_folder` writes it.

It is all that status needs to know of a grid: reading it loads no configuration.
"""

from __future__ import annotations

import calendar
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdistill.storage import json_object, parse_json
from hpcdistill.sweep.slurm_queue import Job

SKEW_S = 300.0  # between the clocks of the login node and of the controller
HEARTBEAT = "alive"  # touched by a local runner while it lives
SUBMITTING_S = 3600.0  # between a submission's first array and its last


@dataclass(frozen=True)
class SubmittedCell:
    """A cell of a grid and the run that fills it."""

    grid: str
    title: str
    seed: int | None
    key: str | None  # None: reported, nothing is run
    labels: tuple[tuple[str, str], ...] = ()  # tell cells of one title apart


@dataclass(frozen=True)
class Submission:
    """One call of submit_ablations.py."""

    folder: Path
    time: float  # seconds since 1970
    cells: tuple[SubmittedCell, ...]
    runs: dict[str, dict[str, Any]]  # by key: name, steps, teacher
    jobs: dict[str, str]  # by key: 17_3
    local: tuple[str, int] | None = None  # host and process that runs them one after the other
    queue: tuple[str, ...] = ()  # keys that the local runner takes in turn
    command: tuple[str, ...] | None = None  # what submit_ablations.py was given
    grids: Mapping[str, Path] = field(default_factory=dict)  # their files by name
    overrides: tuple[str, ...] = ()  # key=value and overlay files that hold for every run of it
    seeds: tuple[int, ...] | None = None  # None = the grids' own
    cwd: Path = Path()  # the folder it was submitted in, which paths in grids and overrides start from

    @property
    def name(self) -> str:
        return self.folder.name

    def last_sign(self) -> float:
        """When its local runner was last known to live."""
        try:
            return max(self.time, (self.folder / HEARTBEAT).stat().st_mtime)
        except OSError:
            return self.time

    def made(self, job: Job) -> bool:
        """Whether `job` is of this submission, and not another that was given the same number.

        A cluster that was set up anew counts from 1 again, and every cluster starts over some day.
        """
        if f"/{self.name}/" in job.command:
            return True
        if "submission_file" in job.command or "/submissions/" in job.command:
            return False
        # A job without a script's path: only the time tells. Too early is certain, later may be a requeued one.
        return job.submitted is None or self.time - SKEW_S <= job.submitted <= self.time + SUBMITTING_S


def read_submissions(folder: Path) -> tuple[list[Submission], list[str]]:
    """The submissions in `folder`/submissions, newest first, and one line for each plan.json that cannot be read."""
    found, problems = [], []
    try:
        entries = [entry.path for entry in os.scandir(folder / "submissions")]
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    for path in map(Path, entries):
        try:
            found.append(read_submission(path))
        except (FileNotFoundError, NotADirectoryError):
            continue  # being made, or stopped before anything was submitted
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{path / 'plan.json'}: cannot be read ({_short(error)}); its jobs are unknown here")
    return sorted(found, key=lambda submission: (submission.time, submission.name), reverse=True), sorted(problems)


def read_submission(folder: Path) -> Submission:
    """The submission in `folder`; raises what reading JSON raises."""
    file = folder / "plan.json"
    content = parse_json(file.read_bytes(), json_object)
    grids: Mapping[str, Any] = content["grids"]
    cells = [
        SubmittedCell(str(name), str(cell["title"]), cell.get("seed"), cell.get("key"), _labels(cell.get("labels")))
        for name, grid in grids.items()
        for cell in grid["cells"]
    ]
    local = content.get("local") or None
    return Submission(
        folder,
        epoch(content.get("time")) or _named_time(folder.name) or file.stat().st_mtime,
        tuple(cells),
        {str(key): dict(run) for key, run in (content.get("runs") or {}).items()},
        {str(key): str(job) for key, job in (content.get("jobs") or {}).items()},
        (str(local["host"]), int(local["pid"])) if local else None,
        tuple(map(str, content.get("queue") or ())),
        tuple(map(str, content["command"])) if content.get("command") is not None else None,
        {str(name): Path(str(grid.get("path") or name)) for name, grid in grids.items()},
        _overrides(content),
        tuple(map(int, content["seeds"])) if content.get("seeds") else None,
        Path(str(content.get("place") or ".")),
    )


def _overrides(content: Mapping[str, Any]) -> tuple[str, ...]:
    """What was laid over every run; older submissions have it in their command line and profile only."""
    if content.get("overrides") is not None:
        return tuple(map(str, content["overrides"]))
    profile = content.get("profile") or {}
    given = [word for word in map(str, content.get("command") or ()) if "=" in word and not word.startswith("-")]
    return (*map(str, profile.get("set") or ()), *given)


def submitted_grids(submissions: Iterable[Submission]) -> dict[str, Submission]:
    """The newest of `submissions` (newest first) that each grid is in, by the grid's name."""
    found: dict[str, Submission] = {}
    for submission in submissions:
        for name in submission.grids:
            found.setdefault(name, submission)
    return found


def submitted_files(submissions: Iterable[Submission]) -> dict[str, Path]:
    """The files of the grids that were submitted, by name, from wherever they were submitted."""
    return {name: found.cwd / found.grids[name] for name, found in submitted_grids(submissions).items()}


def _labels(labels: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((str(name), str(value)) for name, value in (labels or {}).items()))


def epoch(value: Any) -> float | None:
    """Seconds since 1970 of a number, or of a UTC time like 2026-11-22T02:50:00Z; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(calendar.timegm(time.strptime(value[:19], "%Y-%m-%dT%H:%M:%S")))
        except ValueError:
            return None
    return None


def _named_time(name: str) -> float | None:
    """The time in a submission folder's name, whatever stands between its digits."""
    found = re.match(r"(\d{4})-?(\d\d)-?(\d\d)[T_-]?(\d\d)[:.-]?(\d\d)[:.-]?(\d\d)", name)
    if not found:
        return None
    return float(calendar.timegm((*map(int, found.groups()), 0, 0, 0)))


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def utc(seconds: float | None = None) -> str:
    """A time as it is written into files."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
