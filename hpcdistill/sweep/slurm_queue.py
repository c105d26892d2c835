"""What SLURM says of jobs: `squeue` of those it still holds, `sacct` of the others, nothing where neither answers.

Accounting lags behind: a job requeued after its node was lost is NODE_FAIL to `sacct` and PENDING to `squeue`. So
`squeue` goes first, and `sacct` is asked only for jobs that the former has forgotten (some minutes after their end).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

ANSWER_S = 10.0  # a controller that takes longer is as good as none
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ACTIVE = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
NEVER = "DependencyNeverSatisfied"
_MOST_IDS = 500  # of a scancel: argument lists have a limit
_SQUEUE = "%i|%T|%V|%S|%r|%o"
_SACCT = "jobid,state,submit,start,exitcode,reason"


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as SLURM describes it; times in seconds since 1970."""

    id: str  # 17, or 17_3
    state: str  # SLURM's word, PENDING
    submitted: float | None = None  # of a requeued job: when it was requeued
    started: float | None = None
    reason: str = ""  # why it waits, Dependency; why it ended, NonZeroExitCode, or its exit code, "exit 3:0"
    command: str = ""  # the script's path, or sbatch's command line

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.waiting or self.state in ACTIVE

    @property
    def never_starts(self) -> bool:
        """A job that it depends on has failed; SLURM leaves it in the queue, or has cancelled it for that."""
        return self.reason == NEVER and (self.waiting or self.state == "CANCELLED")


class Queue:
    """Asks SLURM; answers are kept for `keep_s` seconds, so that a display may refresh more often."""

    def __init__(self, environ: Mapping[str, str] = os.environ, keep_s: float = 0.0) -> None:
        # A user's own defaults would hide jobs or change the columns; 0 = ranges of tasks are written out in full.
        self._environ = {k: v for k, v in environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
        self._environ |= {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}
        self._keep_s = keep_s
        self._asked: frozenset[str] = frozenset()
        self._known: dict[str, Job] = {}
        self._asked_at = -float("inf")
        self.answers = False  # whether a job that `ask` did not return is gone; otherwise nobody knows

    def ask(self, ids: Collection[str], past: Collection[str] | None = None) -> dict[str, Job]:
        """Those of the jobs `ids` (17, or 17_3) that SLURM knows.

        `past`: those whose end is of interest (None = all); of the others it is enough to know whether they live.
        """
        wanted = frozenset(ids)
        if not wanted:
            return {}
        if not wanted <= self._asked or time.monotonic() - self._asked_at >= self._keep_s:
            self._known = self._ask(wanted, wanted if past is None else wanted & frozenset(past))
            self._asked, self._asked_at = wanted, time.monotonic()
        return {job: self._known[job] for job in wanted & self._known.keys()}

    def forget(self) -> None:
        """Ask anew the next time."""
        self._asked = frozenset()

    def _ask(self, wanted: frozenset[str], past: frozenset[str]) -> dict[str, Job]:
        # An array's waiting tasks share a line, which is found by the array's number only.
        numbers = ",".join(sorted({job.partition("_")[0] for job in wanted}))
        listed = self._lines("squeue", "--noheader", "--states=all", f"--format={_SQUEUE}", f"--jobs={numbers}")
        known = {job.id: job for line in listed or [] for job in _of_squeue(line) if job.id in wanted}
        self.answers = listed is not None
        if missing := (past if self.answers else wanted) - known.keys():
            numbers = ",".join(sorted({job.partition("_")[0] for job in missing}))
            question = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={numbers}")
            remembered = self._lines(*question, f"--format={_SACCT},submitline")
            if remembered is None:  # SLURM before 21.08 has no such column
                remembered = self._lines(*question, f"--format={_SACCT}")
            for job in (job for line in remembered or [] for job in _of_sacct(line)):
                # To accounting, tasks cancelled while they waited are PENDING for as long as their array waits.
                if job.id in missing and not (job.live and listed is not None):
                    known[job.id] = job
            self.answers = self.answers or remembered is not None
        return known

    def cancel(self, ids: Iterable[str]) -> list[str]:
        """Cancel jobs, waiting or running; what `scancel` had to complain about."""
        left = sorted(ids)
        complaints: list[str] = []
        while left:
            some, left = left[:_MOST_IDS], left[_MOST_IDS:]
            done = self._run("scancel", *some)
            if done is None:
                return [*complaints, "scancel: does not answer; are you on a machine of the cluster?"]
            complaints += [line for line in done.stderr.splitlines() if line.strip()]
        self.forget()
        return complaints

    def _lines(self, *command: str) -> list[str] | None:
        """A program's output; None when it is not here, fails or takes too long."""
        done = self._run(*command)
        if done is None:
            return None
        if done.returncode:  # squeue says so when it has forgotten the only job it was asked for
            return [] if "Invalid job id" in done.stderr else None
        return done.stdout.splitlines()

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
        program = shutil.which(name, path=self._environ.get("PATH"))
        if program is None:
            return None
        try:
            return subprocess.run(
                [program, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_S,
                env=self._environ,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None


def tasks_of(job: str) -> Iterator[str]:
    """The single tasks of a line's job id: 4_[1-3,7%2] -> 4_1, 4_2, 4_3, 4_7; any other id as it is."""
    number, bracket, rest = job.partition("_[")
    if not bracket:
        yield job
        return
    for part in rest.partition("]")[0].partition("%")[0].split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = (int(text) if text else None for text in found.groups())
            assert first is not None
            for task in range(first, (last if last is not None else first) + 1, step or 1):
                yield f"{number}_{task}"


def _of_squeue(line: str) -> list[Job]:
    cells = line.split("|", 5)
    if len(cells) < 6:
        return []
    job, state, submitted, started, reason, command = cells
    return _jobs(job, state, submitted, started, _said(reason), _said(command))


def _of_sacct(line: str) -> list[Job]:
    cells = line.split("|", 6)
    if len(cells) < 6:
        return []
    job, state, submitted, started, code, reason = cells[:6]
    # Of an ended job sacct repeats why it once had to wait; its exit code says more.
    why = _said(reason) if state in WAITING else "" if code == "0:0" else f"exit {code}"
    if (state, reason) == ("CANCELLED", "Dependency"):  # by SLURM itself; a user's are CANCELLED by 1000
        why = NEVER
    return _jobs(job, state, submitted, started, why, "".join(cells[6:]))


def _jobs(job: str, state: str, submitted: str, started: str, reason: str, command: str) -> list[Job]:
    word = state.partition(" ")[0].rstrip("+")  # CANCELLED by 1000
    return [Job(task, word, _seconds(submitted), _seconds(started), reason, command) for task in tasks_of(job)]


def _said(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A", "NONE") else text


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None
