"""From a profile to submitit: sbatch's options, the job script and the submission of arrays."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import job, of_outer_job
from hpcdistill.sweep.arrays import Array
from hpcdistill.sweep.profile import Profile, Shape
from hpcdistill.sweep.task import REQUEUE

ARRAY_SIZE = 1001  # SLURM's default MaxArraySize


class JobMaker:
    """Submits with one profile; `code` is the folder that hpcdistill is imported from."""

    def __init__(self, profile: Profile, profile_name: str, code: Path, sweep: str) -> None:
        self.profile, self.profile_name, self.code, self.sweep = profile, profile_name, code, sweep

    def script(self, array: Array, dependency: str | None, folder: Path) -> str:
        """The script that sbatch would be given; nothing is asked or written."""
        executor = _Unsubmitted(folder, python=self.profile.python)
        executor.update_parameters(**self.parameters(array, dependency))
        if len(array.runs) > 1:
            executor.parameters["map_count"] = len(array.runs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(
        self, array: Array, dependency: str | None, folder: Path, calls: Sequence[Callable[[], Any]]
    ) -> list[str]:
        """Submit `calls` as one array; the job id of each (17_0, 17_1, ...)."""
        parameters = self.parameters(array, dependency)
        jobs = self._submitted(folder, self.profile.requeues, parameters, calls)
        return [str(job.job_id) for job in jobs]

    def submit_last(self, call: Callable[[], Any], dependency: str | None, folder: Path) -> str:
        """Submit the job that collects."""
        asked = self.profile.collect
        shape = Shape(gpus_per_node=0, cpus_per_task=asked.cpus, memory=asked.memory, hours=asked.hours)
        parameters = self._common(shape, "collect", dependency) | {"stderr_to_stdout": True}
        if asked.partition:
            parameters["partition"] = asked.partition
        parameters["additional_parameters"] |= {"requeue": True}
        [job] = self._submitted(folder, 1, parameters, [call])
        return str(job.job_id)

    def parameters(self, array: Array, dependency: str | None) -> dict[str, Any]:
        """submitit's parameters of the runs' jobs."""
        profile, shape = self.profile, array.shape
        parameters = self._common(shape, array.name, dependency)
        if shape.gpus_per_node:
            # By node, not by task: each rank then sees all GPUs of its node, which NCCL copies between, and takes one.
            parameters["gpus_per_node"] = shape.gpus_per_node
        parameters["array_parallelism"] = array.parallel
        parameters["signal_delay_s"] = profile.signal_seconds
        parameters["additional_parameters"] |= {"requeue" if profile.requeue else "no-requeue": True}
        if array.paired:  # else the task of a teacher that failed would be in the queue for ever
            parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        parameters["additional_parameters"] |= profile.sbatch
        if profile.requeue:
            parameters["teardown"] = list(REQUEUE)
        return parameters

    def _common(self, shape: Shape, name: str, dependency: str | None) -> dict[str, Any]:
        profile = self.profile
        # From SLURM 22.05 on srun does not take --cpus-per-task from the job. --wait: stopped ranks do not end in the
        # same instant, and the first would have the others killed.
        steps = [f"--cpus-per-task={shape.cpus_per_task}", "--kill-on-bad-exit=0", "--wait=60"]
        parameters: dict[str, Any] = {
            "job_name": f"{self.sweep}-{name}",
            "time": max(1, round(shape.hours * 60)),
            "nodes": shape.nodes,
            "ntasks_per_node": shape.tasks,
            "cpus_per_task": shape.cpus_per_task,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "dependency": dependency,
            "mem": f"{round(shape.memory * 1024)}M" if shape.memory else None,
            "wckey": None,
            "stderr_to_stdout": True,
            "srun_args": steps,
            "additional_parameters": {},
            "setup": [
                *profile.setup,
                *(f"export {name}={_double_quoted(value)}" for name, value in profile.environment.items()),
                # Libraries would otherwise start a thread for each core of the node in every task.
                "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
                # This code and no other, wherever the job's folder is.
                f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            ],
        }
        return parameters

    def _submitted(
        self, folder: Path, requeues: int, parameters: dict[str, Any], calls: Sequence[Callable[[], Any]]
    ) -> list[Any]:
        folder.mkdir(parents=True)  # a new one: cluster set up anew counts jobs from 1, and old files would be taken
        executor = SlurmExecutor(folder, max_num_timeout=requeues, python=self.profile.python)
        executor.update_parameters(**parameters)
        try:
            with as_on_a_login_node():
                return list(executor.submit_array(list(calls)))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            said = _complaint(str(error))
            if "Invalid job array specification" in said:
                said += f"; an array of {len(calls)} tasks is too large here: set a smaller `array:` in the profile"
            raise UserError(f"{self.profile_name}: sbatch refused: {said}") from None


class _Unsubmitted(SlurmExecutor):
    """An executor that makes scripts on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


@contextlib.contextmanager
def as_on_a_login_node() -> Iterator[None]:
    """Without the variables of the job that this process may be part of: sbatch gives the new one all that is left."""
    outer = {name: os.environ.pop(name) for name in of_outer_job(os.environ)}
    try:
        yield
    finally:
        os.environ.update(outer)


def ignored_options() -> str | None:
    """One line that names the SBATCH_* which do not hold because this is inside a job; None where there are none."""
    names = [name for name in of_outer_job(os.environ) if name.startswith("SBATCH_") and "_BIND" not in name]
    if not names:
        return None
    return f"submitted from inside {job()}: {', '.join(sorted(names))} not passed on; the profile's keys say the same"


def check_slurm() -> None:
    """UserError when this machine has no SLURM to submit to."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"no SLURM on this machine (no {missing[0]}); give --local to run the sweep here, --dry-run to look at it, "
            "or submit on a login node of your cluster"
        )


def largest_array(profile: Profile) -> int:
    """Tasks that an array can have: the profile's, else the cluster's MaxArraySize and max_array_tasks."""
    if profile.array:
        return profile.array
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    limits = re.findall(
        r"^MaxArraySize\s*=\s*(\d+)|^SchedulerParameters\s*=.*\bmax_array_tasks=(\d+)", shown, re.MULTILINE
    )
    return max(1, min((int(size or tasks) for size, tasks in limits), default=ARRAY_SIZE))


def _double_quoted(text: str) -> str:
    r"""`text` for the shell, in which $X (and \$ for the sign itself) is all that means something."""
    return '"' + re.sub(r'(\\(?!\$)|["`])', r"\\\1", text) + '"'


def _complaint(text: str) -> str:
    """The lines of sbatch in submitit's message."""
    lines = [line.strip() for line in text.splitlines() if "sbatch: " in line]
    said = "; ".join(line.partition("sbatch: ")[2].removeprefix("error: ") for line in lines)
    return said or text.strip() or "it gave no reason"
