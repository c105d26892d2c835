"""What a process is told at its start: which rank it is, from the variables of torchrun, accelerate, submitit or a
plain `srun`; whether its launcher has started all ranks; and which signals it is to ignore."""

from __future__ import annotations

import os
import re
import signal
import zlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

from hpcdistill.errors import UserError

FIRST_PORT, PORTS = 20000, 12000  # below the ports that systems hand out by themselves (32768 and more)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# What a job's processes have from SLURM, its MPI plugin and submitit; SLURM also reads some of it as options.
_OF_A_JOB = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMI2_", "PMIX_", "SUBMITIT_")
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "PMIX_MCA_")  # how SLURM and MPI are reached: no job's own
# What tells one process of a job from the others: the step, the place in it, and what it is bound to.
_OF_A_STEP = (
    *("SLURM_STEP", "SLURM_SRUN_", "SLURM_LAUNCH_", "SLURM_CPU_BIND", "SLURM_MEM_BIND", "SRUN_", "SUBMITIT_"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("PMI_", "PMI2_", "PMIX_"),
)


def number(name: str, default: int, *, least: int = 0, environment: Mapping[str, str] | None = None) -> int:
    """The whole number in the variable `name`; `default` where it is unset or empty. UserError for anything else."""
    text = (os.environ if environment is None else environment).get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"the environment variable {name} is '{text}', not a whole number{f' from {least} on' if least else ''}; "
            "a launcher (torchrun, accelerate launch, srun) sets it: unset it, or start the run with one"
        )
    return int(text)


def check_ranks() -> None:
    """UserError where the variables that say who this process is are no numbers, or do not fit together."""
    port, own, among, _, _ = number("MASTER_PORT", 1), rank(), ranks(), local_rank(), ranks_here()
    if "WORLD_SIZE" in os.environ and own >= among:
        raise UserError(
            f"the environment variable RANK is {own} and WORLD_SIZE {among}: ranks are numbered from 0 on; "
            "unset both, or start the run with torchrun, accelerate launch or srun"
        )
    if port >= 1 << 16:
        raise UserError(f"the environment variable MASTER_PORT is {port}; ports end at 65535: set it to a free one")


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a job step of several tasks.

    Does nothing where a launcher has set RANK, and outside a job step: an sbatch script sees its job's number of
    tasks, too, but is one process.
    """
    step = environment.get("SLURM_STEP_ID")
    tasks = number("SLURM_STEP_NUM_TASKS", 1, environment=environment)
    if "RANK" in environment or step is None or "SLURM_PROCID" not in environment or tasks < 2:
        return
    node = number("SLURM_NODEID", 0, environment=environment)
    environment.update(
        RANK=str(number("SLURM_PROCID", 0, environment=environment)),
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=str(number("SLURM_LOCALID", 0, environment=environment)),
        LOCAL_WORLD_SIZE=str(_tasks_of(node, environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))),
    )
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    environment.setdefault("MASTER_PORT", str(port_of(environment)))


def of_outer_job(environment: Mapping[str, str]) -> set[str]:
    """The variables in `environment` that a job submitted from here must not have.

    Everywhere a launcher's ranks; inside a SLURM job also what that job is. sbatch hands its whole environment on, and
    `srun` in the new job takes SLURM_CPU_BIND and the like for options: its ranks would be bound to the outer job's
    cores. On a login node all of SBATCH_* and SLURM_* is the user's own, and stays.
    """
    names = {name for name in RANK_VARIABLES if name in environment}
    if "SLURM_JOB_ID" in environment:
        names |= {name for name in environment if name.startswith(_OF_A_JOB) and not name.startswith(_OF_THE_SITE)}
        names |= {name for name in _DEVICES if name in environment}
    return names


def of_outer_step(environment: Mapping[str, str]) -> set[str]:
    """The variables in `environment` that a run of its own, started here as one process, must not have.

    It belongs to the same SLURM job, which its lock names, but it is none of the tasks of the step around it.
    """
    own = {name for name in environment if name.startswith(_OF_A_STEP) and not name.startswith(_OF_THE_SITE)}
    return own | {name for name in RANK_VARIABLES if name in environment}


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: node[03-05,9],x1 -> node03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def port_of(environment: Mapping[str, str]) -> int:
    """A port that two jobs, two steps of a job and two attempts of a step on a shared node do not have in common."""
    parts = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return FIRST_PORT + zlib.crc32("/".join(environment.get(part, "") for part in parts).encode()) % PORTS


def _tasks_of(node: int, counts: str) -> int:
    """Tasks on the node numbered `node`, from SLURM's short form: 2(x3),1 -> 2, 2, 2, 1."""
    for count, times in re.findall(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", counts):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    raise UserError(f"the environment variable SLURM_STEP_TASKS_PER_NODE is '{counts}', without this node; use srun")


def rank() -> int:
    """This process's number in the run, 0 where no launcher says otherwise."""
    return number("RANK", 0)


def ranks() -> int:
    """The number of processes that the launcher has announced."""
    return number("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """This process's number on its node."""
    return number("LOCAL_RANK", 0)


def ranks_here() -> int:
    """The number of processes on this node."""
    return number("LOCAL_WORLD_SIZE", 1, least=1)


def job() -> str | None:
    """`SLURM job 17`, with its array task where it is one; None outside SLURM."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"SLURM job {number}" + (f", {array}_{task}" if array and task else "")


def restart_count() -> int:
    """How often SLURM or torchrun has started this job again."""
    return number("SLURM_RESTART_COUNT", number("TORCHELASTIC_RESTART_COUNT", 0))


def unignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of `signals` that this process may catch: one that it ignores was to be ignored by whoever started it.

    `nohup` does so with SIGHUP, a script with SIGINT in what it runs in the background.
    """
    return [one for one in signals if signal.getsignal(one) is not signal.SIG_IGN]


def check_launcher(module: str) -> None:
    """Raise UserError when a launcher was asked for several processes and one was started, which runs `module`.

    `accelerate launch` does so silently with `--cpu`: without an MPI launcher its `--num_processes` is ignored. And
    SLURM starts an sbatch script once, however many tasks it has.
    """
    if ranks() > 1:
        return
    import psutil  # 11 ms, which every command would pay

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
