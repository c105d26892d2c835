"""One process a run folder: who is refused, who takes over, and that two never both go on."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpcdistill.errors import UserError
from hpcdistill.training import lock as lock_module
from hpcdistill.training.lock import Holder, RunLock

FORK = multiprocessing.get_context("fork")
HOUR = 3600
NO_SQUEUE = {"PATH": ""}
JOB = {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "alpha", **NO_SQUEUE}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "lock.json"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for but squeue's answer and the guard: less than 5 s."""
    assert lock_module._GUARD_S + lock_module._SQUEUE_S < 5
    monkeypatch.setattr(RunLock, "_wait_for_change", lambda *_: pytest.fail("it waits for a sign of life"))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def holder_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def elsewhere(path: Path, environ: dict[str, str] | None = None, age: float = 0, **changes: Any) -> Holder:
    """Write the lock of a process of another host, whose last heartbeat was `age` seconds ago."""
    other = Holder.this_process(environ or {})
    other = replace(other, **{"host": "node7", "boot": "another", "process": 4242, **changes})
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (time.time() - age,) * 2)
    return other


@contextmanager
def other_process(path: Path, environ: dict[str, str] | None = None) -> Iterator[tuple[int, Callable[[str], str]]]:
    """A forked process that holds the lock: its number, and `ask` for confirm, release or exit; it says how it went."""
    ours, theirs = FORK.Pipe()

    def work() -> None:
        lock = RunLock(path, environ=environ or NO_SQUEUE)
        lock.take()
        theirs.send("held")
        while (order := theirs.recv()) != "exit":
            try:
                getattr(lock, order)()
                theirs.send("")
            except UserError as error:
                theirs.send(str(error))

    def ask(order: str) -> str:
        ours.send(order)
        assert ours.poll(10)
        answer: str = ours.recv()
        return answer

    process = FORK.Process(target=work)
    process.start()
    try:
        assert ours.poll(10)
        assert ours.recv() == "held"
        assert process.pid is not None
        yield process.pid, ask
    finally:
        process.kill()
        process.join()


# --- refused ---


@pytest.mark.usefixtures("at_once")
def test_the_second_process_is_refused_at_once_and_told_by_whom(path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "SLURM_RESTART_COUNT": "2"}
    with other_process(path, JOB | array) as (process, ask):
        with pytest.raises(UserError) as refused:
            RunLock(path).take()
        for part in (str(path.parent), f"process {process} on {os.uname().nodename}", "SLURM job 17 (array 12_5)"):
            assert part in str(refused.value)
        assert "restart 2" in str(refused.value)
        assert ask("confirm") == ""
        assert ask("release") == ""
        assert not path.exists()
        RunLock(path).take()


@pytest.mark.usefixtures("at_once")
def test_a_living_process_of_this_host_keeps_its_lock_without_heartbeats(path: Path) -> None:
    with other_process(path):
        os.utime(path, (1, 1))
        with pytest.raises(UserError, match="is training this run"):
            RunLock(path, watch=60).take()


def test_no_draft_stays(path: Path) -> None:
    lock = RunLock(path, environ=NO_SQUEUE)
    lock.take()
    elsewhere(path)
    with pytest.raises(UserError):
        RunLock(path, environ=NO_SQUEUE).take()
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock.json.guard", "lock.json"]


# --- a later start of the same job ---


@pytest.mark.usefixtures("at_once")
def test_a_later_start_of_the_job_takes_over_and_the_orphan_ends_at_its_next_save(path: Path) -> None:
    with other_process(path, JOB) as (process, ask):
        with pytest.raises(UserError):
            RunLock(path, environ=JOB).take()
        later = RunLock(path, environ=JOB | {"SLURM_RESTART_COUNT": "1"}, watch=60)
        later.take()
        said = ask("confirm")
        assert f"process {os.getpid()} on {os.uname().nodename} of SLURM job 17, restart 1 has taken this run" in said
        assert f"process {process} on" in said
        assert ask("release") == ""
        assert holder_of(path)["process"] == os.getpid()  # the orphan has not removed it
        later.confirm()


ELASTIC = {"TORCHELASTIC_RUN_ID": "abc"}


@pytest.mark.parametrize(
    ("before", "after", "takes"),
    [
        (JOB, JOB, False),
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1"}, True),
        (JOB | {"SLURM_RESTART_COUNT": "9"}, JOB | {"SLURM_RESTART_COUNT": "10"}, True),
        (JOB | {"SLURM_RESTART_COUNT": "2"}, JOB | {"SLURM_RESTART_COUNT": "1"}, False),
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "18"}, False),
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "beta"}, False),
        ({}, {"SLURM_RESTART_COUNT": "1"}, False),
        (ELASTIC, ELASTIC, False),
        (ELASTIC, ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        (ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}, ELASTIC, False),
        (ELASTIC, {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        (JOB | ELASTIC, JOB | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        # A requeued job begins torchrun's count anew.
        (
            JOB | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "3"},
            JOB | ELASTIC | {"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "0"},
            True,
        ),
        (
            JOB | ELASTIC | {"SLURM_RESTART_COUNT": "1"},
            JOB | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "3"},
            False,
        ),
        (JOB | ELASTIC, JOB | ELASTIC | {"SLURM_JOB_ID": "18", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
    ],
)
def test_which_start_is_a_later_one(path: Path, before: dict[str, str], after: dict[str, str], takes: bool) -> None:
    elsewhere(path, before)
    lock = RunLock(path, environ=after | NO_SQUEUE, watch=60, settle=0)
    if takes:
        lock.take()
        assert holder_of(path)["process"] == os.getpid()
    else:
        with pytest.raises(UserError, match="process 4242 on node7"):
            lock.take()
        assert holder_of(path)["process"] == 4242


# --- gone ---


def test_a_killed_holder_keeps_nobody_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with other_process(path) as (process, _):
        os.kill(process, signal.SIGKILL)  # and not waited for: a zombie has a number and a start
        until(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        lock = RunLock(path, watch=60)
        lock.take()
        lock.confirm()
    assert f"taking over from process {process} on" in capsys.readouterr().err
    again = holder_of(path)
    lock.release()
    again["process"] = process  # by now reaped
    path.write_text(json.dumps(again))
    RunLock(path, watch=60).take()


def test_a_number_that_another_process_has_got_is_not_the_holder(path: Path) -> None:
    with other_process(path):
        content = holder_of(path)
        path.write_text(json.dumps(content | {"started": content["started"] - 1}))
        RunLock(path, watch=60).take()


@pytest.mark.parametrize("change", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"host": "node7"}])
def test_processes_that_cannot_be_seen_from_here_are_not_judged(path: Path, change: dict[str, str]) -> None:
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    here = Holder.this_process(NO_SQUEUE)
    elsewhere(path, host=here.host, boot=here.boot, process=ended.pid)
    RunLock(path, watch=60, environ=NO_SQUEUE).take()
    elsewhere(path, **{"host": here.host, "boot": here.boot, "process": ended.pid, **change})
    with pytest.raises(UserError):
        RunLock(path, watch=60, environ=NO_SQUEUE).take()


@pytest.mark.parametrize("age", [HOUR, -HOUR])  # minus: that host's clock is ahead, and the file system took its time
def test_five_minutes_without_a_heartbeat_and_none_while_watched(path: Path, age: float) -> None:
    elsewhere(path, age=age)
    last = path.stat().st_mtime
    lock = RunLock(path, environ=NO_SQUEUE, watch=0.1, settle=0)
    lock.take()
    lock.confirm()
    assert holder_of(path)["process"] == os.getpid()
    assert abs(path.stat().st_mtime - last) > HOUR / 2  # its own heartbeat


@pytest.mark.parametrize("age", [HOUR, -HOUR])
def test_a_clock_that_is_wrong_does_not_make_a_live_lock_stale(
    path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    """It beats, by its own clock, whenever the one who watches sleeps."""
    other = elsewhere(path, age=age)
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: os.utime(path, (time.time() - age,) * 2))
    with pytest.raises(UserError, match="process 4242 on node7"):
        RunLock(path, environ=NO_SQUEUE, watch=5, settle=0).take()
    assert holder_of(path)["token"] == other.token


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("age", [0, 250])
def test_a_recent_heartbeat_is_believed_at_once_whatever_this_hosts_clock_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    elsewhere(path, age=age)
    wrong = time.time() + 100 * HOUR
    monkeypatch.setattr(time, "time", lambda: wrong)
    with pytest.raises(UserError, match="process 4242 on node7"):
        RunLock(path, environ=NO_SQUEUE, watch=60).take()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\0" * 300, b"[]", b"null", b'{"process": 1, "host": "node1"}', b'{"process": "x"}', b"\xff\xfe"],
)
def test_a_broken_lock_does_not_block(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    lock = RunLock(path, watch=60, settle=0)
    lock.take()
    lock.confirm()


def test_a_number_that_no_process_can_have_is_broken_too(path: Path) -> None:
    for process in (0, -1, "1"):
        elsewhere(path, process=process)
        RunLock(path, watch=60, settle=0, environ=NO_SQUEUE).take()


def squeue(path: Path, answer: str) -> dict[str, str]:
    """The environment of a process whose `squeue`, beside the run, answers so and notes what it was asked."""
    program = path.with_name("squeue")
    program.write_text(f'#!/bin/sh\necho "$@" >>"$0.asked"\n{answer}\n')
    program.chmod(0o755)
    return {"SLURM_CLUSTER_NAME": "alpha", "PATH": f"{path.parent}:/usr/bin:/bin"}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo COMPLETING", False),
        ("printf 'COMPLETED\\nRUNNING\\n'", False),
        ("", True),
        ("echo COMPLETED", True),
        ("echo TIMEOUT", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        ("sleep 1000; exit 0", False),  # its child keeps the pipe open
    ],
)
def test_a_job_that_slurm_does_not_know_any_more_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool
) -> None:
    monkeypatch.setattr(lock_module, "_SQUEUE_S", 0.5 if "sleep" in answer else 10.0)
    elsewhere(path, JOB)
    lock = RunLock(path, environ=squeue(path, answer) | {"SLURM_JOB_ID": "18"}, watch=60, settle=0)
    if gone:
        lock.take()
    else:
        with pytest.raises(UserError, match="process 4242 on node7 of SLURM job 17"):
            lock.take()
    assert "--jobs=17" in path.with_name("squeue.asked").read_text()


def test_a_users_defaults_of_squeue_hide_no_job(path: Path) -> None:
    elsewhere(path, JOB)
    environ = squeue(path, '[ -n "$SQUEUE_USERS" ] || echo RUNNING') | {"SQUEUE_USERS": "nobody"}
    with pytest.raises(UserError, match="process 4242 on node7 of SLURM job 17"):
        RunLock(path, environ=environ, watch=60, settle=0).take()


@pytest.mark.parametrize("change", [{"cluster": "beta"}, {"cluster": None}, {"user": 12345}, {"job": None}])
def test_slurm_is_not_asked_about_what_it_may_not_know(path: Path, change: dict[str, Any]) -> None:
    elsewhere(path, JOB, **change)
    with pytest.raises(UserError, match="process 4242"):
        RunLock(path, environ=squeue(path, ""), watch=60).take()
    assert not path.with_name("squeue.asked").exists()


# --- heartbeat, end ---


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "run lock" and thread.is_alive()]


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    gc.collect()
    until(lambda: not beating())


def test_the_heartbeat_survives_a_full_disk_and_ends_with_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(path, heartbeat=0.005)
    lock.take()
    os.utime(path, (1, 1))
    until(lambda: path.stat().st_mtime > 1)
    calls = []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", full)
        until(lambda: len(calls) >= 3)
        lock.confirm()
    os.utime(path, (1, 1))
    until(lambda: path.stat().st_mtime > 1)
    lock.release()
    assert not path.exists()
    until(lambda: not beating())


def test_a_lost_lock_is_not_kept_alive(path: Path) -> None:
    lock = RunLock(path, heartbeat=0.005)
    lock.take()
    elsewhere(path, age=HOUR)
    until(lambda: not beating())
    assert path.stat().st_mtime < time.time() - HOUR / 2
    with pytest.raises(UserError, match="process 4242 on node7 has taken this run over"):
        lock.confirm()
    lock.release()
    assert holder_of(path)["process"] == 4242


@pytest.mark.parametrize("content", [None, b""])
def test_a_lock_that_somebody_removed_is_written_again(path: Path, content: bytes | None) -> None:
    lock = RunLock(path)
    lock.take()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    lock.confirm()
    assert holder_of(path)["process"] == os.getpid()
    path.unlink()
    path.parent.rename(path.parent.with_name("moved"))
    lock.confirm()  # what is wrong with the folder is for the save to say
    path.parent.with_name("moved").rename(path.parent)


def test_a_lock_that_was_never_taken_confirms(path: Path) -> None:
    elsewhere(path)
    lock = RunLock(path)
    lock.confirm()
    lock.release()
    assert holder_of(path)["process"] == 4242


def test_the_same_process_takes_it_again_and_a_forgotten_lock_is_released(path: Path) -> None:
    first = RunLock(path)
    first.take()
    second = RunLock(path)
    second.take()
    del first
    gc.collect()
    second.confirm()
    assert path.exists()
    del second
    gc.collect()
    assert not path.exists()


def test_a_forked_process_leaves_its_parents_lock_alone(path: Path) -> None:
    lock = RunLock(path)
    lock.take()

    def child() -> None:
        elsewhere(path.with_name("other.json"))
        lock.confirm()
        lock.release()
        sys.exit(0 if path.exists() and not beating() else 1)

    process = FORK.Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    lock.confirm()
    assert path.exists()


ENDS = """
import sys
from pathlib import Path
from hpcdistill.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
assert Path(sys.argv[1]).exists()
sys.exit(2)
"""


def test_a_command_that_ends_by_an_error_releases_it_and_is_not_held_up(path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS, str(path)], timeout=30, check=False)
    assert ended.returncode == 2
    assert not path.exists()


# --- contenders ---

ROUNDS = 25


def contend(
    path: Path, prepare: Callable[[], None], before: Callable[[], None], contenders: int = 3, settle: float = 0.0
) -> list[list[str]]:
    """Let processes want the lock at the same moment, ROUNDS times; by round, what each says who held it in the end."""
    barrier = FORK.Barrier(contenders, timeout=30)
    results: multiprocessing.Queue[tuple[int, str]] = FORK.Queue()

    def work(number: int) -> None:
        before()
        for turn in range(ROUNDS):
            if number == 0:
                prepare()
            barrier.wait()
            lock = RunLock(path, environ=NO_SQUEUE, settle=settle)
            try:
                lock.take()
                said = "taken"
            except UserError as error:
                said = str(error)
            barrier.wait()
            try:
                lock.confirm()
            except UserError:
                said = "ended before its first save"
            results.put((turn, said))
            barrier.wait()
            lock.release()
            barrier.wait()

    processes = [FORK.Process(target=work, args=(number,)) for number in range(contenders)]
    for process in processes:
        process.start()
    rounds: list[list[str]] = [[] for _ in range(ROUNDS)]
    try:
        for _ in range(ROUNDS * contenders):
            turn, said = results.get(timeout=30)
            rounds[turn].append(said)
    except queue.Empty:
        pytest.fail(f"a contender has ended: {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return rounds


def nothing() -> None:
    pass


def test_of_those_who_find_no_lock_one_gets_it(path: Path) -> None:
    for said in contend(path, nothing, nothing):
        assert said.count("taken") == 1
        assert sum("is training this run" in one for one in said) == 2


@pytest.fixture
def dead(path: Path) -> Callable[[], None]:
    """Write the lock of a process of this host that has ended."""
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    here = Holder.this_process(NO_SQUEUE)
    return lambda: void(elsewhere(path, host=here.host, boot=here.boot, process=ended.pid))


def void(_: object) -> None:
    pass


def test_of_those_who_find_a_dead_lock_one_gets_it(path: Path, dead: Callable[[], None]) -> None:
    look = lock_module._look

    def slow(place: Path) -> Any:
        seen = look(place)
        time.sleep(0.004)  # room for another between the look and the taking
        return seen

    def before() -> None:
        lock_module._look = slow

    for said in contend(path, dead, before):
        assert said.count("taken") == 1
        assert sum("is training this run" in one for one in said) == 2


def test_one_goes_on_where_the_file_system_has_no_locks(path: Path, dead: Callable[[], None]) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def before() -> None:
        fcntl.lockf = refuse

    for said in contend(path, dead, before, settle=0.02):
        assert said.count("taken") == 1


def test_one_goes_on_where_there_are_no_hard_links_either(path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def before() -> None:
        fcntl.lockf = os.link = refuse

    for said in contend(path, nothing, before, settle=0.02):
        assert said.count("taken") == 1


def test_a_draft_that_the_holder_cleared_away_is_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, cleared = os.link, []

    def clearing(draft: Path, target: Path) -> None:
        if not cleared:
            cleared.append(draft.unlink())
        link(draft, target)

    monkeypatch.setattr(os, "link", clearing)
    lock = RunLock(path)
    lock.take()
    lock.confirm()
    assert cleared
