"""What a process is told at its start: which rank it is, from the variables of torchrun, accelerate, submitit or a
plain `srun`; and which signals it is to ignore."""

from __future__ import annotations

import os
import re
import signal
import socket
import zlib
from collections.abc import Iterable, Mapping, MutableMapping

FIRST_PORT, PORTS = 20000, 12000  # below the ports that systems hand out by themselves (32768 and more)


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a job step of several tasks.

    Does nothing where a launcher has set RANK, and outside a job step: an sbatch script sees its job's number of
    tasks, too, but is one process.
    """
    step = environment.get("SLURM_STEP_ID")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or step is None or "SLURM_PROCID" not in environment or tasks < 2:
        return
    node = int(environment.get("SLURM_NODEID", "0"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(_tasks_of(node, environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))),
    )
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    environment.setdefault("MASTER_PORT", str(port_of(environment)))


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
    each: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        each += [int(count)] * int(times.rstrip(")") or 1)
    return each[node]


def rank() -> int:
    """This process's number in the run, 0 where no launcher says otherwise."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """The number of processes that the launcher has announced."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> str:
    """Host and process, and the SLURM job, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}" + (f" ({job()})" if job() else "")


def job() -> str | None:
    """`SLURM job 17`, with its array task where it is one; None outside SLURM."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"SLURM job {number}" + (f", {array}_{task}" if array and task else "")


def restart_count() -> int:
    """How often SLURM or torchrun has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def unignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of `signals` that this process may catch: one that it ignores was to be ignored by whoever started it.

    `nohup` does so with SIGHUP, a script with SIGINT in what it runs in the background.
    """
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
