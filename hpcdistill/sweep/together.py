"""Several attempts as one process: `python -m hpcdistill.train_many`, each with its own log, state and end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hpcdistill.config import RunConfig
from hpcdistill.errors import EXIT_CRASHED
from hpcdistill.storage import read_json
from hpcdistill.sweep.attempt import Attempt

_OUTCOMES: TypeAdapter[list[dict[str, str | int | None]]] = TypeAdapter(list[dict[str, str | int | None]])


def kind_of(config: RunConfig) -> tuple[Any, ...] | None:
    """What runs that may share a process have in common; None for a run that has its process to itself.

    Besides what a process has but once, the method, network and length: they then end together, and no place is idle.
    """
    train = config.train
    if train.deepspeed or set(train.trackers) - {"tensorboard"}:
        return None
    method = {key: getattr(config.method, key, None) for key in ("network", "scale", "ngf")}
    return (
        config.method.name,
        *method.values(),
        *(train.steps, train.epochs, train.batch_size, config.data.samples_per_epoch),
        *(train.device, train.precision, train.deterministic, train.threads),
    )


class Together:
    """The process of several attempts; `outcomes.json` beside the first one's log says which of them have ended."""

    def __init__(self, attempts: Sequence[Attempt], environment: Mapping[str, str], extra: Sequence[str]) -> None:
        self.attempts = list(attempts)
        self.cwd, self._environment, first = attempts[0].cwd, environment, attempts[0]
        self.outcomes, self.log = first.log.with_name("outcomes.json"), first.log.with_name("together.log")
        self.command = [sys.executable, "-m", "hpcdistill.train_many", "--outcomes", str(self.outcomes)]
        for attempt in attempts:
            self.command += ["--cell", shlex.join([str(attempt.folder.config), *extra]), "--log", str(attempt.log)]

    def start(self) -> None:
        """Start the process, and each attempt as a part of it."""
        for attempt in self.attempts:
            attempt.log.parent.mkdir(parents=True, exist_ok=True)
            attempt.log.touch()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env={**self._environment, **self.attempts[0].folder.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on by whoever started it
            )
        for number, attempt in enumerate(self.attempts):
            attempt.start(Share(self, number))

    def outcome(self, number: int) -> dict[str, str | int | None]:
        """`run` and `code` of a part; empty while nothing is known."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return read_json(self.outcomes, _OUTCOMES, "it is written at each start")[number]
        return {}


class Share:
    """One attempt's share of the process, as `Attempt` sees a child."""

    def __init__(self, together: Together, number: int) -> None:
        self._together, self._number = together, number
        self.pid = together.process.pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code of this run, whether or not the others have ended."""
        if self._code is None:
            ended = self._together.process.poll()  # asked first: what it has written last is then there
            code = self._together.outcome(self._number).get("code")
            if isinstance(code, int):
                self._code = code
            elif ended is not None:
                self._code = ended or EXIT_CRASHED
        return self._code

    @property
    def run(self) -> Path | None:
        """The run's folder, once it is there."""
        said = self._together.outcome(self._number).get("run")
        folder = self._together.cwd / str(said) if said else None
        return folder if folder is not None and (folder / "environment.json").is_file() else None

    def send_signal(self, number: int) -> None:
        self._together.process.send_signal(number)

    def kill(self) -> None:
        """End all parts."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return self._together.process.wait()
