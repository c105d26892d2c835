"""What a SLURM job of a sweep runs: submitit calls `Task`, once a rank, which starts the plain command and waits.

The job's script puts it into the queue again when it ends with code 75 (`REQUEUE`): outside a container, after all
ranks have gone, and only for a run that was stopped in good order or has lost a rank (it has a checkpoint).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from submitit.core.utils import DelayedSubmission
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from hpcdistill.console import err
from hpcdistill.errors import EXIT_RANK_LOST, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from hpcdistill.ranks.environment import RANK_VARIABLES, port_of, restart_count
from hpcdistill.storage import read_json, write_json
from hpcdistill.sweep.attempt import Attempt, NotedSignals, teacher_run
from hpcdistill.sweep.task_folder import START, TaskFolder, filled_in

EXIT_CANCELLED = 128 + signal.SIGTERM
AGREE_SECONDS = 600.0
_SAID: TypeAdapter[dict[str, str | int | None]] = TypeAdapter(dict[str, str | int | None])
# An array's own id would requeue all of its tasks, and its last task has that very id.
REQUEUE = (
    "code=$?",
    "if [ $code = 75 ]; then",
    "    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    '    scontrol requeue "${job:-$SLURM_JOB_ID}" || echo "not requeued; submit the sweep again to go on" >&2',
    "fi",
    "exit $code",
)


@dataclass(frozen=True)
class Task:
    """One run of a sweep; pickled by submitit. Ends with the run's own exit code."""

    folder: Path  # tasks/<key>
    cwd: Path  # paths in the configuration are relative to it
    teacher: str | None = None  # key of the run that must have finished
    scratch: str | None = None  # data.stage, variables of the job not yet filled in
    requeues: int = 0  # how often the job may be put into the queue again

    def __call__(self) -> str:
        received = NotedSignals((signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
        here = SlurmJobEnvironment()
        rank, ranks = here.global_rank, here.num_tasks
        folder = TaskFolder(self.folder)
        try:
            os.environ.update(folder.environment())  # teachers are looked up here, too
            folder.values()
        except UserError as error:
            # Into the job's log: there is nothing to write a state with.
            err.print(f"error: {error}", markup=False, soft_wrap=True)
            sys.exit(EXIT_USER_ERROR)
        number = self._agree(folder, here.job_id, rank, ranks)
        if number is None:
            return "blocked"
        self._export_ranks(ranks)
        try:
            extra = [f"data.stage={filled_in(self.scratch)}"] if self.scratch else []
        except UserError as error:
            Attempt(folder, number, rank=rank, job=here.job_id, cwd=self.cwd).refuse(str(error))
            sys.exit(EXIT_USER_ERROR)
        attempt = Attempt(folder, number, rank=rank, job=here.job_id, extra=extra, cwd=self.cwd)
        attempt.start()
        while (code := attempt.poll()) is None:
            for signalled in received.new():
                attempt.send(signalled)
            time.sleep(0.2)
        message = None
        stopped = code == EXIT_STOPPED or (code != 0 and bool(received.all))
        # SIGTERM alone is scancel, or a preemption, after which SLURM itself requeues.
        again = stopped and set(received.all) != {signal.SIGTERM}
        if again and restart_count() >= self.requeues:
            again, message = False, f"stopped, and has been in the queue {restart_count() + 1} times; submit again"
        # The ranks that are left end with this code, the lost one of a signal, and srun with the larger of them. A run
        # of one rank that was killed has its checkpoint, too.
        lost = not stopped and (code == EXIT_RANK_LOST or code < 0)
        again = again or (lost and restart_count() < self.requeues)
        state = attempt.end(code, bool(received.all), message, again)
        if state == "finished":
            return state
        if stopped or again:
            sys.exit(EXIT_STOPPED if again else EXIT_CANCELLED)
        sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> DelayedSubmission:
        """For submitit, when its signal comes before `__call__` has its own handlers: simply again."""
        return DelayedSubmission(self)

    def _agree(self, folder: TaskFolder, job: str, rank: int, ranks: int) -> int | None:
        """The attempt's number, None when the run is blocked: rank 0 decides, the others wait for what it says."""
        mark: dict[str, Any] = {"job": job, "restart": restart_count()}
        if rank == 0:
            number: int | None = folder.begin_attempt()
            assert number is not None
            if self.teacher and teacher_run(folder, self.teacher, self.cwd) is None:
                teacher = TaskFolder(folder.path.parent / self.teacher)
                name = teacher.values()["name"] if teacher.config.is_file() else "run"
                Attempt(folder, number, job=job, cwd=self.cwd).block(name, self.teacher)
                number = None
            if ranks > 1:
                write_json(folder.path / START, {**mark, "number": number})
            return number
        deadline = time.monotonic() + AGREE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                said = read_json(folder.path / START, _SAID, "it is written at each start")
                if {name: said[name] for name in mark} == mark:
                    agreed = said["number"]
                    return agreed if isinstance(agreed, int) else None
            time.sleep(0.2)
        raise TimeoutError(f"rank 0 has said nothing in {folder.path / START} for {AGREE_SECONDS:.0f} s")

    def _export_ranks(self, ranks: int) -> None:
        """Which rank this is, for torch; nothing where it is the only one, which is then trained as anywhere else."""
        for name in RANK_VARIABLES:  # of the shell that has submitted
            os.environ.pop(name, None)
        if ranks > 1:
            os.environ["MASTER_PORT"] = str(port_of(os.environ))  # another one at each attempt
            TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)


@dataclass(frozen=True)
class Command:
    """A command as a job of its own: what collects the results, last."""

    command: tuple[str, ...]
    cwd: Path
    log: Path

    def __call__(self) -> str:
        with open(self.log, "ab") as log:
            log.write(f"$ {shlex.join(self.command)}\n".encode())
            log.flush()
            command = [sys.executable, *self.command]
            code = subprocess.run(command, cwd=self.cwd, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            sys.exit(code)
        return "finished"
