"""The same plan on this machine: order, places, failures, Ctrl-C; with a stand-in for training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stand_in import put_stand_in
from toy_sweep import put_grid

from hpcdistill.errors import UserError
from hpcdistill.sweep import attempt, local
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import task_statuses
from hpcdistill.sweep.submit import main
from hpcdistill.sweep.task_folder import TaskFolder, write_task

CLONE = Path(__file__).resolve().parents[2]
COLLECT = "import sys, pathlib; pathlib.Path('collected').write_text(' '.join(sys.argv[1:]))\n"


class Here:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        put_grid(folder)
        put_stand_in(folder)

    def states(self) -> dict[str, dict[str, Any]]:
        """state.json of every task, by key."""
        found = self.folder.glob("sweeps/tasks/*/state.json")
        return {path.parent.name: json.loads(path.read_text()) for path in found}

    def by_name(self) -> list[tuple[str, str]]:
        return sorted((state["name"], state["state"]) for state in self.states().values())

    def logs(self) -> str:
        return "".join(Path(state["log"]).read_text() for state in self.states().values())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "visible_gpus", lambda: [])
    monkeypatch.setattr(local, "CLONE", tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "collect.py").write_text(COLLECT)
    return Here(tmp_path)


def test_everything_is_run_once_teachers_first(
    here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    assert main(["toy.yaml", "--local", "--parallel", "7"]) == 0  # room for all, were there nothing to wait for
    states = here.states()
    assert here.by_name() == sorted(
        [*[("student", "finished")] * 4, *[("teacher", "finished")] * 2, ("plain", "finished")]
    )
    for key, state in states.items():
        teacher = json.loads((here.folder / "sweeps/tasks" / key / "config.json").read_text())["teacher"]
        assert (teacher is not None) == (state["name"] == "student")
    ends = {
        key: json.loads((Path(state["run"]) / "result.json").read_text())["seconds"] for key, state in states.items()
    }
    plan = json.loads(next(here.folder.glob("sweeps/submissions/*/plan.json")).read_text())
    for key, run in plan["runs"].items():
        if run["teacher"]:
            assert ends[key] > ends[run["teacher"]]
    assert plan["local"]["pid"] == os.getpid()
    said = (here.folder / "collected").read_text()
    assert said == "runs --grid toy.yaml --with-others --folder sweeps --out sweeps/report"
    assert "done: 7 finished" in capsys.readouterr().err
    # Again: nothing is run twice, what is missing is.
    gone = next(key for key, state in states.items() if state["name"] == "student")
    (Path(states[gone]["run"]) / "result.json").unlink()
    assert main(["toy.yaml", "--local"]) == 0
    assert {key: state["attempt"] for key, state in here.states().items()} == {key: 1 + (key == gone) for key in states}


def test_each_run_has_a_gpu_to_itself(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda: ["4", "6"])
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    assert main(["toy.yaml", "--local"]) == 0
    logs = here.logs()
    assert {line.partition(" gpu ")[2] for line in logs.splitlines()} == {"4", "6"}


def test_inside_a_job_each_run_is_one_process_on_the_jobs_cores(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    for name, value in (step | {"SLURM_NTASKS": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda process: set(range(12)))  # of 96 that the node has
    monkeypatch.setattr(local.os, "cpu_count", lambda: 96)
    assert main(["toy.yaml", "--local", "--parallel", "3"]) == 0
    logs = here.logs()
    assert logs.count("'SLURM_JOB_ID': '17'") == 7, "their locks name the job"
    assert logs.count("'OMP_NUM_THREADS': '4'") == 7
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "LOCAL_RANK", "MASTER_PORT"):
        assert logs.count(f"'{name}': None") == 7, f"{name}: each would wait for the other rank of the step"


def test_gpus_are_those_that_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    assert local.visible_gpus() == ["3", "GPU-7f"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_gpus() == []


def test_a_failed_teacher_blocks_its_students_and_nothing_else(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    text = (here.folder / "bicubic.yaml").read_text()
    (here.folder / "bicubic.yaml").write_text(text.replace("{method:", "{name: fails, method:"))
    assert main(["toy.yaml", "--local"]) == 1
    wanted = [("fails", "failed"), ("plain", "finished"), ("teacher", "finished")]
    assert here.by_name() == sorted([*wanted, *[("student", "finished")] * 2, *[("student", "blocked")] * 2])
    said = capsys.readouterr().err
    assert "error: no such thing; mend it" in said
    assert (here.folder / "collected").exists(), "the tables show what is missing"
    statuses = task_statuses(list(here.states()), Path("sweeps"), Path("runs"), Queue({"PATH": ""}))
    assert sorted(s.state for s in statuses) == sorted(state for _, state in here.by_name())
    # The fault is mended; the name is not part of a run.
    (here.folder / "bicubic.yaml").write_text(text)
    assert main(["toy.yaml", "--local", "--retry", "failed"]) == 0
    assert {state for _, state in here.by_name()} == {"finished"}


@pytest.mark.parametrize("known", ["by its state", "by its configuration"])
def test_a_damaged_result_is_set_aside_and_written_again(here: Here, known: str) -> None:
    """Of a teacher and a student; by the state that a sweep has kept of the run, or by the run's configuration."""
    assert main(["toy.yaml", "--local"]) == 0
    states = here.states()
    [plan] = here.folder.glob("sweeps/submissions/*/plan.json")
    student, teacher = next(
        (key, run["teacher"]) for key, run in json.loads(plan.read_text())["runs"].items() if run["teacher"]
    )
    damaged = [student, teacher]
    for key in damaged:
        file = Path(states[key]["run"]) / "result.json"
        file.write_bytes(file.read_bytes()[:20])
        if known == "by its configuration":
            task = here.folder / "sweeps" / "tasks" / key
            values = json.loads((task / "config.json").read_text())
            if values["teacher"]:
                values["teacher"]["config"] = str(task / "teacher.json")
            (file.parent / "config.yaml").write_text(json.dumps(values))
            (task / "state.json").unlink()
    if known == "by its configuration":
        shutil.rmtree(here.folder / "sweeps" / "submissions")  # made by this process, which lives
    assert main(["toy.yaml", "--local", "--retry", "all"]) == 0
    statuses = task_statuses(list(states), Path("sweeps"), Path("runs"), Queue({"PATH": ""}))
    assert {status.state for status in statuses} == {"finished"}
    for key in damaged:
        folder = Path(here.states()[key]["run"])
        assert json.loads((folder / "result.json").read_text())["key"] == key
        assert len((folder / "result.json.damaged").read_bytes()) == 20
    assert len(list(here.folder.glob("runs/*/*.damaged"))) == 2


def test_a_teachers_damaged_result_is_written_again_for_itself(here: Here) -> None:
    """All its students have finished: none of them would have it started."""
    assert main(["toy.yaml", "--local"]) == 0
    state = next(state for state in here.states().values() if state["name"] == "teacher")
    file = Path(state["run"]) / "result.json"
    file.write_bytes(b"{")
    assert main(["toy.yaml", "--local", "--retry", "failed"]) == 0
    assert json.loads(file.read_text())["key"] == state["key"]


def test_ctrl_c_saves_and_the_same_command_goes_on(here: Here) -> None:
    process = start(here, "name=waits", "--parallel", "2")
    until(lambda: len(list(here.folder.glob("sweeps/tasks/*/waiting"))) == 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    stopped = [state for state in here.states().values() if state["name"] == "waits"]  # teachers have their own names
    assert [state["state"] for state in stopped] == ["stopped", "stopped"]
    for state in stopped:
        assert "saved after ['SIGINT']" in Path(state["log"]).read_text(), "once, not from the terminal as well"
    assert not (here.folder / "collected").exists()
    assert main(["toy.yaml", "--local"]) == 0
    assert len(here.states()) == 7
    assert {state for _, state in here.by_name()} == {"finished"}


def test_a_hang_up_under_nohup_ends_nothing(here: Here) -> None:
    process = start(here, "--parallel", "7", ignoring="HUP", seconds=1.0)
    until(lambda: list(here.folder.glob("runs/*/environment.json")))
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert len(here.states()) == 7
    assert {state for _, state in here.by_name()} == {"finished"}


def test_the_background_of_a_script_is_deaf_to_ctrl_c_but_can_be_stopped(here: Here) -> None:
    """A shell ignores SIGINT there, and what it starts inherits that; the runs are stopped by SIGINT all the same."""
    process = start(here, "name=waits", ignoring="INT HUP")
    until(lambda: len(list(here.folder.glob("sweeps/tasks/*/waiting"))) == 1)
    process.send_signal(signal.SIGINT)  # not heard: one more than the SIGTERM below would stop at once
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "saved after ['SIGINT']" in here.logs()


def test_a_sweep_that_runs_is_not_started_twice(here: Here) -> None:
    process = start(here, "name=waits")
    until(lambda: len(list(here.folder.glob("sweeps/tasks/*/waiting"))) == 1)
    try:
        assert main(["toy.yaml", "--local"]) == 0
        assert len(here.states()) == 3, "the others wait for their turn there"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_it_gives_other_hosts_a_sign_of_life(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BEAT_S", 0.5)
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    assert main(["toy.yaml", "--local"]) == 0  # one after the other: some seconds
    plan = next(here.folder.glob("sweeps/submissions/*/plan.json"))
    assert plan.with_name("alive").stat().st_mtime > plan.stat().st_mtime + 1


def test_a_running_attempt_gives_a_sign_of_life(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "BEAT_S", 0.2)
    task = TaskFolder(here.folder / "tasks" / "aaa")
    write_task(task.path, {"name": "waits", "runs": "runs"}, None)
    started = attempt.Attempt(task, 1, cwd=here.folder)
    started.start()
    try:
        os.utime(task.path / "state.json", (1, 1))
        until(lambda: started.poll() is None and (task.path / "state.json").stat().st_mtime > 1)
    finally:
        started.kill()


def test_scratch_with_an_unset_variable_is_refused_at_once(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    (here.folder / "here.yaml").write_text("gpus_per_node: 0\nset: [train.device=cpu]\nscratch: $NOT_THERE/x\n")
    with pytest.raises(UserError, match=r"scratch: \$NOT_THERE/x: not set on"):
        main(["toy.yaml", "--local", "--cluster", "./here.yaml"])
    assert here.states() == {}
    assert not list(here.folder.glob("sweeps/submissions/*"))


def start(here: Here, *words: str, ignoring: str = "", seconds: float = 0.0) -> subprocess.Popen[str]:
    code = "import sys; from hpcdistill.command import run_command; from hpcdistill.sweep.submit import main\n"
    code += "from hpcdistill.sweep import local; local.visible_gpus = lambda: []; run_command(main)"
    ignored = ["sh", "-c", f"trap '' {ignoring}; exec \"$@\"", "sh"] if ignoring else []
    return subprocess.Popen(
        [*ignored, sys.executable, "-P", "-c", code, "toy.yaml", "--local", *words],
        cwd=here.folder,
        env=os.environ | {"PYTHONPATH": str(CLONE), "STAND_IN_SECONDS": str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(reached: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
