"""Training on a real SLURM: plain `srun`, and slurm/train.sbatch through signals, requeues and a killed rank."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cluster import Cluster, until
from PIL import Image

from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe

pytestmark = pytest.mark.slurm

CLONE = Path(__file__).resolve().parents[2]
SCRIPT = CLONE / "slurm" / "train.sbatch"
STEPS = 200
NO_GPU = "--gpus-per-node=0"


class Toy:
    """A run of some seconds on images of noise, and where its results are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        random = np.random.default_rng(0)
        for number in range(3):
            noise = random.integers(0, 256, (48, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "images" / f"{number}.png")
        pack(load_recipe("folder"), folder / "images", folder / "packed")
        (folder / "toy.yaml").write_text(
            f"data: {{train: {folder / 'packed'}, eval: {{toy: {folder / 'packed'}}},\n"
            "  patch: 48, samples_per_epoch: 3, workers: 0}\n"
            f"train: {{steps: {STEPS}, batch_size: 4, log_every: 10, checkpoint_every: 100, gradient_norms_every: 0,\n"
            "  trackers: [], device: cpu, threads: 1}\n"
            f"eval: {{every: {STEPS}}}\n"
        )

    def arguments(self, runs: str) -> list[str]:
        return [str(CLONE / "configs" / "fsrcnn" / "x2.yaml"), str(self.folder / "toy.yaml"), f"runs={self.runs(runs)}"]

    def command(self, runs: str) -> list[str]:
        return [sys.executable, "-m", "hpcdistill.train", *self.arguments(runs)]

    def runs(self, name: str) -> Path:
        return self.folder / name

    def result(self, runs: str) -> dict[str, Any]:
        [path] = self.runs(runs).glob("*/result.json")
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded

    def logged(self, runs: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        lines = [line for path in self.runs(runs).glob("*/metrics.jsonl") for line in path.read_text().splitlines(True)]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def await_progress(self, runs: str, log: Path | None = None) -> None:
        """Return when the run has written its first metrics."""

        def look() -> object:
            return self.logged(runs) or (log.read_text()[-500:] if log and log.exists() else "no line yet")

        until(look, lambda seen: isinstance(seen, list), 60, f"first line of {runs}/*/metrics.jsonl")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, toy: Toy) -> dict[str, Any]:
    """The result of a run over two nodes that nothing happened to."""
    done = cluster.run("srun", "--nodes=2", "--ntasks=2", *toy.command("undisturbed"), cwd=CLONE, seconds=120)
    assert done.returncode == 0, done.stderr
    return toy.result("undisturbed")


def test_srun_on_two_nodes_gives_two_ranks(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["processes"] == 2
    assert undisturbed["steps"] == STEPS


def test_srun_on_one_node_gives_two_ranks(cluster: Cluster, toy: Toy, undisturbed: dict[str, Any]) -> None:
    done = cluster.run("srun", "--nodes=1", "--ntasks=2", *toy.command("one-node"), cwd=CLONE, seconds=120)
    assert done.returncode == 0, done.stderr
    result = toy.result("one-node")
    assert result["processes"] == 2
    assert result["last"] == undisturbed["last"]


def test_a_stopped_job_is_requeued_and_ends_as_if_nothing_had_been(
    cluster: Cluster, toy: Toy, undisturbed: dict[str, Any]
) -> None:
    log = toy.folder / "requeued.log"
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", NO_GPU, f"--output={log}"]
    job = cluster.submit(*shape, SCRIPT, *toy.arguments("requeued"), cwd=CLONE, HPCDISTILL_PYTHON=sys.executable)
    toy.await_progress("requeued", log)
    # To the script alone, which must not die of it but pass it on.
    cluster.ask("scancel", "--signal=USR1", "--batch", str(job))
    again = cluster.wait_for(job, lambda shown: shown["Restarts"] == "1", 60)
    assert again["JobState"] in ("PENDING", "COMPLETING", "RUNNING"), log.read_text()
    steps = [line["step"] for line in toy.logged("requeued")]
    assert steps[-1] < STEPS, "it had finished before it was stopped"
    assert not list(toy.runs("requeued").glob("*/result.json"))
    ended = cluster.wait_end(job, 90)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log.read_text()
    result = toy.result("requeued")
    assert result["processes"] == 2
    assert result["last"] == undisturbed["last"]
    assert result["best"] == undisturbed["best"]
    lines = toy.logged("requeued")
    assert [line["step"] for line in lines] == [line["step"] for line in toy.logged("undisturbed")]
    said = log.read_text()  # of both attempts
    assert f"into the queue again as job {job}" in said
    assert "Traceback" not in said


def test_a_killed_rank_ends_the_step_with_its_name(cluster: Cluster, toy: Toy) -> None:
    command = ["srun", "--nodes=2", "--ntasks=2", *toy.command("killed")]
    log = toy.folder / "killed.log"
    with log.open("w") as output:
        step = subprocess.Popen(command, cwd=CLONE, env=cluster.environment, stdout=output, stderr=output)
    try:
        toy.await_progress("killed", log)
        [victim] = [process for process in _tasks(cluster) if process.environ()["SLURM_PROCID"] == "1"]
        victim.kill()
        begun = time.monotonic()
        code = step.wait(120)
    finally:
        if step.poll() is None:
            cluster.cancel_all()
            step.wait(60)
    seconds = time.monotonic() - begun
    print(f"ended {seconds:.1f} s after the kill")
    assert code not in (0, 75)
    said = log.read_text()
    assert re.search(r"error: rank 1 \(.+\)", said), said
    assert "Traceback" not in said
    assert seconds < 60


def test_several_tasks_without_srun_are_an_error(cluster: Cluster, toy: Toy) -> None:
    log = toy.folder / "no-srun.log"
    command = " ".join(toy.command("no-srun"))
    job = cluster.submit("--ntasks=2", f"--output={log}", f"--wrap={command}", cwd=CLONE)
    ended = cluster.wait_end(job, 60)
    assert ended["ExitCode"] == "2:0", log.read_text()
    assert "put `srun` in front" in log.read_text()
    assert not toy.runs("no-srun").exists()


def test_ranks_that_stop_one_after_the_other_are_requeued(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    job = _submit(cluster, stand_in, tmp_path, "--ntasks-per-node=2", SCRIPT, "stops")
    ended = cluster.wait_for(job, lambda shown: shown["JobState"] in ("COMPLETED", "FAILED"), 60)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (tmp_path / f"{job}.log").read_text()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program in Python's place: what train.sbatch does is known without waiting for PyTorch."""
    program = tmp_path / "python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        'shift 2; case "$1" in\n'
        "    fails) exit 3 ;;\n"
        '    hangs) if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exit 71; fi; exit 0 ;;\n'
        '    killed) if [ "${SLURM_RESTART_COUNT:-0}$SLURM_PROCID" = 00 ]; then kill -KILL $$; fi; exit 0 ;;\n'
        '    stops) if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then sleep $SLURM_PROCID; exit 75; fi; exit 0 ;;\n'
        "    waits) trap 'exit 75' USR1; touch waiting; while true; do sleep 0.1; done ;;\n"
        "    array) echo once >> starts-$SLURM_ARRAY_TASK_ID\n"
        '        if [ $SLURM_ARRAY_TASK_ID = 2 ]; then [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && exit 75; exit 0; fi\n'
        '        for _ in {1..300}; do [ "$(wc -l < starts-2)" = 2 ] && exit 0; sleep 0.1; done; exit 1 ;;\n'
        "    binds) env -u OMP_NUM_THREADS nproc ;;\n"
        '    tells) echo "$SLURM_CPUS_PER_TASK $OMP_NUM_THREADS"; printf "<%s>" "$@" ;;\n'
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.mark.parametrize("how", ["hangs", "killed"])
def test_lost_ranks_are_requeued(how: str, cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    job = _submit(cluster, stand_in, tmp_path, "--ntasks-per-node=2", SCRIPT, how)
    ended = cluster.wait_for(job, lambda shown: shown["JobState"] in ("COMPLETED", "FAILED"), 60)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (tmp_path / f"{job}.log").read_text()


def test_other_exit_codes_are_not_requeued(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    job = _submit(cluster, stand_in, tmp_path, "--ntasks-per-node=2", SCRIPT, "fails")
    ended = cluster.wait_end(job, 30)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")


def test_arguments_and_cores_reach_the_program(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    job = _submit(cluster, stand_in, tmp_path, "--cpus-per-task=3", SCRIPT, "tells", "a b", "c=[1, '*']")
    assert cluster.wait_end(job, 30)["JobState"] == "COMPLETED"
    assert (tmp_path / f"{job}.log").read_text() == "3 3\n<tells><a b><c=[1, '*']>"


@pytest.mark.parametrize("outer", ["srun -n1 -c1 --mem-per-cpu=300", "salloc -n1 -c1 --mem-per-cpu=300 --gpus=2"])
def test_a_job_submitted_inside_another_is_as_from_a_login_node(
    outer: str, cluster: Cluster, stand_in: Path, tmp_path: Path
) -> None:
    if "--gpus" in outer and "gpu" not in cluster.ask("sinfo", "--noheader", "--format=%G"):
        pytest.skip("this machine can make no device, so that the cluster has no GPUs")
    said = []
    for number, around in enumerate(["", outer]):
        log = tmp_path / f"{number}.log"
        # Exclusive: it has a node's first two cores. Further ones the nodes only claim to have.
        asked = ["--cpus-per-task=2", NO_GPU, "--mem=300", f"--output={log}", "--exclusive", str(SCRIPT), "binds"]
        command = [*around.split(), "sbatch", "--parsable", *asked]
        job = int(cluster.ask(*command, cwd=tmp_path, HPCDISTILL_PYTHON=str(stand_in)))
        ended = cluster.wait_end(job, 150)
        said.append(log.read_text())
        assert ended["JobState"] == "COMPLETED", said
    assert said == [f"{min(2, os.cpu_count() or 1)}\n"] * 2


def test_a_job_submitted_inside_an_array_is_none_of_its_tasks(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    # As in the second start of task 3 of an array, which must not be put into the queue in this one's place.
    around = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3"}
    common = ["--cpus-per-task=1", NO_GPU, f"--output={tmp_path}/%j.log", str(SCRIPT), "stops"]
    job = cluster.submit(*common, cwd=tmp_path, HPCDISTILL_PYTHON=str(stand_in), SLURM_RESTART_COUNT="4", **around)
    ended = cluster.wait_for(job, lambda shown: shown["JobState"] in ("COMPLETED", "FAILED"), 60)
    said = (tmp_path / f"{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert f"into the queue again as job {job}\n" in said


def test_one_task_of_an_array_is_requeued_alone(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    # The array's last task carries the array's own id: `scontrol requeue` of it would start all of them again.
    job = _submit(cluster, stand_in, tmp_path, "--array=1-2", SCRIPT, "array")
    until(lambda: cluster.ask("squeue", "--noheader", "--jobs", str(job)), lambda left: not left, 60, "the array")
    starts = {number: (tmp_path / f"starts-{number}").read_text() for number in "12"}
    assert starts == {"1": "once\n", "2": "once\nonce\n"}


def test_the_time_limit_stops_and_requeues(cluster: Cluster, stand_in: Path, tmp_path: Path) -> None:
    job = _submit(cluster, stand_in, tmp_path, "--time=5", "--signal=USR1@55", SCRIPT, "waits")
    until((tmp_path / "waiting").exists, bool, 30, "the program's start")
    # SLURM looks at time limits every 30 s, and may signal a minute early: now, that is.
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    shown = cluster.wait_for(job, lambda shown: shown["Restarts"] == "1", 90)
    assert shown["JobState"] != "TIMEOUT"
    assert "stopped and saved" in (tmp_path / f"{job}.log").read_text()
    cluster.ask("scancel", str(job))


def _submit(cluster: Cluster, program: Path, folder: Path, *arguments: str | Path) -> int:
    common = ["--cpus-per-task=1", NO_GPU, f"--output={folder}/%j.log"]
    return cluster.submit(*common, *arguments, cwd=folder, HPCDISTILL_PYTHON=str(program), OMP_NUM_THREADS="")


def _tasks(cluster: Cluster) -> list[psutil.Process]:
    """The training processes that a step has started."""
    tasks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
            if ours and "SLURM_STEP_ID" in environment and "hpcdistill.train" in process.cmdline():
                tasks.append(process)
    return tasks
