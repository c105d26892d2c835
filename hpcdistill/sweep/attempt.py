"""One start of a task's command by one rank: the child process, its log, and state.json while it lives."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from hpcdistill.console import warn
from hpcdistill.errors import EXIT_STOPPED
from hpcdistill.sweep.logs import last_words
from hpcdistill.sweep.results import find_results, finished_run, started_run
from hpcdistill.sweep.submissions import utc
from hpcdistill.sweep.task_folder import STATE, TaskFolder
from hpcdistill.training.records import is_finished

AttemptState = Literal["running", "finished", "failed", "stopped", "blocked"]
BEAT_S = 30.0  # between two signs of life
_FIND = """\
import sys
from hpcdistill.run import load_run
print(load_run(sys.argv[1:]).folder)
"""
_FIND_SECONDS = 200


class NotedSignals:
    """Signals that have come, for a loop to pass on; the handler does nothing but note them."""

    def __init__(self, noted: Iterable[int], unheard: Iterable[int] = ()) -> None:
        """`unheard`: signals that do nothing here. A child does not inherit that, as it would SIG_IGN."""
        self.all: list[int] = []
        self._passed = 0
        self._before = {number: signal.signal(number, self._note) for number in noted}
        self._before |= {number: signal.signal(number, lambda number, frame: None) for number in unheard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.all.append(number)

    def new(self) -> list[int]:
        """Those that have come since the last call."""
        new, self._passed = self.all[self._passed :], len(self.all)
        return new

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Child(Protocol):
    """What an attempt has in the place of a child where several runs share a process (`sweep.together`)."""

    pid: int

    @property
    def run(self) -> Path | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


class Attempt:
    """`python -m hpcdistill.train <task>/config.json` as a child process. Rank 0 writes the state."""

    def __init__(
        self,
        folder: TaskFolder,
        number: int,
        *,
        rank: int = 0,
        job: str | None = None,
        extra: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        own_session: bool = False,  # out of the terminal's reach: Ctrl-C is passed on by whoever started it
    ) -> None:
        self.folder, self.number, self.rank, self.job = folder, number, rank, job
        self.cwd = cwd or Path.cwd()
        self.log = folder.log(number, rank)
        self.command = [sys.executable, "-m", "hpcdistill.train", str(folder.config), *extra]
        values = folder.values()
        self.name = str(values["name"])
        self.runs = self.cwd / str(values["runs"])
        self.run: Path | None = None
        self._started = time.time()
        self._next_look, self._pause = self._started + 2, 2.0
        self._child: subprocess.Popen[bytes] | Child | None = None
        self._next_beat, self._warned = self._started + BEAT_S, False
        self._environment, self._own_session = {**environment, **folder.environment()}, own_session

    def start(self, part: Child | None = None) -> None:
        """Start the child; or this is `part` of one that was started for several runs."""
        if part is not None:
            self._child = part
            self._save("running")
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._child = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=self._own_session,
            )
        self._save("running")

    def poll(self) -> int | None:
        """The child's exit code (negative: the signal that killed it), None while it runs."""
        assert self._child is not None
        code = self._child.poll()
        now = time.time()
        if self.rank == 0 and self.run is None and (now > self._next_look or code is not None):
            self._next_look, self._pause = now + self._pause, min(60.0, 1.5 * self._pause)
            with contextlib.suppress(OSError):  # of a file server that is away for a moment
                self.run = self._started_run()
            if self.run is not None and code is None:
                self._save("running")
        if self.rank == 0 and now > self._next_beat:
            # What tells other hosts that it lives, while the run itself is silent: it stages its data, say.
            self._next_beat = now + BEAT_S
            with contextlib.suppress(OSError):
                os.utime(self.folder.path / STATE)
        return code

    def _started_run(self) -> Path | None:
        if isinstance(self._child, subprocess.Popen):
            return started_run(self.runs, self.folder.config, self._started)
        return self._child.run if self._child else None

    def send(self, number: int) -> None:
        """Pass a signal on to the child."""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def kill(self) -> None:
        """End the child at once, with what it has started."""
        if self._child is None or self._child.poll() is not None:
            return
        if self._own_session:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        else:
            self._child.kill()
        self._child.wait()

    def end(self, code: int, signalled: bool = False, message: str | None = None, again: bool = False) -> AttemptState:
        """Write down how it ended; `again`: it will be started again, so that it is no failure."""
        state: AttemptState = "finished" if code == 0 else "failed"
        # Not yet listening, it dies of the signal: no failure.
        if code == EXIT_STOPPED or (code != 0 and (signalled or again)):
            state = "stopped"
        if state == "finished":
            if self.rank == 0 and (self.run is None or not is_finished(self.run)):
                self.run = finished_run(self.runs, self.folder.key, self.name) or self._identical_run()
        elif message is None:
            message = last_words(self.log)
            if code < 0:
                with contextlib.suppress(ValueError):
                    message = f"killed by {signal.Signals(-code).name}" + (f"; last line: {message}" if message else "")
        self._save(state, code, message)
        return state

    def block(self, name: str, key: str) -> str:
        """Write down that it cannot be run without its teacher, the run `name` with the key `key`; the reason."""
        message = f"its teacher {name} ({key}) has no result"
        self._save("blocked", None, message)
        return message

    def refuse(self, message: str) -> None:
        """Write down that it was not started, for a mistake that its user is to mend."""
        self._save("failed", None, f"error: {message}")

    def _identical_run(self) -> Path | None:
        """The finished run that training has found by its identity: one of another key, or of code without keys.

        In a process of its own, as the run was: with its variables and its folder, and without torch in this one.
        """
        try:
            done = subprocess.run(
                [sys.executable, "-c", _FIND, str(self.folder.config)],
                cwd=self.cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_FIND_SECONDS,
                check=True,
                start_new_session=True,  # Ctrl-C is not for it
            )
        except (OSError, subprocess.SubprocessError):
            return None
        run = self.cwd / (done.stdout.splitlines() or [""])[-1]
        return run if is_finished(run) else None

    def _save(self, state: AttemptState, code: int | None = None, message: str | None = None) -> None:
        if self.rank != 0:
            return
        values: dict[str, Any] = {
            "key": self.folder.key,
            "name": self.name,
            "state": state,
            "attempt": self.number,
            "job": self.job,
            "host": socket.gethostname(),
            "pid": os.getpid() if self._child is None else self._child.pid,
            "started": utc(self._started),
            "ended": None if state == "running" else utc(),
            "run": str(self.run) if self.run else None,
            "code": code,
            "message": message,
            "log": str(self.log) if self._child is not None else None,
        }
        try:
            self.folder.save_state(values)
        except OSError as error:  # a full or absent disk must not take the training with it
            if not self._warned:
                warn(f"{self.folder.path / STATE}: not written ({error.strerror or error}); {self.name} goes on")
            self._warned = True


def teacher_run(folder: TaskFolder, teacher: str, cwd: Path) -> Path | None:
    """The finished run of the teacher with the key `teacher`, if there is one."""
    values = folder.values()
    runs = cwd / str(values["runs"])
    name = TaskFolder(folder.path.parent / teacher)
    called = str(name.values()["name"]) if name.config.is_file() else ""
    found = finished_run(runs, teacher, called)
    if found is not None:
        return found
    # One that training has found finished by its identity has another key, or none: its task says where it is.
    state = name.state() or {}
    if state.get("state") == "finished" and state.get("run"):
        said = Path(str(state["run"]))
        for run in (cwd / said, runs / said.name):  # or runs were moved
            if is_finished(run):
                return run
    # A run from before result.json had a key is known by its configuration.
    older = find_results(runs).by_key.get(teacher) if runs.is_dir() else None
    return older.folder if older else None
