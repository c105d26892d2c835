"""A test cluster as its users see it: commands, jobs and their states."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian puts the daemons; not in every user's PATH
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
Value = TypeVar("Value")


class ClusterError(Exception):
    """The cluster could not be started, or did not do what was asked in time."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running cluster of `nodes`, whose configuration lies in `folder`."""

    folder: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What the shell of a login node has: no job's variables, and the way to this cluster."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN", "SBATCH"))}
        path = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
        return own | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, *command: str | Path, seconds: float = 60, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (srun, sbatch, scancel, ...) on the login node; both outputs captured, any exit code."""
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=cwd,
            env=self.environment | environment,
        )

    def ask(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """The stripped output of a command that must work."""
        done = self.run(*command, cwd=cwd, **environment)
        if done.returncode:
            raise ClusterError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> int:
        """`sbatch` with these arguments; the job's id."""
        return int(self.ask("sbatch", "--parsable", *arguments, cwd=cwd, **environment).partition(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` knows of it: JobState, Restarts, ExitCode, NodeList, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(job)).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def wait_for(self, job: int, reached: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        """The job's description as soon as `reached` holds for it; ClusterError when it does not in time."""
        return until(lambda: self.job(job), reached, seconds, f"job {job}")

    def wait_end(self, job: int, seconds: float) -> dict[str, str]:
        """The description of the job once it has ended, and does not wait to be run again either."""
        return self.wait_for(job, lambda shown: shown["JobState"] in ENDED, seconds)

    def cancel_all(self, seconds: float = 20) -> None:
        """Kill every job, and wait until none is left."""
        left = self.ask("squeue", "--noheader", "--format=%A").split()
        if left:
            self.run("scancel", "--signal=KILL", "--full", *left)
            self.run("scancel", *left)
        until(lambda: self.ask("squeue", "--noheader"), lambda jobs: not jobs, seconds, "cancelled jobs")


def until(look: Callable[[], Value], reached: Callable[[Value], bool], seconds: float, what: str) -> Value:
    """The first value of `look` for which `reached` holds; ClusterError, with the last value, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not reached(value := look()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not in {seconds:g} s; last seen: {value}")
        time.sleep(0.1)
    return value
