"""Who a process is under SLURM: from what SLURM 22.05 was seen to set, in each way to start a command."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hpcdistill import train
from hpcdistill.command import run_command
from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import (
    adopt_slurm,
    asked_processes,
    first_host,
    job,
    of_outer_job,
    of_outer_step,
    port_of,
    restart_count,
    tasks_without_srun,
)

# Printed on a cluster of two nodes; of the second task where there are two.
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "hd[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
STEP = JOB | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "hd[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_SRUN_COMM_PORT": "38509",
}
SALLOC = JOB | {"SLURM_NTASKS": "2"}
NESTED = STEP | {
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "hd2",
}
INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
PARTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(environment: dict[str, str]) -> dict[str, str]:
    environment = dict(environment)
    adopt_slurm(environment)
    return environment


def test_a_task_of_srun() -> None:
    found = adopted(STEP)
    assert [found[name] for name in PARTS] == ["1", "2", "0", "1", "hd1"]
    assert found["MASTER_PORT"] == adopted(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"]


@pytest.mark.parametrize("node", range(5))
def test_tasks_a_node(node: int) -> None:
    counts = {"SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1,2"}
    found = adopted(STEP | counts | {"SLURM_PROCID": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": str(node)})
    assert found["LOCAL_WORLD_SIZE"] == "22212"[node]
    assert found["LOCAL_RANK"] == "1"
    assert found["WORLD_SIZE"] == "9"


@pytest.mark.parametrize("environment", [BATCH, SALLOC, NESTED, INTERACTIVE, {}], ids=str)
def test_one_process(environment: dict[str, str]) -> None:
    assert adopted(environment) == environment


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "x"}, "RANK is 'x', not a whole number"),
        ({"RANK": "-1"}, "RANK is '-1', not a whole number"),
        ({"RANK": "1.0"}, "RANK is '1.0', not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a whole number from 1 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2: ranks are numbered from 0 on"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'"),
        ({"LOCAL_WORLD_SIZE": "a"}, "LOCAL_WORLD_SIZE is 'a'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; ports end at 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two'"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        (STEP | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'"),
        (STEP | {"SLURM_NODEID": "x"}, "SLURM_NODEID is 'x'"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "some"}, "SLURM_STEP_TASKS_PER_NODE is 'some'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variable_that_is_no_number_ends_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], named: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: pytest.fail("the command was started"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: the environment variable {named}")
    assert len(said.splitlines()) == 1


def test_a_name_that_is_too_long_for_the_system_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: (tmp_path / ("n" * 300)).mkdir())
    assert ended.value.code == 2
    assert "longer than the file system takes; choose a shorter one" in capsys.readouterr().err


def test_a_launcher_comes_first() -> None:
    """torchrun in a task of srun."""
    launched = STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    assert adopted(launched) == launched


def test_an_address_of_the_user_stays() -> None:
    found = adopted(STEP | {"MASTER_ADDR": "ib1", "MASTER_PORT": "29501"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["RANK"]) == ("ib1", "29501", "1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a[01-03,07],b1", "a01"),
        ("node-43817-[1-2]", "node-43817-1"),
        ("n1", "n1"),
        ("n1,n3", "n1"),
        ("n3,a[01-03]", "n3"),
        ("a[7,9],b[1-2]", "a7"),
        ("r[1-2]n[1-4]-ib", "r1n1-ib"),
        ("gpu[003].cluster", "gpu003.cluster"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ports_of_jobs_steps_and_restarts_differ() -> None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    neighbours = [("17", "0", ""), ("18", "0", ""), ("17", "1", ""), ("17", "0", "1"), ("1", "70", "")]
    ports = [port_of(dict(zip(names, one, strict=True))) for one in neighbours]
    assert len(set(ports)) == len(ports)
    many = [port_of({"SLURM_JOB_ID": str(number), "SLURM_STEP_ID": "0"}) for number in range(1000)]
    assert all(20000 <= port < 32768 for port in many)
    assert len(set(many)) > 900  # as many as chance leaves


@pytest.mark.parametrize(
    ("environment", "tasks"),
    [
        (BATCH, 2),
        (SALLOC, 2),
        (INTERACTIVE, 2),
        (STEP, 0),
        (NESTED, 0),
        (BATCH | {"SLURM_NTASKS": "1"}, 0),
        (BATCH | {"RANK": "0"}, 0),
        ({"SLURM_NTASKS": "2"}, 0),
        ({}, 0),
    ],
    ids=str,
)
def test_tasks_without_srun(environment: dict[str, str], tasks: int) -> None:
    assert tasks_without_srun(environment) == tasks


def test_job_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (job(), restart_count()) == (None, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert job() == "SLURM job 17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert job() == "SLURM job 17, 12_5"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restart_count() == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert restart_count() == 1


# What a user or a site sets, and what SLURM and its MPI plugin give a task of `srun --mem-per-cpu=300 --gpus=1`.
OWN = {
    "PATH": "/bin",
    "SLURM_CONF": "/etc/x.conf",
    "SLURM_CLUSTERS": "b",
    "PMIX_MCA_gds": "hash",
    "HPCDISTILL_DATA": "d",
}
GIVEN = STEP | {
    **{"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1", "SLURM_MEM_PER_CPU": "300"},
    **{"SLURM_GPUS": "1", "CUDA_VISIBLE_DEVICES": "0", "SLURMD_NODENAME": "hd1", "SRUN_DEBUG": "3", "PMI_RANK": "1"},
    **{"SBATCH_MEM_BIND": "local", "SALLOC_PARTITION": "high", "SUBMITIT_EXECUTOR": "slurm", "PMIX_RANK": "1"},
}


def test_a_job_submitted_inside_another_has_nothing_of_it() -> None:
    assert of_outer_job(OWN | GIVEN) == set(GIVEN)


def test_on_a_login_node_what_is_set_for_slurm_stays() -> None:
    set_there = {"SBATCH_ACCOUNT": "lab", "SLURM_CPU_BIND": "none", "CUDA_VISIBLE_DEVICES": "1", "SALLOC_QOS": "low"}
    assert of_outer_job(OWN | set_there) == set()
    assert of_outer_job(OWN | set_there | {"RANK": "1", "MASTER_PORT": "2"}) == {"RANK", "MASTER_PORT"}


@pytest.mark.parametrize("around", [GIVEN, STEP, BATCH, SALLOC, INTERACTIVE, NESTED], ids=str)
def test_a_run_of_its_own_inside_a_job_is_no_rank_of_it(around: dict[str, str]) -> None:
    environment = OWN | around | {"RANK": "1", "LOCAL_RANK": "1"}
    left = {name: value for name, value in environment.items() if name not in of_outer_step(environment)}
    assert adopted(left) == left, "one process"
    assert tasks_without_srun(left) == 0
    assert left["SLURM_JOB_ID"] == "17", "its lock names the job"
    assert left.get("CUDA_VISIBLE_DEVICES") == around.get("CUDA_VISIBLE_DEVICES"), "the GPUs are the job's"
    assert OWN.items() <= left.items()
    assert not [name for name in left if name.startswith(("SLURM_STEP", "SLURM_CPU_BIND", "PMI_", "PMIX_R"))]


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /venv/bin/accelerate launch --cpu --num_processes 2 -m hpcdistill.train x.yaml", 2),
        ("python /venv/bin/accelerate launch --num_processes=4 -m hpcdistill.train x.yaml", 4),
        ("python -m accelerate.commands.launch --num-processes 3 -m hpcdistill.train", 3),
        ("python /venv/bin/accelerate launch -m hpcdistill.train x.yaml", 1),
        ("bash", 1),
        ("python -m pytest --num_processes 2", 1),
        ("accelerate launch --num_processes", 1),
    ],
)
def test_asked_processes(command: str, asked: int) -> None:
    assert asked_processes(command.split()) == asked


@pytest.mark.parametrize(("tasks", "line"), [("1", "asked for 2 processes and started one"), ("2", "gave this job 2")])
def test_a_command_that_was_started_too_seldom_says_so(tasks: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `accelerate launch --cpu`, which ignores --num_processes; by an sbatch script without srun."""
    for name in ("RANK", "WORLD_SIZE", *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in (BATCH | {"SLURM_NTASKS": tasks}).items():
        monkeypatch.setenv(name, value)
    launcher = "/venv/bin/accelerate launch --cpu --num_processes 2 -m hpcdistill.train x.yaml"
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: launcher.split())
    with pytest.raises(UserError, match=line):
        train.main([str(Path(__file__).parents[2] / "configs/fsrcnn/x4.yaml")])
