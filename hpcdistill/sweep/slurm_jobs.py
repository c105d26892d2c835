"""Submits a sweep to SLURM: from a profile to sbatch's options, the job scripts, the arrays, a copy of the code."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpcdistill.console import say, warn
from hpcdistill.errors import UserError, plural
from hpcdistill.ranks.environment import job, of_outer_job
from hpcdistill.run import relative_place
from hpcdistill.storage import CLONE
from hpcdistill.sweep.arrays import Array, Selection, make_arrays
from hpcdistill.sweep.plan import Plan
from hpcdistill.sweep.profile import Profile, Shape
from hpcdistill.sweep.submission_folder import SubmissionFolder
from hpcdistill.sweep.task import REQUEUE, Command, Task
from hpcdistill.sweep.task_folder import write_tasks
from hpcdistill.training.run_folder import code_revision, git_in

ARRAY_SIZE = 1001  # SLURM's default MaxArraySize


def submit_sweep(
    plan: Plan,
    selection: Selection,
    jobs: JobMaker,
    parallel: int,
    folder: Path,
    collect: Sequence[str],
    command: Sequence[str],
) -> None:
    """Submit the chosen runs, then the job that runs `collect`. plan.json is written after each array that SLURM took.

    `folder` is the sweep's; `command` is the user's command line, for `status.py --retry`.
    """
    profile, here = jobs.profile, Path.cwd()
    described = {"name": jobs.profile_name, **profile.model_dump(mode="json")}
    submission = SubmissionFolder(folder, plan, profile=described, command=list(command))
    write_tasks(folder, plan, selection.chosen)
    if profile.snapshot:
        jobs.code = snapshot_code(submission.path / "code")
    arrays = make_arrays(selection, profile, largest_array(profile), parallel)
    if ignored := ignored_options():
        warn(ignored)
    ids: list[str] = []
    submission.save()
    for array in arrays:
        calls = [
            Task(folder / "tasks" / run.key, here, run.teacher, profile.scratch, profile.requeues) for run in array.runs
        ]
        dependency = array.dependency(ids)
        keys = [run.key for run in array.runs]
        with undisturbed():
            tasks = jobs.submit(array, dependency, submission.path / "jobs" / array.name, calls)
            ids.append(tasks[0].partition("_")[0])
            submission.add_array(array.name, ids[-1], dependency, dict(zip(keys, tasks, strict=True)))
        waits = f", {dependency}" if dependency else ""
        say(f"{array.name}: job {ids[-1]}, {plural(len(tasks), 'run')}, {array.shape}{waits}")
    place = here
    if profile.snapshot:  # the configurations of the copy too, if they are all in it
        lacking = needs_folder(plan, jobs.code) if here == CLONE else str(here)
        if lacking:
            say(f"snapshot: {lacking} is not in it; the tables will be made with the configurations as they are then")
        else:
            place = jobs.code
    log = submission.path / "collect.log"
    call = Command((str(jobs.code / collect[0]), *collect[1:]), place, log)
    with undisturbed():
        last = jobs.submit_last(call, "afterany:" + ":".join(ids), submission.path / "jobs" / "collect")
        submission.note(collector=last)
    say(f"collect: job {last}, after all of them; its log {log}")
    say(f"submitted {plural(len(selection.chosen), 'run')} ({submission.path}); watch: python slurm/status.py")


class JobMaker:
    """Submits with one profile; `code` is the folder that hpcdistill is imported from."""

    def __init__(self, profile: Profile, profile_name: str, code: Path = CLONE) -> None:
        self.profile, self.profile_name, self.code = profile, profile_name, code

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
            "job_name": f"hpcdistill-{name}",
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
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a job that sbatch has taken is written down; sbatch itself is not cut off either."""
    pressed: list[int] = []
    # The mask is for sbatch, which inherits it; another thread of this process may take the signal all the same.
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if pressed and handler is not signal.SIG_IGN:
        raise KeyboardInterrupt


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


def snapshot_code(destination: Path) -> Path:
    """Copy the clone's files, but those that git ignores, into `destination`, which the jobs then run."""
    git = [*git_in(CLONE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, timeout=60).stdout.decode().split("\0")
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"snapshot: {CLONE} is not a git clone; set snapshot: false in the profile") from None
    for name in filter(None, listed):
        source, target = CLONE / name, destination / name
        if source.is_file():  # not one that was deleted and not committed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (destination / "REVISION").write_text(f"{code_revision() or 'unknown'}\n")
    return destination


def needs_folder(plan: Plan, code: Path) -> str | None:
    """The first configuration or data folder of `plan` that is relative to this folder and not in the copy `code`."""
    for run in plan.runs.values():
        for loaded in (run.loaded, *(teacher.run for teacher in run.loaded.teachers.values())):
            if loaded is None:
                continue
            for file in loaded.files:
                if not file.is_absolute() and not (code / file).is_file():
                    return str(file)
            data = loaded.config.data
            for place in (*data.train, *data.eval.values()):
                if relative_place(place) == str(Path(place).absolute()) != place:
                    return place  # its key has the whole path, which would be another one in the copy
    return None


def _double_quoted(text: str) -> str:
    r"""`text` for the shell, in which $X (and \$ for the sign itself) is all that means something."""
    return '"' + re.sub(r'(\\(?!\$)|["`])', r"\\\1", text) + '"'


def _complaint(text: str) -> str:
    """The lines of sbatch in submitit's message."""
    lines = [line.strip() for line in text.splitlines() if "sbatch: " in line]
    said = "; ".join(line.partition("sbatch: ")[2].removeprefix("error: ") for line in lines)
    return said or text.strip() or "it gave no reason"
