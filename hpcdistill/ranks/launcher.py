"""Whether the launcher has started as many processes as it was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import psutil

from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import ranks


def check_launcher(module: str) -> None:
    """Raise UserError when a launcher was asked for several processes and one was started, which runs `module`.

    `accelerate launch` does so silently with `--cpu`: without an MPI launcher its `--num_processes` is ignored. And
    SLURM starts an sbatch script once, however many tasks it has.
    """
    if ranks() > 1:
        return
    if tasks := tasks_without_srun(os.environ):
        raise UserError(
            f"SLURM gave this job {tasks} tasks, and the command was started once; put `srun` in front of it, "
            "or ask for --ntasks=1 (with --cpus-per-task for more cores)"
        )
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:  # gone, or another user's: nothing to compare with
        return
    asked = asked_processes(command)
    if asked > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one (--cpu ignores --num_processes); "
            f"use `torchrun --nproc-per-node {asked} -m {module} ...`"
        )


def tasks_without_srun(environment: Mapping[str, str]) -> int:
    """The tasks of a SLURM job whose script (or salloc's shell) runs a command without `srun`; 0 when there is no more
    than one."""
    interactive = "4294967290"  # the step that salloc's shell is, where a cluster makes it one
    in_step = environment.get("SLURM_STEP_ID", interactive) != interactive
    if "SLURM_JOB_ID" not in environment or in_step or "RANK" in environment:
        return 0
    tasks = environment.get("SLURM_NTASKS", "1")
    return int(tasks) if tasks.isdigit() and int(tasks) > 1 else 0


def asked_processes(command: Sequence[str]) -> int:
    """The number of processes in an `accelerate launch` command line; 1 for any other command."""
    launches = any(part.endswith(("accelerate", "accelerate-launch", "accelerate.commands.launch")) for part in command)
    if not launches:
        return 1
    for position, part in enumerate(command):
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or (command[position + 1] if position + 1 < len(command) else "")
            return int(value) if value.isdigit() else 1
    return 1
