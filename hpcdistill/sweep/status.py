"""The state of each run of a sweep: by its result.json, then its state.json, then SLURM, in this order of trust.

The files say how most runs are. SLURM is asked about runs that have not ended: it may still start them, or they have
died without writing anything. Nothing here loads a configuration or torch: a thousand runs are a second's work.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hpcdistill.data import held_out
from hpcdistill.sweep.logs import LoggedProgress, cause, read_progress
from hpcdistill.sweep.processes import is_alive
from hpcdistill.sweep.results import Found, RunResult, find_results
from hpcdistill.sweep.slurm_queue import Job, Queue
from hpcdistill.sweep.submissions import SKEW_S, Submission, epoch, read_submissions
from hpcdistill.sweep.task_folder import TaskFiles, read_task
from hpcdistill.training.records import read_result

if TYPE_CHECKING:  # half of the time that status takes to start
    from hpcdistill.sweep.plan import Plan

RunState = Literal["finished", "running", "queued", "failed", "stopped", "blocked", "missing"]
STATES: tuple[RunState, ...] = get_args(RunState)
SILENT_S = 300.0  # a run renews its lock every 30 s

_CANCELLED: dict[str, tuple[RunState, str]] = {
    "CANCELLED": ("stopped", "cancelled"),
    "PREEMPTED": ("stopped", "preempted, and not put into the queue again"),
    "REVOKED": ("stopped", "revoked"),
}
_ENDS = {
    "TIMEOUT": "its time was up before it had saved",
    "DEADLINE": "its deadline has passed",
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "its node was lost",
    "BOOT_FAIL": "its node did not start",
}


@dataclass(frozen=True)
class TaskStatus:
    """A run of a sweep at this moment."""

    key: str
    name: str
    state: RunState
    step: int | None = None
    steps: int | None = None
    rate: float | None = None  # steps/s
    left_s: float | None = None
    metric: tuple[str, float] | None = None  # of the last evaluation
    attempts: int = 0
    job: str | None = None  # SLURM's, 17_3
    reason: str | None = None  # one line
    log: Path | None = None
    run: Path | None = None  # its folder
    damaged: bool = False  # it has finished, and its result.json can no longer be read


def task_statuses(
    plan_or_keys: Plan | Iterable[str],
    folder: Path,
    runs: Path = Path("runs"),
    queue: Queue | None = None,
    submissions: list[Submission] | None = None,
    problems: list[str] | None = None,
    found: Found | None = None,
) -> list[TaskStatus]:
    """The status of every run of a plan, or of the runs with these keys, in their order.

    `folder` is the sweep's (sweeps/), `runs` where the run folders lie. Damaged files of a run make it `failed`, with
    the file in the reason; `problems` receives a line for each that belongs to no known run. `submissions` and `found`:
    what was read already.
    """
    planned: dict[str, Any] = {} if isinstance(plan_or_keys, Iterable) else plan_or_keys.runs
    keys = list(planned) if planned or not isinstance(plan_or_keys, Iterable) else list(plan_or_keys)
    if submissions is None:
        submissions, damaged = read_submissions(folder)
        if problems is not None:
            problems += damaged
    tasks = {key: read_task(folder / "tasks" / key) for key in keys}
    for submission in submissions:
        for key, job in submission.jobs.items():
            if key in tasks:
                tasks[key].jobs.append((submission, job))
    if found is None:
        found = _results_of(tasks.values(), runs)
    facts: dict[str, dict[str, Any]] = {}
    for submission in reversed(submissions):
        facts.update(submission.runs)
    evidence = _Evidence(folder, runs, found, queue or Queue(), submissions)
    unsettled = {key: task for key, task in tasks.items() if evidence.result_of(task) is None}
    evidence.ask(unsettled.values())
    statuses = []
    for key, task in tasks.items():
        plan = planned.get(key)
        fact = facts.get(key, {})
        name = str(getattr(plan, "name", None) or fact.get("name") or task.state.get("name") or key)
        steps = getattr(plan, "steps", None) or _integer(fact.get("steps"))
        statuses.append(evidence.status(task, name, steps))
    if problems is not None:
        named = {status.run.name for status in statuses if status.run}
        problems += [line for name, line in evidence.damaged.items() if name not in named]
    return statuses


def _results_of(tasks: Iterable[TaskFiles], runs: Path) -> Found:
    """The results below `runs` and, of tasks that have none there, in the folders that their own runs were put into."""
    found = find_results(runs, by_configuration=False) if runs.is_dir() else Found()
    elsewhere = {folder for task in tasks if task.key not in found.by_key and (folder := task.runs) is not None}
    folders = [folder for folder in sorted(elsewhere) if folder.is_dir() and folder.resolve() != runs.resolve()]
    if not folders:
        return found
    more = find_results(*folders, by_configuration=False)
    return Found(
        found.runs + more.runs,
        found.unreadable + more.unreadable,
        found.twice + more.twice,
        more.by_key | found.by_key,
    )


class _Evidence:
    """What the files and SLURM say, from which the state of each run follows."""

    def __init__(self, folder: Path, runs: Path, found: Found, queue: Queue, submissions: list[Submission]) -> None:
        self.folder, self.runs, self.queue = folder, runs, queue
        self.by_key = found.by_key
        self.damaged = {run.folder.name: run.line for run in found.unreadable}
        self.jobs: dict[str, Job] = {}
        self.host, self.now = socket.gethostname(), time.time()
        self.waiting_here: dict[str, tuple[float, str]] = {}  # since when, and what for
        for submission in submissions:
            if not (submission.local and set(submission.queue) - found.by_key.keys()):
                continue
            if self._runner_lives(submission):
                host, process = submission.local
                line = f"waits for the local runner, process {process} on {host}"
                for key in submission.queue:
                    self.waiting_here.setdefault(key, (submission.time, line))

    def _runner_lives(self, submission: Submission) -> bool:
        assert submission.local is not None
        host, process = submission.local
        if host == self.host:
            return is_alive(process, submission.time)
        return self.now - submission.last_sign() <= SILENT_S

    def ask(self, tasks: Iterable[TaskFiles]) -> None:
        """Ask SLURM about the jobs of runs that have no result."""
        ids, past = set[str](), set[str]()
        for task in tasks:
            own = {job for _, job in task.jobs} | ({task.job} if task.job else set())
            ids |= own
            ended = task.state.get("state") in ("failed", "stopped", "blocked")
            if not (ended and (not task.jobs or _began(task, *task.jobs[0]))):
                past |= own
        self.jobs = self.queue.ask(ids, past)

    def run_of(self, task: TaskFiles) -> Path | None:
        """Where the run is, by its state; found below `runs` when that was moved."""
        if not (said := task.state.get("run")):
            return None
        path = Path(str(said))
        return path if path.is_dir() else self.runs / path.name

    def result_of(self, task: TaskFiles) -> RunResult | None:
        """The finished run of a task."""
        if task.key in self.by_key:
            return self.by_key[task.key]
        run = self.run_of(task)
        if run is None or run.name in self.damaged:
            return None
        # A run of the same identity that another key, or none, has been written into.
        with contextlib.suppress(OSError, ValueError):
            content = read_result(run)
            return None if content is None else RunResult(run, None, content)
        return None

    def status(self, task: TaskFiles, name: str, steps: int | None) -> TaskStatus:
        log = task.log
        if finished := self.result_of(task):
            done = _integer(finished.result.get("steps")) or steps
            return TaskStatus(
                task.key,
                name,
                "finished",
                step=done,
                steps=done,
                metric=_final_metric(finished.result),
                attempts=task.attempts,
                job=task.job,
                log=log,
                run=finished.folder,
            )
        run_folder = self.run_of(task)
        damaged = run_folder is not None and run_folder.name in self.damaged
        if run_folder is not None and damaged:
            state: RunState = "failed"
            reason: str | None = self.damaged[run_folder.name]
        else:
            state, reason = self._unfinished(task, log)
        progress = read_progress(run_folder / "metrics.jsonl") if run_folder else LoggedProgress()
        steps = steps if steps is not None or progress.step is None else _integer(task.config("train").get("steps"))
        left = None
        if state == "running" and steps is not None and progress.step is not None and progress.rate:
            left = max(0, steps - progress.step) / progress.rate
        rate = progress.rate if state == "running" else None
        metric = self._metric(task, progress)
        job = next((job for submission, job in task.jobs if self._job(task, submission, job)), None) or task.job
        return TaskStatus(
            task.key,
            name,
            state,
            progress.step,
            steps,
            rate,
            left,
            metric,
            task.attempts,
            job,
            " ".join(reason.split()) if reason else None,
            log,
            run_folder,
            damaged,
        )

    def _unfinished(self, task: TaskFiles, log: Path | None) -> tuple[RunState, str | None]:
        """State and reason of a run without a result."""
        started = epoch(task.state.get("started"))
        own = self._own_job(task)
        known = [(job, self._job(task, submission, job)) for submission, job in task.jobs]
        if task.job and task.job not in dict(known):
            known.append((task.job, own))
        for number, (_, job) in enumerate(known):
            if job is not None and job.live and not (number and job.never_starts):  # one retried since may be left
                return self._live(task, job, log)
        newest = task.jobs[0] if task.jobs else None
        if task.damage:
            return "failed", task.damage
        if newest and not _began(task, *newest):
            return self._never_began(newest[1], known[0][1])
        since, line = self.waiting_here.get(task.key, (0.0, ""))
        if line and (started is None or started < since):
            return "queued", line
        said = task.state.get("state")
        if not task.state:
            return "missing", None
        if said == "finished":
            return "missing", f"finished once, but {task.state.get('run') or 'its run folder'} has no result.json now"
        if said == "running":
            return self._silent(task, own, log)
        if said not in ("failed", "stopped", "blocked"):
            return "failed", f"{task.folder / 'state.json'}: state {said!r} is unknown; delete the file"
        return said, self._why(task, log)

    def _live(self, task: TaskFiles, job: Job, log: Path | None) -> tuple[RunState, str | None]:
        """Of a job that SLURM runs or will run."""
        if job.never_starts:
            return "blocked", f"SLURM will never start job {job.id}: one that it waits for has failed; --cancel it"
        if job.waiting:
            if "held" in job.reason.lower() or job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
                return "queued", f"held ({job.reason or job.state}); `scontrol release {job.id}` lets it go"
            return "queued", job.reason or None
        ended = epoch(task.state.get("ended"))
        said = task.state.get("state")
        if task.job == job.id and not task.damage:
            if said == "running":
                return "running", "suspended" if job.state in ("SUSPENDED", "STOPPED") else None
            # Either the job is just ending, or it was requeued and its next attempt has not come as far.
            if said in ("failed", "stopped", "blocked") and ended and ended >= (job.started or 0):
                return said, self._why(task, log)
        return "running", "starting"

    def _never_began(self, job: str, known: Job | None) -> tuple[RunState, str]:
        """Of a submitted job that does not live and has written no state."""
        if known is None:
            if not self.queue.answers:
                return "queued", f"submitted as job {job}; SLURM does not answer here"
            return "missing", f"job {job} is gone from SLURM and never began; was it cancelled?"
        if known.never_starts:
            return "blocked", f"job {job} was cancelled by SLURM: one that it waited for has failed"
        if known.state in _CANCELLED:
            state, word = _CANCELLED[known.state]
            return state, f"job {job} was {word} before it began"
        detail = ", ".join(part for part in (known.state, known.reason) if part)
        return "failed", f"job {job} ended before the run began ({detail}); see the job's own log"

    def _silent(self, task: TaskFiles, job: Job | None, log: Path | None) -> tuple[RunState, str | None]:
        """Of a run that says it is running, without a live job: whether it is dead."""
        if job is not None:  # it has ended
            if job.state in _CANCELLED:
                state, word = _CANCELLED[job.state]
                return state, f"{word} (job {job.id})"
            word = _ENDS.get(job.state, "")
            return "failed", self._died(f"SLURM: {', '.join(p for p in (job.state, job.reason, word) if p)}", log)
        if task.job and self.queue.answers:
            return "failed", self._died(f"job {task.job} is gone", log)
        host, process = str(task.state.get("host")), task.state.get("pid")
        if not task.job and host == self.host and isinstance(process, int):
            if is_alive(process, epoch(task.state.get("started"))):
                return "running", None
            return "failed", self._died(f"process {process} is gone", log)
        if (silent := self._silence(task)) is not None and silent > SILENT_S:
            return "failed", self._died(f"no sign of life from {host} for {silent / 60:.0f} min", log)
        return "running", f"on {host}"

    def _silence(self, task: TaskFiles) -> float | None:
        """Seconds since the run's last sign of life: its own, else that of the process beside it."""
        run = self.run_of(task)
        for name in ("lock.json", "metrics.jsonl"):
            if run is not None:
                try:
                    return self.now - (run / name).stat().st_mtime
                except OSError:
                    continue
        signs = []
        for file in (task.log, task.folder / "state.json"):
            with contextlib.suppress(OSError):
                if file is not None:
                    signs.append(file.stat().st_mtime)
        return self.now - max(signs) if signs else None

    def _died(self, how: str, log: Path | None) -> str:
        last = cause(log) if log else None
        return f"died without a word ({how})" + (f"; last line of its log: {last}" if last else "")

    def _why(self, task: TaskFiles, log: Path | None) -> str | None:
        """The reason of an end: what state.json says, or the log where that took a line that says nothing."""
        message = str(task.state.get("message") or "")
        if task.state.get("state") != "failed" or message.startswith(("error: ", "killed by ")):
            return message.removeprefix("error: ") or None
        read = cause(log) if log else None
        code = task.state.get("code")
        return read or message or (f"exit code {code}" if code is not None else None)

    def _own_job(self, task: TaskFiles) -> Job | None:
        """The job that wrote state.json, if SLURM knows it."""
        for submission, number in task.jobs:
            if number == task.job:
                return self._job(task, submission, number)
        job = self.jobs.get(task.job or "")
        started = epoch(task.state.get("started"))
        if job is None or job.submitted is None or started is None:
            return job
        return job if job.submitted <= started + SKEW_S else None

    def _job(self, task: TaskFiles, submission: Submission, number: str) -> Job | None:
        job = self.jobs.get(number)
        return job if job is not None and submission.made(job) else None

    def _metric(self, task: TaskFiles, progress: LoggedProgress) -> tuple[str, float] | None:
        """The first metric of the test set that chooses the best weights."""
        if not progress.metrics:
            return None
        sets, held = task.config("data").get("eval"), task.config("data").get("held_out")
        first = held_out.NAME if held else next(iter(sets if isinstance(sets, dict) else {}), None)
        chosen = task.config("eval").get("select") or first
        name = next((name for name in progress.metrics if f"/{chosen}/" in name), next(iter(progress.metrics)))
        return name, progress.metrics[name]


def _final_metric(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """The last value of the metric that chose the best weights."""
    last, protocol = result.get("last"), result.get("protocol")
    metrics = last.get("metrics") if isinstance(last, dict) else None
    if not isinstance(metrics, dict) or not metrics:
        return None
    selects = protocol.get("selects") if isinstance(protocol, dict) else None
    name = str(selects) if selects in metrics else str(next(iter(metrics)))
    value = metrics[name]
    return (name, float(value)) if isinstance(value, float | int) else None


def _began(task: TaskFiles, submission: Submission, job: str) -> bool:
    """Whether state.json is of this job, or a later one; not of an earlier submission."""
    started = epoch(task.state.get("started"))
    # An earlier job of the same number, of a cluster since set up anew, was long before.
    return started is not None and started >= submission.time - (SKEW_S if task.job == job else 0)


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None
