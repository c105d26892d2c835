"""The runs of a plan on this machine: one a GPU, or n at a time on the CPU, teachers before their students."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcdistill.console import say, warn
from hpcdistill.errors import EXIT_FAILED, EXIT_STOPPED, plural
from hpcdistill.ranks.environment import of_outer_step, unignored
from hpcdistill.storage import CLONE
from hpcdistill.sweep.arrays import Selection
from hpcdistill.sweep.attempt import BEAT_S, Attempt, NotedSignals, teacher_run
from hpcdistill.sweep.logs import last_words
from hpcdistill.sweep.plan import Plan, PlannedRun
from hpcdistill.sweep.plan_view import say_left
from hpcdistill.sweep.profile import Profile
from hpcdistill.sweep.submission_folder import SubmissionFolder
from hpcdistill.sweep.submissions import HEARTBEAT
from hpcdistill.sweep.task_folder import TaskFolder, filled_in, write_tasks
from hpcdistill.sweep.together import Together, kind_of


@dataclass
class _Slot:
    """A place for one process at a time: of a run, or of several side by side."""

    gpu: str | None  # CUDA_VISIBLE_DEVICES of what runs there
    running: list[tuple[PlannedRun, Attempt]] = field(default_factory=list)


class Local:
    """Trains the chosen runs on this machine, `parallel` at a time. Making one writes the submission down."""

    def __init__(
        self,
        plan: Plan,
        selection: Selection,
        folder: Path,
        profile: Profile,
        parallel: int | None,
        collect: Sequence[str],
        command: Sequence[str],
        cells: int = 1,  # side by side in each process
    ) -> None:
        self.cells = cells
        self.plan, self.folder, self.profile, self.collect = plan, folder.absolute(), profile, collect
        self.waiting = list(selection.chosen)
        self.total, self.ended = len(self.waiting), list[str]()  # how many runs, and the state of each that has ended
        if profile.scratch:
            filled_in(profile.scratch)  # refused before anything is written
        gpus = visible_gpus() if self.waiting else []
        count = parallel or max(1, len(gpus))
        self.slots = [_Slot(gpus[number % len(gpus)] if gpus else None) for number in range(count)]
        self.where = f"GPU {', '.join(gpus)}" if gpus else f"the CPU, {count} at a time"
        say_left(selection, None)
        for key in selection.waits_for:
            warn(f"{plan.runs[key].name} is being trained elsewhere; its students are blocked until it has finished")
        if self.waiting:
            write_tasks(self.folder, plan, self.waiting)
            submission = SubmissionFolder(
                self.folder,
                plan,
                profile={"name": "local"},
                command=list(command),
                local={"host": socket.gethostname(), "pid": os.getpid()},
                queue=[run.key for run in self.waiting],
            )
            self._heartbeat, self._next_beat = submission.path / HEARTBEAT, 0.0
            self._beat()
            submission.save()

    def run(self) -> int:
        """The exit code. Ctrl-C stops everything, saved; again stops at once."""
        if not self.waiting:
            say("nothing to run")
            return self._collect()
        runs = plural(self.total, "run")
        say(f"{runs} on {self.where}; Ctrl-C stops them, saved; watch: python slurm/status.py")
        # What `nohup` or a script ignores stays ignored; but not SIGINT by the runs, which are stopped by it.
        noted = unignored((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        interrupts = NotedSignals(noted, {signal.SIGINT}.difference(noted))
        try:
            while (self.waiting and not interrupts.all) or any(slot.running for slot in self.slots):
                self._look_after(interrupts)
                time.sleep(0.2)
        finally:
            interrupts.restore()
            for slot in self.slots:
                for _, attempt in slot.running:
                    attempt.kill()
        counted = ", ".join(f"{self.ended.count(state)} {state}" for state in dict.fromkeys(self.ended))
        if interrupts.all:
            say(f"stopped: {counted or 'none started'}; the same command goes on from here")
            return EXIT_STOPPED
        say(f"done: {counted or 'none started'}")
        code = self._collect()
        return EXIT_FAILED if set(self.ended) != {"finished"} else code

    def _collect(self) -> int:
        """Make the tables of what there is."""
        say(f"collecting: python {shlex.join(self.collect)}")
        script = [sys.executable, str(CLONE / self.collect[0]), *self.collect[1:]]
        return subprocess.run(script, check=False).returncode

    def _beat(self) -> None:
        """Touch the file by which other hosts see that this process lives."""
        if (now := time.monotonic()) >= self._next_beat:
            self._next_beat = now + BEAT_S
            with contextlib.suppress(OSError):
                self._heartbeat.touch()

    def _look_after(self, interrupts: NotedSignals) -> None:
        """Pass signals on, note the runs that have ended, start others in their slots."""
        self._beat()
        if new := interrupts.new():
            if len(interrupts.all) == len(new):
                say("\nstopping: the runs save and end; Ctrl-C again stops at once")
            for _ in new:
                for slot in self.slots:
                    # Of runs in one process to one that has not ended, which passes it on.
                    living = (attempt for _, attempt in slot.running if attempt.poll() is None)
                    for attempt in itertools.islice(living, 1):
                        attempt.send(signal.SIGINT)
        for slot in self.slots:
            if not slot.running and not interrupts.all:
                self._fill(slot)
            for run, attempt in list(slot.running):
                if (code := attempt.poll()) is not None:
                    self._end(slot, run, attempt, code, bool(interrupts.all))

    def _fill(self, slot: _Slot) -> None:
        """Start the first run whose teacher neither waits nor runs, and beside it those of its kind."""
        while not slot.running and (first := self._next()):
            chosen, kind = [first], kind_of(first.loaded.config)
            if kind is not None and self.cells > 1:
                others = (run for run in self._ready() if kind_of(run.loaded.config) == kind)
                chosen += list(others)[: self.cells - 1]
            for run in chosen[1:]:
                self.waiting.remove(run)
            slot.running = [(run, attempt) for run in chosen if (attempt := self._begin(run, slot))]
            self._start(slot)

    def _ready(self) -> list[PlannedRun]:
        """The runs that wait for nothing but a place."""
        coming = {run.key for run in self.waiting} | {run.key for slot in self.slots for run, _ in slot.running}
        return [run for run in self.waiting if run.teacher not in coming]

    def _next(self) -> PlannedRun | None:
        ready = self._ready()
        if ready:
            self.waiting.remove(ready[0])
        return ready[0] if ready else None

    def _begin(self, run: PlannedRun, slot: _Slot) -> Attempt | None:
        """A new attempt of the run; None when its teacher has no result."""
        task = TaskFolder(self.folder / "tasks" / run.key)
        number = task.begin_attempt()
        attempt = Attempt(task, number, extra=self._extra(), environment=self._environment(slot), own_session=True)
        if run.teacher and teacher_run(task, run.teacher, Path.cwd()) is None:
            message = attempt.block(self.plan.runs[run.teacher].name, run.teacher)
            self.ended.append("blocked")
            warn(f"[{len(self.ended)}/{self.total}] {run.name} {run.key}: blocked: {message}")
            return None
        return attempt

    def _start(self, slot: _Slot) -> None:
        attempts = [attempt for _, attempt in slot.running]
        if len(attempts) > 1:
            Together(attempts, self._environment(slot), self._extra()).start()
        for attempt in attempts[: len(attempts) == 1]:
            attempt.start()
        for run, _ in slot.running:
            beside = f", {len(attempts)} side by side" if len(attempts) > 1 else ""
            say(f"{run.name} {run.key}: started" + (f" on GPU {slot.gpu}" if slot.gpu else "") + beside)

    def _extra(self) -> list[str]:
        scratch = self.profile.scratch
        return [f"data.stage={filled_in(scratch)}"] if scratch else []

    def _end(self, slot: _Slot, run: PlannedRun, attempt: Attempt, code: int, interrupted: bool) -> None:
        state = attempt.end(code, interrupted)
        self.ended.append(state)
        line = f"[{len(self.ended)}/{self.total}] {run.name} {run.key}: {state}"
        if state == "failed":
            warn(f"{line}: {last_words(attempt.log)} (log: {attempt.log})")
        else:
            say(line)
        slot.running.remove((run, attempt))

    def _environment(self, slot: _Slot) -> dict[str, str]:
        outer = of_outer_step(os.environ)  # of `srun`, inside a job: each run would take itself for a rank of that step
        environment = {name: value for name, value in os.environ.items() if name not in outer}
        environment |= {name: os.path.expandvars(value) for name, value in self.profile.environment.items()}
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        elif len(self.slots) > 1:  # or each run would start a thread for each core
            cores = len(os.sched_getaffinity(0))  # those of this job, not the node's
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(self.slots))))
        return environment


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them."""
    import torch  # seconds, which a submission to SLURM does without

    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return chosen[:count] if chosen else [str(number) for number in range(count)]
