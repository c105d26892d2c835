"""lock.json: one process trains a run folder, whichever host it is on, and nobody waits for one that is gone.

A file lock (`file_lock`) is not enough: it does not reach every host of a cluster, it does not say which job holds it,
and an orphan of a requeued job keeps it. So the lock is a file that names its holder and whose time the holder renews.
Who finds another's lock takes it only when that one is certainly gone (its process on this host, its SLURM job), is an
earlier start of the same job, or has given no sign of life for five minutes. Should two nevertheless believe that they
hold it, all but the one named in the file end before their next save: see `RunLock.confirm`. A file made with O_EXCL
and called stale after five minutes fails with wrong clocks, with a process number that another process has got, and
with two that find the same dead lock (tests/training/test_lock.py).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from hpcdistill.console import say, warn
from hpcdistill.errors import UserError
from hpcdistill.file_lock import locked
from hpcdistill.storage import parse_json

HEARTBEAT_S = 30.0
STALE_S = 300.0  # without a heartbeat
WATCH_S = 45.0  # more than a heartbeat
SETTLE_S = 0.5
_GUARD_S = _SQUEUE_S = 2.0
_ENDED_PROCESS = -1
_ENDED_JOB = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"}
_ENDED_JOB |= {"NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}


@dataclass(frozen=True)
class Holder:
    """A process that trains a run: what lock.json says."""

    token: str  # random
    process: Annotated[int, Field(gt=0, lt=1 << 31)]
    started: int | None  # clock ticks after the host's start; None: not known on this system
    host: str
    boot: str | None  # differs after every start of the host
    namespace: str | None  # within which process numbers mean something
    user: int
    job: str | None  # SLURM's
    array: str | None  # JOB_TASK
    cluster: str | None
    restarts: int
    elastic: str | None  # torchrun's id
    elastic_restarts: int

    @classmethod
    def this_process(cls, environ: Mapping[str, str]) -> Holder:
        array = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        elastic = environ.get("TORCHELASTIC_RUN_ID")
        return cls(
            token=secrets.token_hex(16),
            process=os.getpid(),
            started=_started(os.getpid()),
            host=socket.gethostname(),
            boot=_line(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_pid_namespace(),
            user=os.getuid(),
            job=environ.get("SLURM_JOB_ID"),
            array="_".join(part for part in array if part) if all(array) else None,
            cluster=environ.get("SLURM_CLUSTER_NAME"),
            restarts=_count(environ, "SLURM_RESTART_COUNT"),
            elastic=None if elastic == "none" else elastic,  # what torchrun says when nobody gave it an id
            elastic_restarts=_count(environ, "TORCHELASTIC_RESTART_COUNT"),
        )

    @classmethod
    def read(cls, content: bytes) -> Holder | None:
        """None when `content` is not a whole lock: a crash of the system, or an old version, has left it."""
        with suppress(ValueError):
            return parse_json(content, _HOLDER)
        return None

    def __str__(self) -> str:
        about = []
        if self.job:
            about.append(f"SLURM job {self.job}" + (f" (array {self.array})" if self.array else ""))
        restarts = self.restarts or self.elastic_restarts
        about += [f"restart {restarts}"] if restarts else []
        return f"process {self.process} on {self.host}" + (f" of {', '.join(about)}" if about else "")

    def sees(self, other: Holder) -> bool:
        """Whether process numbers of `other` mean the same here."""
        return (self.host, self.boot, self.namespace) == (other.host, other.boot, other.namespace)

    def is_process(self, other: Holder) -> bool:
        return self.sees(other) and (self.process, self.started) == (other.process, other.started)

    def succeeds(self, other: Holder) -> bool:
        """Whether this is a later start of the job that `other` belongs to."""
        if (self.job, self.cluster) != (other.job, other.cluster):
            return False
        if self.job is not None and self.restarts != other.restarts:
            return self.restarts > other.restarts
        return (
            self.elastic is not None
            and self.elastic == other.elastic
            and self.elastic_restarts > other.elastic_restarts
        )


_HOLDER = TypeAdapter(Holder)


@dataclass(frozen=True)
class _Seen:
    """The lock file at one moment."""

    content: bytes
    changed: int  # ns, of the clock of the file system

    @property
    def holder(self) -> Holder | None:
        return Holder.read(self.content)


class RunLock:
    """Held from `take` until `release`, the end of the process, or the loss of the last reference."""

    def __init__(
        self,
        path: Path,
        *,
        environ: Mapping[str, str] = os.environ,
        heartbeat: float = HEARTBEAT_S,
        stale: float = STALE_S,
        watch: float = WATCH_S,
        settle: float = SETTLE_S,
    ) -> None:
        self.path = path
        self.holder: Holder | None = None
        self._environ = environ
        self._heartbeat, self._stale, self._watch, self._settle = heartbeat, stale, watch, settle
        self._end: weakref.finalize[..., RunLock] | None = None

    def take(self) -> None:
        """Take the lock. UserError, within 5 s, when a process that may be alive holds it.

        A lock that seems old is watched for `watch` seconds before: hosts do not agree on the time, and some file
        systems write down that of the host.
        """
        self.release()
        ours = Holder.this_process(self._environ)
        draft = self.path.with_name(f".{self.path.name}.{ours.token}.tmp")
        silent: _Seen | None = None  # seen, and again the same after `watch` seconds
        try:
            while True:
                now = _write(draft, ours)
                seen = _look(self.path)
                why = ""
                if seen is not None and seen.holder is not None:
                    free, why = self._is_free(seen.holder, ours)
                    if free is None and abs(now - seen.changed) > self._stale * 1e9:
                        if silent is None:
                            self._wait_for_change(seen)
                            silent = seen
                            continue
                        free, why = seen == silent, f"it has given no sign of life for {self._stale:.0f} s"
                    if not free:
                        raise UserError(
                            f"{self.path.parent}: {seen.holder} is training this run; wait for it, or stop it first "
                            f"(if this is a copy of its folder, remove {self.path.name})"
                        )
                if self._replace(draft, seen, ours):
                    if seen is not None and why:
                        say(f"{self.path.parent}: taking over from {seen.holder}: {why}")
                    break
        finally:
            draft.unlink(missing_ok=True)
        self.holder = ours
        stop = threading.Event()
        self._end = weakref.finalize(self, _release, self.path, ours, stop)  # also at the interpreter's end
        beat = (self.path, ours.token, stop, self._heartbeat)
        threading.Thread(target=_beat, args=beat, name="run lock", daemon=True).start()

    def confirm(self) -> None:
        """Raise UserError when another process has taken the run over; nothing when the lock was never taken.

        Reads one small file. A lock that somebody has removed is written again.
        """
        if self.holder is None or self.holder.process != os.getpid():
            return
        with suppress(OSError):  # what is wrong with the disk is said by the save that follows
            seen = _look(self.path)
            if seen is None or seen.holder is None:
                draft = self.path.with_name(f".{self.path.name}.{self.holder.token}.tmp")
                try:
                    _write(draft, self.holder)
                    self._replace(draft, seen, self.holder)
                finally:
                    draft.unlink(missing_ok=True)
                seen = _look(self.path)
            if seen is not None and seen.holder is not None and seen.holder.token != self.holder.token:
                raise UserError(
                    f"{self.path.parent}: {seen.holder} has taken this run over and goes on from its last checkpoint; "
                    f"{self.holder} ends here and saves nothing more"
                )

    def release(self) -> None:
        """Remove the lock when it is still ours."""
        if self._end is not None:
            self._end()
        self.holder = self._end = None

    def _is_free(self, holder: Holder, ours: Holder) -> tuple[bool | None, str]:
        """Whether the lock of `holder` keeps nobody out, and why; None when only its heartbeat can tell."""
        if ours.is_process(holder):
            return True, ""
        if ours.succeeds(holder):
            return True, "it is an earlier start of this job"
        if ours.sees(holder):  # certain; a process that lives may be unable to write its heartbeat
            return not _alive(holder), "its process has ended"
        return _job_gone(holder, ours, self._environ) or None, "its job has ended"

    def _wait_for_change(self, seen: _Seen) -> None:
        warn(f"{self.path.parent}: {seen.holder} seems to be gone; waiting {self._watch:.0f} s for a sign of life")
        end = time.monotonic() + self._watch
        while time.monotonic() < end and _look(self.path) == seen:
            time.sleep(min(1.0, self._watch / 20))

    def _replace(self, draft: Path, seen: _Seen | None, ours: Holder) -> bool:
        """Put `draft` in the place of the lock that was `seen`; False when that has changed meanwhile."""
        with _guard(self.path) as guarded:
            if _look(self.path) != seen:
                return False
            try:
                if seen is None:
                    alone = _link(draft, self.path)
                else:
                    draft.replace(self.path)
                    alone = guarded and seen.holder is not None and ours.sees(seen.holder)
            except (FileExistsError, FileNotFoundError):  # the holder clears away drafts like ours
                return False
        if not alone:  # no guard, or one that other hosts may not respect: the last one to replace it stays
            time.sleep(self._settle)
        now = _look(self.path)
        return now is not None and now.holder is not None and now.holder.token == ours.token


def _look(path: Path) -> _Seen | None:
    while True:
        try:
            with path.open("rb") as file:  # to open makes NFS ask the server
                return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: replaced by another host just now
                raise


def _write(draft: Path, holder: Holder) -> int:
    """Write a lock under another name; the file system's time in ns."""
    draft.write_text(json.dumps(asdict(holder), indent=1) + "\n", encoding="utf-8")
    os.utime(draft)
    return draft.stat().st_mtime_ns


def _link(draft: Path, path: Path) -> bool:
    """Copy `draft` unless `path` exists (FileExistsError); False when that was not done in one go."""
    try:
        os.link(draft, path)
        return True
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # no hard links here
        with path.open("xb") as file:
            file.write(draft.read_bytes())
        return False


@contextmanager
def _guard(path: Path) -> Iterator[bool]:
    """Keep others from replacing the lock for a moment; False where that cannot be done."""
    with ExitStack() as stack:
        held: bool | None = None
        with suppress(OSError):
            held = stack.enter_context(locked(path.with_name(f".{path.name}.guard"), _GUARD_S))
        yield held is True


def _beat(path: Path, token: str, stop: threading.Event, interval: float) -> None:
    """The heartbeat: renew the lock's time for as long as it is ours."""
    while not stop.wait(interval):
        with suppress(OSError):  # a disk that is full or away for a while must not end the run
            seen = _look(path)
            if seen is not None and seen.holder is not None and seen.holder.token != token:
                return
            if seen is not None:
                os.utime(path)


def _release(path: Path, ours: Holder, stop: threading.Event) -> None:
    if os.getpid() != ours.process:  # a fork has got a copy of what its parent holds
        return
    stop.set()
    with suppress(OSError), _guard(path):
        seen = _look(path)
        if seen is not None and seen.holder is not None and seen.holder.token == ours.token:
            path.unlink(missing_ok=True)


def _alive(holder: Holder) -> bool:
    """Whether the process, of this host, runs."""
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    started = _started(holder.process)
    return started is None or started == holder.started or (holder.started is None and started != _ENDED_PROCESS)


def _started(process: int) -> int | None:
    """When a process was started, in clock ticks since the host's start; _ENDED_PROCESS: a zombie; None: not known.

    Not as a date: that shifts with the host's clock.
    """
    try:
        after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return None
    state, *numbers = after_name.split()
    return _ENDED_PROCESS if state in "ZX" else int(numbers[18])


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _job_gone(holder: Holder, ours: Holder, environ: Mapping[str, str]) -> bool:
    """Whether SLURM says that the job has ended; False when it does not answer or does not know."""
    program = shutil.which("squeue", path=environ.get("PATH"))
    # Sites may hide the jobs of other users, and another cluster has its own numbers.
    if program is None or holder.job is None or (holder.cluster, holder.user) != (ours.cluster, ours.user):
        return False
    question = [program, "--noheader", "--states=all", "--format=%T", f"--jobs={holder.array or holder.job}"]
    try:
        asked = subprocess.Popen(
            question,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A user's own defaults (SQUEUE_USERS, SQUEUE_PARTITION) would hide the job, as if it had ended.
            env={name: value for name, value in environ.items() if not name.startswith("SQUEUE_")},
            start_new_session=True,
        )
    except OSError:
        return False
    with asked:
        try:
            answer, problem = asked.communicate(timeout=_SQUEUE_S)
        except subprocess.TimeoutExpired:
            os.killpg(asked.pid, signal.SIGKILL)
            return False
    if asked.returncode != 0:
        return "Invalid job id" in problem  # forgotten some minutes after its end
    return set(answer.split()) <= _ENDED_JOB


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0
