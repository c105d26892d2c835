"""A run's folder: config.yaml, environment.json, metrics.jsonl, checkpoints/, samples/, generators/, result.json.

A GAN's has saved/ besides, with its discriminators.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcdistill.console import warn
from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import ranks
from hpcdistill.storage import CLONE, Damaged, write_bytes, write_json
from hpcdistill.training.lock import RunLock
from hpcdistill.training.records import ENVIRONMENT, RESULT, read_environment, read_result

_PACKAGES = ("hpcdistill", "torch", "accelerate", "numpy", "safetensors", "deepspeed")


class RunFolder:
    """Paths of one run and the small files beside its checkpoints. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._lock = RunLock(path / "lock.json")

    def generator(self, which: str, name: str) -> Path:
        """The weights of generator `name`, `which` being best or last."""
        return self.path / "generators" / which / f"{name}.safetensors"

    def saved(self, which: str, name: str) -> Path:
        """The weights of a network that is saved beside the generators (`Method.saved`)."""
        return self.path / "saved" / which / f"{name}.safetensors"

    def create(self, config_yaml: str, identity: dict[str, Any]) -> None:
        """Make the folder, lock it, save the resolved configuration and add this session to environment.json.

        Raises UserError when another process trains this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        generators = (self.generator(which, "").parent for which in ("best", "last"))
        for folder in (self.samples, self.checkpoints, *generators):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.rglob(".*.tmp"):
            if leftover.is_file():  # of a process that was killed while it wrote; folders are the checkpoints' affair
                leftover.unlink(missing_ok=True)
        write_bytes(self.path / "config.yaml", config_yaml.encode())
        try:
            sessions = read_environment(self.path)["sessions"]
        except Damaged as error:  # a record that no result depends on keeps no run from going on
            warn(f"{self.path / ENVIRONMENT}: damaged ({error.why}); written again, without the earlier sessions")
            sessions = []
        sessions.append(describe_session())
        write_json(self.path / ENVIRONMENT, {"identity": identity, "sessions": sessions})
        first, now = sessions[0].get("revision"), sessions[-1]["revision"]
        if first != now:
            warn(f"{self.path.name}: started with code revision {first}, going on with {now}")

    def confirm(self) -> None:
        """Raise UserError when another process has taken this run over, or when the folder that this one holds is gone.

        Call it before anything is written: what made the folder again would leave half a run in it.
        """
        self._lock.confirm()
        # Not the folder itself: a save that meets its removal leaves it there, half empty.
        if self._lock.holder is not None and not (self.path / "config.yaml").is_file():
            raise UserError(
                f"{self.path}: the run folder was removed or moved while it was trained in; nothing more is saved. "
                "The same command starts the run again, or goes on once the folder is back in its place"
            )

    def release(self) -> None:
        """Let the next process train this run."""
        self._lock.release()

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run has not finished. Raises Damaged; see `records.read_result`."""
        return read_result(self.path)

    def save_result(self, result: dict[str, Any]) -> None:
        self.confirm()
        write_json(self.path / RESULT, result)


def describe_session() -> dict[str, Any]:
    """Where and with what this process runs: for the record, never part of a run's identity."""
    import torch  # sweeps use the rest of this file without it

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.orig_argv),
        "revision": code_revision(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "processes": ranks(),
        "cpu": _cpu_name(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def code_revision() -> str | None:
    """The git revision of the clone that hpcdistill is used from, with `+` when files differ from it.

    A copy that a sweep has made of the clone says it in the file REVISION: git would name the clone's present one.
    """
    if (copied := CLONE / "REVISION").is_file():
        return copied.read_text(encoding="utf-8", errors="replace").strip() or None
    describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run([*git_in(CLONE), *describe], capture_output=True, text=True, timeout=10)
        if done.returncode == 0:
            return done.stdout.strip()
        reason = done.stderr.strip().partition("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    if (CLONE / ".git").exists():
        _say_once(f"{CLONE}: git does not tell the code's revision, so results will not name it: {reason}")
    return None


def git_in(clone: Path) -> list[str]:
    """The beginning of a git command about `clone`.

    git refuses a clone of another user, as the settings in it may name commands. This one's code is running already,
    so it is trusted, but for this command and this folder alone.
    """
    return ["git", "-c", f"safe.directory={clone}", "-c", "core.fsmonitor=false", "-C", str(clone)]


@cache
def _say_once(message: str) -> None:
    warn(message)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x {os.cpu_count()}"
