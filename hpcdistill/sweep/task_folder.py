"""A run's folder in a sweep: `tasks/<key>/` with its configuration, its state and the log of each attempt.

Nothing here imports torch: a task's process waits for hours beside the run it has started, on one core.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdistill.data.places import VARIABLE, data_root
from hpcdistill.errors import UserError
from hpcdistill.storage import json_object, json_texts, read_json, write_json
from hpcdistill.sweep.submissions import Submission

if TYPE_CHECKING:  # a task's own process makes no plan
    from hpcdistill.sweep.plan import Plan, PlannedRun

CONFIG, TEACHER, STATE, START = "config.json", "teacher.json", "state.json", "start.json"
ENVIRONMENT = "environment.json"
FIELDS = ("key", "name", "state", "attempt", "job", "host", "pid", "started", "ended", "run", "code", "message", "log")


class TaskFolder:
    """Paths and small files of one task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG

    @property
    def key(self) -> str:
        return self.path.name

    def log(self, attempt: int, rank: int = 0) -> Path:
        """What rank `rank` has printed in that attempt."""
        return self.path / f"attempt-{attempt}" / f"rank{rank}.log"

    def attempts(self) -> int:
        """How often the run has been started."""
        numbers = [entry.name.removeprefix("attempt-") for entry in self.path.glob("attempt-*")]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def begin_attempt(self) -> int:
        """Make the folder of a new attempt; its number."""
        while True:
            number = self.attempts() + 1
            try:
                (self.path / f"attempt-{number}").mkdir(parents=True)
            except FileExistsError:  # two jobs at once: each has its own
                continue
            return number

    def values(self) -> dict[str, Any]:
        """config.json. Raises Damaged."""
        return read_json(self.config, _configuration, "submit the sweep again, which writes it anew")

    def environment(self) -> dict[str, str]:
        """The variables that the run must see as its submitter did: keys are made of paths below the data root."""
        try:
            return read_json(self.path / ENVIRONMENT, json_texts, "submit the sweep again, which writes it anew")
        except FileNotFoundError:  # of older code
            return {}

    def state(self) -> dict[str, Any] | None:
        """state.json; None when there is none that can be read."""
        try:
            return self.read_state()
        except (OSError, ValueError):
            return None

    def read_state(self) -> dict[str, Any]:
        """state.json. Raises Damaged, and OSError where it cannot be read or is not there."""
        return read_json(self.path / STATE, json_object, "submit again with --retry failed, which writes it anew")

    def save_state(self, state: Mapping[str, Any]) -> bool:
        """Write state.json; False, and nothing written, when a later attempt has written its own.

        A node that SLURM has given up may still be at work, and must not speak over the attempt that came after it.
        """
        assert set(state) == set(FIELDS)
        before = self.state()
        later = before.get("attempt") if before else None
        if isinstance(later, int) and later > state["attempt"]:
            return False
        write_json(self.path / STATE, dict(state))
        return True


def _configuration(value: Any) -> dict[str, Any]:
    if not all(isinstance(json_object(value).get(key), str) for key in ("name", "runs")):
        raise ValueError("name, runs: expected text")
    return json_object(value)


def write_tasks(folder: Path, plan: Plan, runs: Iterable[PlannedRun]) -> None:
    """The task folders of `runs` in a sweep's `folder`, whole on the disk before anything is queued."""
    for run in runs:
        teacher = plan.runs[run.teacher].loaded.config.dump() if run.teacher else None
        write_task(folder / "tasks" / run.key, run.loaded.config.dump(), teacher)
    os.sync()


def write_task(folder: Path, config: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> None:
    """Write the configurations of a task, complete and resolved, where they differ from what is there.

    Not synced one by one, which takes seconds for a thousand tasks: the caller syncs once, before anything is queued.
    """
    values = dict(config)
    # A job may start without the submitter's variables (--export=NONE, a container), or with others of its node.
    _write(folder / ENVIRONMENT, {VARIABLE: str(data_root())})
    if teacher is not None:
        own = teacher["teacher"]  # one that has to be trained is not needed; a finished one goes along
        _write(folder / TEACHER, {**teacher, "teacher": own if own and own["config"] is None else None})
        # As train saves it: beside this file, the student's overrides of its teacher already merged into it. What is
        # trained is one run, whatever roles it fills.
        roles = {"teacher": values["teacher"], **values["teachers"]}
        for role, settings in roles.items():
            if settings and settings["config"] is not None:
                roles[role] = {**settings, "config": TEACHER, "overrides": {}}
        values["teacher"], values["teachers"] = roles.pop("teacher"), roles
    _write(folder / CONFIG, values)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    content = (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@dataclass
class TaskFiles:
    """What the files of a task said when they were read; what is damaged is described and does not raise."""

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
        """The folder of runs that its state or its configuration names; None when neither can be read."""
        if isinstance(run := self.state.get("run"), str):
            return Path(run).parent
        found = self._config.get("runs")
        return Path(found) if isinstance(found, str) else None

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            return read_json(TaskFolder(self.folder).config, json_object, "")
        except (OSError, ValueError):
            return {}


def read_task(folder: Path) -> TaskFiles:
    """What `folder` (tasks/<key>) says."""
    try:
        return TaskFiles(folder.name, folder, TaskFolder(folder).read_state())
    except (FileNotFoundError, NotADirectoryError):
        return TaskFiles(folder.name, folder)
    except (OSError, ValueError) as error:
        return TaskFiles(folder.name, folder, damage=str(error))


def task_keys(folder: Path) -> list[str]:
    """The keys of all tasks in a sweep's folder."""
    try:
        return sorted(entry.name for entry in os.scandir(folder / "tasks") if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def filled_in(scratch: str) -> str:
    """The folder that a profile's `scratch` names on this machine.

    Raises UserError when a variable in it is not set here: data would be staged into a folder called $TMPDIR.
    """
    folder = os.path.expandvars(scratch)
    if "$" in folder:
        raise UserError(f"scratch: {scratch}: not set on {socket.gethostname()}; name a folder that each node has")
    return folder
