"""A task: its configuration is the run's, and what it does about its child's end, signals, ranks and teacher."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stand_in import put_stand_in

from hpcdistill.data.index import Index
from hpcdistill.errors import UserError
from hpcdistill.run import Run, load_run
from hpcdistill.sweep.attempt import Attempt, teacher_run
from hpcdistill.sweep.logs import last_words
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import task_statuses
from hpcdistill.sweep.task import Command, Task
from hpcdistill.sweep.task_folder import TaskFolder, filled_in, write_task

CLONE = Path(__file__).resolve().parents[2]
_SEEDS = [f"teachers.{role}.overrides.seed=0" for role in ("ab", "ba")]  # as a plan keeps them
PATHS = {"PYTHONPATH": str(CLONE)}
CALL = "import sys, pickle; call = pickle.load(open(sys.argv[1], 'rb')); print(call())"


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(CLONE)
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs/fsrcnn/x2.yaml"],
        ["configs/fsrcnn/x3.yaml", "configs/variants/short.yaml", "seed=4", "data.eval.more=elsewhere/set"],
        ["configs/dssd/x4.yaml"],
        ["configs/dssd/x4.yaml", "configs/variants/encoder-hfrm.yaml", "seed=7"],
        [
            "configs/dssd/x2.yaml",
            "configs/variants/bsd-t91.yaml",
            "configs/variants/rgb.yaml",
            "method.weight_vid=1e-7",
        ],
        ["configs/dssd/x3.yaml", "teacher.overrides.seed=5", "teacher.checkpoint=best", "train.batch_size=8"],
        ["configs/dssd/x4.yaml", "configs/variants/demo.yaml"],
        ["configs/dssd/teacher_x4.yaml", "configs/variants/encoder-pisr.yaml"],
        ["configs/pisr/x4.yaml", "seed=1"],
        ["configs/fesd/edges2shoes.yaml"],
        ["configs/fesd/horse2zebra.yaml", "seed=2", "train.ema=1e-06"],
        ["configs/fesd/summer2winter.yaml", "configs/variants/gan-cpu.yaml"],
        ["configs/dcd/edges2shoes.yaml", "configs/variants/dcd-batch4.yaml"],
        ["configs/dcd/horse2zebra.yaml", "runs=else where/run's"],
        ["configs/original/monet2photo.yaml", "seed=11"],
        ["configs/wavelet_kd/horse2zebra.yaml", "teachers.ab.checkpoint=best", "seed=3", *_SEEDS],
    ],
    ids=" ".join,
)
def test_the_tasks_configuration_is_the_run(arguments: list[str], data_root: Path, tmp_path: Path) -> None:
    loaded = load_run(arguments)
    taught = {role: teacher.run for role, teacher in loaded.teachers.items() if teacher.run}
    for run in (loaded, *taught.values()):
        _index_only(run, data_root)
    first = next(iter(taught.values()), None)
    write_task(tmp_path / "task", loaded.config.dump(), first.config.dump() if first else None)
    again = load_run([str(tmp_path / "task" / "config.json")])
    assert again.key == loaded.key
    assert again.identity == loaded.identity
    # They say where the teacher's file is.
    with_path = again.config.model_copy(update={key: getattr(loaded.config, key) for key in ("teacher", "teachers")})
    assert with_path.dump() == loaded.config.dump()
    for role, run in taught.items():
        own = again.teachers[role]
        assert own.run is not None
        assert own.run.config.dump() == run.config.dump()
        assert own.settings.checkpoint == loaded.config.roles[role].checkpoint
        assert own.settings.network == loaded.config.roles[role].network
    assert load_run([str(tmp_path / "task" / "config.json"), "seed=99"]).key != loaded.key


def _index_only(loaded: Run, root: Path) -> None:
    """Give each data set of the run an index, which is all that an identity reads."""
    kind = loaded.config.method.kind()
    for place in map(Path, (*loaded.config.data.train, *loaded.config.data.eval.values())):
        if place.is_relative_to(root) and not place.exists():
            place.mkdir(parents=True)
            Index("toy", place.name, kind, (2, 3, 4), str(place), "test", (), ()).save(place)


class Toy:
    """Tasks whose runs are stand-ins, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        put_stand_in(folder)

    def task(self, name: str, key: str) -> TaskFolder:
        write_task(self.folder / "tasks" / key, {"name": name, "runs": "runs"}, None)
        return TaskFolder(self.folder / "tasks" / key)

    def start(self, task: TaskFolder, rank: int = 0, ranks: int = 1, **options: Any) -> subprocess.Popen[str]:
        """What submitit does on a node: unpickle and call; only SLURM's variables say where it is."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"PYTHONPATH": str(CLONE), "SLURM_JOB_ID": "41", "SLURM_PROCID": str(rank)}
        environment |= {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": str(ranks)}
        environment |= {"SLURM_LOCALID": str(rank), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[7-8]"}
        environment |= {"SUBMITIT_EXECUTOR": "slurm"}
        environment |= {"RANK": "99", "MASTER_PORT": "1"} | options.pop("environment", {})
        call = self.folder / f"{task.key}.{rank}.pkl"
        call.write_bytes(pickle.dumps(Task(task.path, self.folder, **options)))
        return subprocess.Popen(
            [sys.executable, "-P", "-c", CALL, str(call)], stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} does not come"
            time.sleep(0.02)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def test_a_run_that_finishes(toy: Toy) -> None:
    task = toy.task("finishes", "aaa")
    process = toy.start(task, scratch="/scratch/$SLURM_JOB_ID")
    assert process.communicate(timeout=60)[0] == "finished\n"
    assert process.returncode == 0
    state = task.state()
    assert state is not None
    assert (state["state"], state["code"], state["attempt"], state["job"]) == ("finished", 0, 1, "40_3")
    assert (state["key"], state["name"], state["message"]) == ("aaa", "finishes", None)
    assert Path(state["run"]).samefile(toy.folder / "runs" / "finishes-aaa")
    assert state["started"] <= state["ended"]
    said = task.log(1).read_text()
    assert "'RANK': None" in said, "a run of one rank is not a distributed one, whatever the submitting shell has set"
    assert "['data.stage=/scratch/41']" in said


@pytest.mark.parametrize(
    ("name", "requeues", "exit_code", "ended", "code", "message"),
    [
        ("fails", 5, 2, "failed", 2, "error: no such thing; mend it"),
        ("dies", 5, 75, "stopped", -9, "killed by SIGKILL"),  # as with two ranks: it has a checkpoint to go on from
        ("dies", 0, 137, "failed", -9, "killed by SIGKILL"),
    ],
)
def test_a_run_that_fails(
    toy: Toy, name: str, requeues: int, exit_code: int, ended: str, code: int, message: str
) -> None:
    task = toy.task(name, "bbb")
    process = toy.start(task, requeues=requeues)
    process.communicate(timeout=60)
    state = task.state()
    assert state is not None
    assert process.returncode == exit_code
    assert (state["state"], state["code"]) == (ended, code)
    assert state["message"].startswith(message)


@pytest.mark.parametrize(
    ("name", "signals", "requeues", "exit_code"),
    [
        ("waits", [signal.SIGUSR2], 5, 75),  # the time limit: into the queue again
        ("waits", [signal.SIGTERM], 5, 143),  # scancel: must not come back
        ("waits", [signal.SIGTERM, signal.SIGUSR2], 5, 75),
        ("waits", [signal.SIGUSR2], 0, 143),
        ("stops", [], 5, 75),  # another rank was told to
    ],
)
def test_a_run_that_is_stopped(
    toy: Toy, name: str, signals: list[signal.Signals], requeues: int, exit_code: int
) -> None:
    task = toy.task(name, "ccc")
    process = toy.start(task, requeues=requeues)
    if signals:
        toy.wait_for(task.path / "waiting")
        os.kill(process.pid, signal.SIGSTOP)  # so that both come at once
        for number in signals:
            process.send_signal(number)
        os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == exit_code
    state = task.state()
    assert state is not None
    assert (state["state"], state["code"]) == ("stopped", 75)
    if signals:
        assert "saved after" in task.log(1).read_text()
    process = toy.start(toy.task("finishes", "ccc"), environment={"SLURM_RESTART_COUNT": "1"})
    process.communicate(timeout=60)
    state = task.state()
    assert state is not None
    assert (state["state"], state["attempt"]) == ("finished", 2)


def test_two_ranks_share_an_attempt_and_a_port(toy: Toy) -> None:
    task = toy.task("finishes", "ddd")
    late = toy.start(task, rank=1, ranks=2)  # rank 0 decides, whoever comes first
    first = toy.start(task, rank=0, ranks=2)
    for process in (first, late):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert task.attempts() == 1
    said = [task.log(1, rank).read_text() for rank in (0, 1)]
    for rank in (0, 1):
        assert f"'RANK': '{rank}', 'WORLD_SIZE': '2', 'LOCAL_RANK': '{rank}'" in said[rank]
    ports = [text.partition("MASTER_PORT': '")[2].partition("'")[0] for text in said]
    assert ports[0] == ports[1]
    assert int(ports[0]) > 1024, "not the submitting shell's"


@pytest.mark.parametrize("teacher_key", ["ttt", "older"])
def test_without_its_teacher_it_is_blocked(toy: Toy, teacher_key: str) -> None:
    toy.task("teacher", teacher_key)
    task = toy.task("finishes", "eee")
    ranks = [toy.start(task, rank, 2, teacher=teacher_key) for rank in (0, 1)]
    for process in ranks:
        assert process.communicate(timeout=60)[0] == "blocked\n"
        assert process.returncode == 0, "not an error of its own"
    state = task.state()
    assert state is not None
    assert state["state"] == "blocked"
    assert teacher_key in state["message"] and "teacher" in state["message"]  # noqa: PT018
    assert not (toy.folder / "runs").exists()
    result = toy.folder / "runs" / "renamed-1234" / "result.json"  # by its key, not by its name
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"name": "renamed", "key": teacher_key}))
    process = toy.start(task, teacher=teacher_key, environment={"SLURM_RESTART_COUNT": "1"})
    assert process.communicate(timeout=60)[0] == "finished\n"


def test_an_attempt_that_was_given_up_does_not_speak_over_the_next(toy: Toy) -> None:
    task = toy.task("waits", "fff")
    lost = toy.start(task)
    toy.wait_for(task.path / "waiting")
    toy.start(toy.task("finishes", "fff")).communicate(timeout=60)
    lost.send_signal(signal.SIGUSR2)
    lost.communicate(timeout=60)
    state = task.state()
    assert state is not None
    assert (state["state"], state["attempt"]) == ("finished", 2)


def test_a_run_found_finished_by_its_identity_is_finished(data_root: Path, tmp_path: Path) -> None:
    """The same data at another place: another key, but training finds the run and starts nothing."""
    loaded = load_run(["configs/fsrcnn/x2.yaml", "runs=runs"])
    _index_only(loaded, data_root)
    key = loaded.key
    write_task(tmp_path / "tasks" / key, loaded.config.dump(), None)
    run = tmp_path / "runs" / loaded.folder.name
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"name": loaded.config.name, "key": "of-another-place"}))
    attempt = Attempt(TaskFolder(tmp_path / "tasks" / key), 1, cwd=tmp_path, environment=os.environ | PATHS)
    attempt.command = [sys.executable, "-c", "print('has finished already')"]
    attempt.start()
    while (code := attempt.poll()) is None:
        time.sleep(0.02)
    assert attempt.end(code) == "finished"
    state = attempt.folder.state()
    assert state is not None
    assert state["run"] == str(run)
    [status] = task_statuses([key], tmp_path, tmp_path / "runs", Queue({"PATH": ""}))
    assert (status.state, status.run) == ("finished", run)
    write_task(tmp_path / "tasks" / "student", {"name": "student", "runs": "runs"}, None)
    student = TaskFolder(tmp_path / "tasks" / "student")
    assert teacher_run(student, key, tmp_path) == run
    (run / "result.json").unlink()
    assert teacher_run(student, key, tmp_path) is None
    attempt.end(code)
    assert attempt.folder.state()["run"] is None  # type: ignore[index]


@pytest.mark.parametrize("of_the_node", [None, "/another/place"])
def test_the_data_root_is_the_submitters(toy: Toy, of_the_node: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are of places below the data root, and a job may start without the variable, or with its node's."""
    monkeypatch.setenv("HPCDISTILL_DATA", "/data/of the submitter")
    task = toy.task("finishes", "ggg")
    monkeypatch.delenv("HPCDISTILL_DATA")
    process = toy.start(task, environment={"HPCDISTILL_DATA": of_the_node} if of_the_node else {})
    assert process.communicate(timeout=60)[0] == "finished\n"
    assert "'HPCDISTILL_DATA': '/data/of the submitter'" in task.log(1).read_text()


def test_a_key_is_the_same_where_the_variable_does_not_reach(data_root: Path, tmp_path: Path) -> None:
    loaded = load_run(["configs/fsrcnn/x2.yaml"])
    task = TaskFolder(tmp_path / "tasks" / loaded.key)
    write_task(task.path, loaded.config.dump(), None)
    bare = {name: value for name, value in os.environ.items() if name != "HPCDISTILL_DATA"}
    attempt = Attempt(task, 1, cwd=tmp_path, environment=bare | PATHS)
    code = "import sys; from hpcdistill.run import load_run\n"
    attempt.command = [sys.executable, "-c", code + "print(load_run(sys.argv[1:]).key)", str(task.config)]
    attempt.start()
    while attempt.poll() is None:
        time.sleep(0.02)
    assert attempt.log.read_text() == f"{task.key}\n"


def test_a_state_that_cannot_be_written_does_not_end_the_training(toy: Toy) -> None:
    task = toy.task("finishes", "hhh")
    (task.path / "state.json" / "in the way").mkdir(parents=True)
    process = toy.start(task, environment={"STAND_IN_SECONDS": "3"})
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "finished"
    assert process.returncode == 0
    assert (toy.folder / "runs" / "finishes-hhh" / "result.json").is_file()


def test_its_failed_writes_are_said_once(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    task = toy.task("finishes", "iii")
    (task.path / "state.json" / "in the way").mkdir(parents=True)
    attempt = Attempt(task, 1, cwd=toy.folder)
    attempt.start()
    while (code := attempt.poll()) is None:
        time.sleep(0.02)
    assert attempt.end(code) == "finished"
    said = capsys.readouterr().err
    assert said.count("not written") == 1
    assert "finishes goes on" in " ".join(said.split())


@pytest.mark.parametrize(
    ("restarts", "requeues", "exit_codes", "state"), [(0, 2, [75, 75], "stopped"), (2, 2, [71, 139], "failed")]
)
def test_a_lost_rank_is_tried_again(toy: Toy, restarts: int, requeues: int, exit_codes: list[int], state: str) -> None:
    """srun ends with the larger code, so that both ranks must ask for it."""
    task = toy.task("loses", "jjj")
    environment = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    ranks = [toy.start(task, rank, 2, requeues=requeues, environment=dict(environment)) for rank in (0, 1)]
    for process in ranks:
        process.communicate(timeout=60)
    assert [process.returncode for process in ranks] == exit_codes
    found = task.state()
    assert found is not None
    assert (found["state"], found["code"], found["message"]) == (state, 71, "error: rank 1 is lost")


def test_an_unset_variable_in_scratch_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "/disk")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert filled_in("$THERE/${THERE}x") == "/disk//diskx"
    with pytest.raises(UserError, match=r"scratch: \$NOT_THERE/x: not set on "):
        filled_in("$NOT_THERE/x")
    task = toy.task("finishes", "kkk")
    process = toy.start(task, scratch="${NOT_THERE}/x", requeues=5)
    process.communicate(timeout=60)
    assert process.returncode == 2
    state = task.state()
    assert state is not None
    assert state["state"] == "failed"
    assert state["message"].startswith("error: scratch: ${NOT_THERE}/x: not set on ")
    assert not (toy.folder / "runs").exists()


@pytest.mark.parametrize("file", ["config.json", "environment.json"])
def test_a_damaged_file_of_the_task_is_one_line(toy: Toy, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    task = toy.task("finishes", "mmm")
    (task.path / file).write_text('{"name": ')
    assert toy.start(task).wait(timeout=60) == 2
    printed = capfd.readouterr().err
    assert f"error: {task.path / file}: damaged (" in printed
    assert "Traceback" not in printed


def test_importing_a_task_is_light() -> None:
    """Its process waits for hours beside the run: without torch's memory, and started in a moment."""
    code = "import sys, hpcdistill.sweep.task, hpcdistill.sweep.submit; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CLONE)
    assert done.stdout == "False\n"


def test_the_last_words_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) is None
    log.write_text("")
    assert last_words(log) is None
    log.write_text("x" * 9000 + "\nerror: the disk is full\n  cleaning up\n\n")
    assert last_words(log) == "error: the disk is full"
    log.write_text("Traceback (most recent call last):\n  File\nValueError: 3\n\n")
    assert last_words(log) == "ValueError: 3"


def test_jobs_that_earlier_code_has_queued_find_their_task() -> None:
    """submitit pickles a job's class by its module's name, and loads it again at each requeue."""
    for name, kind in (("Task", Task), ("Command", Command)):
        assert pickle.loads(f"chpcdistill.sweep.jobs.task\n{name}\n.".encode()) is kind
