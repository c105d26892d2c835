"""Each state that a sweep's run can be in, made by hand: its files, and what SLURM says of its job."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import ROWS, run_in_terminal

from hpcdistill.errors import UserError
from hpcdistill.sweep import status_command
from hpcdistill.sweep.logs import cause, read_progress
from hpcdistill.sweep.slurm_queue import Job, Queue
from hpcdistill.sweep.status import TaskStatus, task_statuses
from hpcdistill.sweep.status_table import duration

CLONE = Path(__file__).resolve().parents[2]
NOW = time.time()
SUBMITTED = NOW - 3600
SCRIPT = "/home/u/sweeps/submissions/one/jobs/a/submission_file_1.sh"


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Said(Queue):
    """A SLURM that says what it is told to; None: there is none."""

    def __init__(self, *jobs: Job, answers: bool = True) -> None:
        super().__init__({"PATH": ""})
        self.jobs, self._answers = {job.id: job for job in jobs}, answers
        self.cancelled: list[str] = []
        self.asked = 0

    def ask(self, ids: Collection[str], past: Collection[str] | None = None) -> dict[str, Job]:
        self.asked += 1
        self.answers = self._answers
        return {job: self.jobs[job] for job in ids if job in self.jobs}


class Sweep:
    """A sweep's files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder / "sweeps", folder / "runs"
        self.folder.mkdir()
        self.runs.mkdir()

    def submission(self, jobs: dict[str, str], name: str = "one", at: float = SUBMITTED, **more: Any) -> None:
        keys = more.pop("keys", list(jobs))
        write(
            self.folder / "submissions" / name / "plan.json",
            {
                "time": utc(at),
                "grids": more.pop("grids", {"g": {"cells": [{"title": k, "seed": 0, "key": k} for k in keys]}}),
                "runs": more.pop("described", {key: {"name": f"toy-{key}", "steps": 1000} for key in keys}),
                "jobs": jobs,
                **more,
            },
        )

    def state(self, key: str, state: str, **more: Any) -> None:
        run = self.runs / f"toy-{key}"
        values = {"key": key, "name": "toy", "state": state, "attempt": 1, "job": None, "host": "node1", "pid": 1}
        values |= {"started": utc(NOW - 1800), "ended": None if state == "running" else utc(NOW - 60)}
        values |= {"run": str(run), "code": None, "message": None}
        values |= {"log": str(self.folder / "tasks" / key / "attempt-1" / "rank0.log"), **more}
        write(self.folder / "tasks" / key / "state.json", values)

    def log(self, key: str, text: str) -> Path:
        file = self.folder / "tasks" / key / "attempt-1" / "rank0.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def result(self, name: str, key: str | None, value: float = 31.5) -> None:
        metrics = {"student/other/psnr": 1.0, "student/set5/psnr": value}
        content = {"name": "toy", "steps": 1000, "last": {"step": 1000, "metrics": metrics}}
        content |= {"protocol": {"selects": "student/set5/psnr"}} | ({"key": key} if key else {})
        write(self.runs / name / "result.json", content)

    def metrics(self, name: str, rows: list[dict[str, Any]], rest: str = "") -> Path:
        file = self.runs / name / "metrics.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
        return file

    def look(self, key: str, queue: Queue | None = None) -> TaskStatus:
        [status] = task_statuses([key], self.folder, self.runs, queue or Said())
        return status


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def age(file: Path, seconds: float) -> None:
    """By the clock and not by NOW: long before this file's tests, another file's may have been at work."""
    os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives, and goes with the test."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as started:
        try:
            yield started
        finally:
            started.kill()


def job(state: str, number: str = "17_3", *, submitted: float = SUBMITTED, command: str = SCRIPT, **more: Any) -> Job:
    return Job(number, state, submitted, command=command, **more)


# The files are believed before SLURM


def test_a_result_is_believed_before_everything_else(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    sweep.state("a", "running", job="17_3", attempt=2)
    sweep.result("toy-12345678", "a")
    status = sweep.look("a", Said(job("FAILED")))
    assert (status.state, status.step, status.steps, status.attempts) == ("finished", 1000, 1000, 2)
    assert status.metric == ("student/set5/psnr", 31.5)
    assert status.run == sweep.runs / "toy-12345678"


def test_an_older_result_without_a_key_is_found_by_the_state(sweep: Sweep) -> None:
    sweep.state("a", "finished")
    sweep.result("toy-a", None)
    assert sweep.look("a").state == "finished"


def test_finished_without_a_result_is_missing(sweep: Sweep) -> None:
    sweep.state("a", "finished")
    status = sweep.look("a")
    assert status.state == "missing"
    assert "has no result.json now" in str(status.reason)


def test_what_was_never_submitted_is_missing(sweep: Sweep) -> None:
    assert sweep.look("a") == TaskStatus("a", "a", "missing")


@pytest.mark.parametrize("state", ["failed", "stopped", "blocked"])
def test_an_end_that_was_written_down_counts(sweep: Sweep, state: str) -> None:
    sweep.submission({"a": "17_3"})
    sweep.state("a", state, job="17_3", message="error: because")
    status = sweep.look("a", Said(job("FAILED")))
    assert (status.state, status.reason, status.job) == (state, "because", "17_3")


def test_runs_that_were_moved_are_found(sweep: Sweep) -> None:
    sweep.state("a", "stopped", run="/elsewhere/runs/toy-a")
    sweep.metrics("toy-a", [{"step": 7, "images": 28, "seconds": 1.0}])
    assert sweep.look("a").step == 7


# SLURM's word


def test_a_waiting_job_is_queued_and_says_what_for(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    status = sweep.look("a", Said(job("PENDING", reason="Dependency")))
    assert (status.state, status.reason, status.job, status.name) == ("queued", "Dependency", "17_3", "toy-a")


@pytest.mark.parametrize("before", ["running", "stopped", "failed"])
def test_a_requeued_job_is_queued_whatever_it_said_before(sweep: Sweep, before: str) -> None:
    """After the loss of its node state.json says running; the requeued job has a new time of submission."""
    sweep.submission({"a": "17_3"})
    sweep.state("a", before, job="17_3")
    status = sweep.look("a", Said(job("PENDING", submitted=NOW - 5, reason="BeginTime")))
    assert (status.state, status.attempts) == ("queued", 1)


def test_a_requeued_job_that_has_begun_again_runs(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    sweep.state("a", "stopped", job="17_3")  # ended a minute ago
    assert sweep.look("a", Said(job("RUNNING", started=NOW - 5))).state == "running"
    assert sweep.look("a", Said(job("COMPLETING", started=NOW - 1800))).state == "stopped"


def test_held_and_hopeless_jobs_say_what_to_do(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    held = sweep.look("a", Said(job("PENDING", reason="job requeued in held state")))
    assert held.state == "queued"
    assert "scontrol release 17_3" in str(held.reason)
    for state in ("PENDING", "CANCELLED"):  # it stays in the queue, or is taken from it with kill-on-invalid-dep
        hopeless = sweep.look("a", Said(job(state, reason="DependencyNeverSatisfied")))
        assert hopeless.state == "blocked"


@pytest.mark.parametrize(
    ("slurm", "state", "said"),
    [
        ("NODE_FAIL", "failed", "died without a word (SLURM: NODE_FAIL, its node was lost)"),
        ("OUT_OF_MEMORY", "failed", "died without a word (SLURM: OUT_OF_MEMORY, out of memory)"),
        ("TIMEOUT", "failed", "died without a word (SLURM: TIMEOUT, its time was up before it had saved)"),
        ("CANCELLED", "stopped", "cancelled (job 17_3)"),
    ],
)
def test_a_run_without_last_words_has_slurm_s(sweep: Sweep, slurm: str, state: str, said: str) -> None:
    sweep.submission({"a": "17_3"})
    sweep.state("a", "running", job="17_3")
    status = sweep.look("a", Said(job(slurm)))
    assert (status.state, status.reason) == (state, said)


def test_a_job_that_ended_before_its_run_began(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    failed = sweep.look("a", Said(job("FAILED", reason="exit 127:0")))
    assert (failed.state, failed.reason) == (
        "failed",
        "job 17_3 ended before the run began (FAILED, exit 127:0); see the job's own log",
    )
    cancelled = sweep.look("a", Said(job("CANCELLED")))
    assert (cancelled.state, cancelled.reason) == ("stopped", "job 17_3 was cancelled before it began")


def test_without_accounting_a_cancelled_job_is_neither_done_nor_queued(sweep: Sweep) -> None:
    sweep.submission({"waited": "17_3", "ran": "17_4"})
    sweep.state("ran", "running", job="17_4")
    assert sweep.look("waited", Said()).state == "missing"
    ran = sweep.look("ran", Said())
    assert (ran.state, ran.reason) == ("failed", "died without a word (job 17_4 is gone)")


def test_an_earlier_failure_does_not_hide_the_job_submitted_since(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    sweep.submission({"a": "18_0"}, "two", at=NOW - 20)
    sweep.state("a", "failed", job="17_3", message="error: because")  # began half an hour ago
    script = SCRIPT.replace("one", "two")
    assert sweep.look("a", Said(job("PENDING", "18_0", submitted=NOW - 20, command=script))).state == "queued"
    assert sweep.look("a", Said(job("RUNNING", "18_0", submitted=NOW - 20, command=script))).reason == "starting"
    gone = sweep.look("a", Said())
    assert gone.state == "missing"
    assert "18_0 is gone" in str(gone.reason)


# Job ids that mean another job


def test_a_cluster_set_up_anew_has_another_job_of_that_number(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3", "b": "17_4"})
    sweep.state("b", "running", job="17_4")
    another = "/home/u/sweeps/submissions/two/jobs/a/submission_file_2.sh"
    mine = Said(job("RUNNING"), job("RUNNING", "17_4"))
    theirs = Said(job("RUNNING", command=another), job("RUNNING", "17_4", command=another))
    assert [sweep.look(key, mine).state for key in "ab"] == ["running", "running"]
    assert [sweep.look(key, theirs).state for key in "ab"] == ["missing", "failed"]
    assert sweep.look("a", theirs).job is None


def test_a_job_without_a_script_is_told_by_its_time(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    assert sweep.look("a", Said(job("RUNNING", command="", submitted=SUBMITTED + 10))).state == "running"
    assert sweep.look("a", Said(job("RUNNING", command="", submitted=SUBMITTED - 86400))).state == "missing"
    assert sweep.look("a", Said(job("RUNNING", command="", submitted=SUBMITTED + 86400))).state == "missing"


def test_one_submission_s_name_may_begin_another_s(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    second = SCRIPT.replace("/one/", "/one-2/")
    assert sweep.look("a", Said(job("RUNNING", command=second))).state == "missing"


def test_a_new_job_of_an_old_number_is_not_judged_by_the_old_state(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"}, at=NOW - 10)
    sweep.state("a", "failed", job="17_3", started=utc(NOW - 86400), message="error: long ago")
    ended = sweep.look("a", Said(job("FAILED", submitted=NOW - 10, reason="exit 1:0")))
    assert "before the run began" in str(ended.reason)


def test_a_hopeless_job_left_in_the_queue_does_not_hide_its_retry(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"}, at=NOW - 7200)
    sweep.submission({"a": "18_0"}, "two", at=NOW - 3600)
    sweep.state("a", "failed", job="18_0", message="error: because")
    hopeless = job("PENDING", submitted=NOW - 7200, reason="DependencyNeverSatisfied")
    assert sweep.look("a", Said(hopeless)).state == "failed"


def test_clocks_may_differ_by_some_minutes(sweep: Sweep) -> None:
    """A node whose clock is two minutes behind the login node's begins its job before it was submitted."""
    sweep.submission({"a": "17_3"}, at=NOW - 600)
    sweep.state("a", "failed", job="17_3", started=utc(NOW - 720), message="error: because")
    assert sweep.look("a", Said()).reason == "because"


def test_accounting_is_not_asked_about_ends_that_are_known(sweep: Sweep) -> None:
    asked: list[tuple[set[str], set[str]]] = []

    class Asked(Said):
        def ask(self, ids: Collection[str], past: Collection[str] | None = None) -> dict[str, Job]:
            asked.append((set(ids), set(past or ())))
            return super().ask(ids, past)

    sweep.submission({"failed": "17_0", "running": "17_1", "new": "17_2", "finished": "17_3"})
    sweep.submission({"again": "16_4"}, "earlier", at=NOW - 7200)
    sweep.submission({"again": "17_4"}, "later", at=NOW - 60)
    sweep.state("failed", "failed", job="17_0")
    sweep.state("running", "running", job="17_1")
    sweep.state("again", "failed", job="16_4")
    sweep.result("x", "finished")
    task_statuses(["failed", "running", "new", "finished", "again"], sweep.folder, sweep.runs, Asked())
    assert asked == [({"17_0", "17_1", "17_2", "16_4", "17_4"}, {"17_1", "17_2", "16_4", "17_4"})]


# Without SLURM


def test_where_slurm_does_not_answer_nothing_is_taken_for_dead(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3", "b": "17_4"})
    sweep.state("b", "running", job="17_4")
    mute = Said(answers=False)
    assert sweep.look("a", mute).state == "queued"
    assert "does not answer" in str(sweep.look("a", mute).reason)
    assert sweep.look("b", mute).state == "running"


def test_the_lock_s_heartbeat_tells_of_other_hosts(sweep: Sweep) -> None:
    sweep.state("a", "running")
    lock = sweep.runs / "toy-a" / "lock.json"
    write(lock, {})
    assert sweep.look("a").state == "running"
    age(lock, 1200)
    status = sweep.look("a")
    assert status.state == "failed"
    assert "no sign of life from node1 for 20 min" in str(status.reason)


def test_a_process_of_this_host_is_looked_for(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    here = {"host": socket.gethostname(), "pid": process.pid}
    sweep.state("a", "running", **here, started=utc(time.time()))
    assert sweep.look("a").state == "running"
    # The number has been given to a later process.
    sweep.state("a", "running", **here, started=utc(NOW - 86400))
    assert f"process {process.pid} is gone" in str(sweep.look("a").reason)
    sweep.state("a", "running", **here, started=utc(time.time()))
    process.kill()
    process.wait()
    sweep.log("a", "loading\nKilled\n")
    status = sweep.look("a")
    assert status.state == "failed"
    assert status.reason == f"died without a word (process {process.pid} is gone); last line of its log: Killed"


def test_what_the_local_runner_has_not_come_to_is_queued(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    local = {"local": {"host": socket.gethostname(), "pid": process.pid}, "queue": ["a", "b"]}
    sweep.submission({}, at=time.time(), keys=["a", "b"], **local)
    sweep.state("b", "failed", started=utc(time.time() + 1), message="error: because")
    assert [sweep.look(key).state for key in "ab"] == ["queued", "failed"]
    process.kill()
    process.wait()
    assert sweep.look("a").state == "missing"


def test_a_local_runner_of_another_host_counts_while_it_gives_signs(sweep: Sweep) -> None:
    sweep.submission({}, at=NOW - 7200, keys=["a"], local={"host": "node1", "pid": 7}, queue=["a"])
    assert sweep.look("a").state == "missing", "two hours without a sign"
    alive = sweep.folder / "submissions" / "one" / "alive"
    alive.touch()
    assert sweep.look("a").state == "queued"
    age(alive, 1200)
    assert sweep.look("a").state == "missing"
    sweep.submission({}, "two", at=time.time(), keys=["a"], local={"host": "node1", "pid": 7}, queue=["a"])
    assert sweep.look("a").state == "queued", "it has just begun"


def test_a_run_of_another_host_without_a_run_folder_is_known_by_its_state_and_log(sweep: Sweep) -> None:
    sweep.state("a", "running", run=None, log=None)
    state = sweep.folder / "tasks" / "a" / "state.json"
    assert sweep.look("a").state == "running"
    age(state, 1200)
    assert "no sign of life from node1 for 20 min" in str(sweep.look("a").reason)
    sweep.state("b", "running", run=None)
    log = sweep.log("b", "staging\n")
    age(sweep.folder / "tasks" / "b" / "state.json", 1200)
    assert sweep.look("b").state == "running"
    age(log, 900)
    assert "no sign of life from node1 for 15 min" in str(sweep.look("b").reason)


# Damaged files


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", '"text"'])
def test_damaged_files_make_their_run_failed_and_are_named(sweep: Sweep, content: str) -> None:
    write(sweep.folder / "tasks" / "a" / "state.json", content)
    status = sweep.look("a")
    assert status.state == "failed"
    assert str(status.reason).startswith(f"{sweep.folder / 'tasks/a/state.json'}: damaged (")
    sweep.state("b", "finished")
    write(sweep.runs / "toy-b" / "result.json", content)
    status = sweep.look("b")
    assert status.state == "failed"
    assert str(status.reason).startswith(f"{sweep.runs / 'toy-b/result.json'}: damaged (")


def test_a_damaged_state_does_not_hide_a_result(sweep: Sweep) -> None:
    write(sweep.folder / "tasks" / "a" / "state.json", "{")
    sweep.result("toy-a", "a")
    assert sweep.look("a").state == "finished"


def test_a_damaged_result_outside_the_folder_of_runs_is_damaged_too(sweep: Sweep) -> None:
    elsewhere = sweep.folder / "elsewhere" / "toy-a"  # the sweep was submitted with runs=...
    sweep.state("a", "finished", run=str(elsewhere))
    write(elsewhere / "result.json", {"key": "a", "last": 3})
    status = sweep.look("a")
    assert (status.state, status.damaged) == ("failed", True)
    assert str(status.reason).startswith(f"{elsewhere / 'result.json'}: damaged (")


def test_a_damaged_state_does_not_hide_a_result_outside_the_folder_of_runs(sweep: Sweep) -> None:
    elsewhere = sweep.folder / "elsewhere"
    write(sweep.folder / "tasks" / "a" / "state.json", "{")
    write(sweep.folder / "tasks" / "a" / "config.json", {"runs": str(elsewhere)})
    sweep.result("toy-a", "a")
    sweep.runs.rename(elsewhere)
    assert sweep.look("a").state == "finished"


def test_values_of_another_kind_are_survived(sweep: Sweep) -> None:
    sweep.submission({"a": "17_3"})
    sweep.state("a", "failed", attempt="two", started=[], run=7, log=3, message=None, job=None)
    assert sweep.look("a", Said(answers=False)).state in ("queued", "failed")
    sweep.state("b", "dreaming")
    assert "'dreaming' is unknown" in str(sweep.look("b").reason)


# Progress and reasons


def test_progress_by_hand(sweep: Sweep) -> None:
    """100 steps in 40 s at the end, 2.5 steps/s, after a slower start; 1000 steps: 200 s are left of step 500."""
    rows: list[dict[str, Any]] = [{"step": step, "images": step, "seconds": step} for step in range(10, 300, 10)]
    rows += [{"step": 290, "student/other/psnr": 20.0, "student/set5/psnr": 25.0}]
    rows += [{"step": step, "images": step, "seconds": step} for step in range(300, 400, 10)]
    rows += [{"step": 400 + 10 * n, "images": 0, "seconds": 1000 + 4.0 * n} for n in range(1, 11)]
    sweep.metrics("toy-a", rows, rest='{"step": 510, "images": 5')
    sweep.submission({"a": "17_3"})
    write(sweep.folder / "tasks" / "a" / "config.json", {"data": {"eval": {"set5": "x", "other": "y"}}, "eval": {}})
    sweep.state("a", "running", job="17_3")
    status = sweep.look("a", Said(job("RUNNING")))
    assert (status.step, status.steps) == (500, 1000)
    assert status.rate == pytest.approx(2.5)
    assert status.left_s == pytest.approx(200.0)
    assert status.metric == ("student/set5/psnr", 25.0)


def test_only_the_end_of_a_long_log_is_read(sweep: Sweep) -> None:
    row = {"images": 0, "padding": "x" * 900}
    rows = [{"step": step, "seconds": 2.0 * step, **row} for step in range(2000)]
    file = sweep.metrics("toy-a", rows)
    assert file.stat().st_size > 1 << 20
    progress = read_progress(file)
    assert (progress.step, progress.metrics) == (1999, None)
    assert progress.rate == pytest.approx(0.5)


def test_the_steps_of_a_configuration_without_a_plan(sweep: Sweep) -> None:
    write(sweep.folder / "tasks" / "a" / "config.json", {"train": {"steps": 40}})
    sweep.state("a", "stopped")
    sweep.metrics("toy-a", [{"step": 20, "images": 80, "seconds": 1.0}])
    assert sweep.look("a").steps == 40


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "step 1\nerror: data.train: no such folder\nsrun: error: node1: task 0: Exited with exit code 2\n",
            "data.train: no such folder",
        ),
        ("step 1\nsrun: error: node1: task 0: Exited with exit code 2\n", "step 1"),
        ("\x1b[1;31mrank 1: error: out of disk\x1b[0m\nrank 0 says goodbye\n", "out of disk"),
        (
            "[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n[rank0]: RuntimeError: CUDA error: bad\n"
            "E1122 02:00:00.1 140 torch/distributed/elastic/multiprocessing/api.py:869] failed (exitcode: 1)\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: it\n=====\n  exitcode  : 1 (pid: 5)\n",
            "RuntimeError: CUDA error: bad",
        ),
        (
            "torch.cuda.OutOfMemoryError: CUDA out of memory.\ncleaning up\n",
            "torch.cuda.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            "working\nslurmstepd: error: Detected 1 oom_kill event in StepId=5.0.\nbye\n",
            "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.",
        ),
        ("10%\r20%\r30%\n", "30%"),
        ("", None),
    ],
)
def test_the_line_that_says_why(sweep: Sweep, log: str, said: str | None) -> None:
    assert cause(sweep.log("a", log)) == said


def test_the_log_says_more_than_a_goodbye(sweep: Sweep) -> None:
    sweep.log("a", "Traceback (most recent call last):\nKeyError: 'x'\nterminated\n")
    sweep.state("a", "failed", message="terminated", code=1)
    assert sweep.look("a").reason == "KeyError: 'x'"
    sweep.state("b", "failed", code=9)
    assert sweep.look("b").reason == "exit code 9"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (59, 61, 3600 * 3 + 300, 86400 * 2 + 3600 * 4 + 59)] == [
        "59 s",
        "1 min",
        "3 h 05",
        "2 d 4 h",
    ]


# The command


def command(sweep: Sweep, *words: str) -> tuple[str, ...]:
    return (*words, "--folder", str(sweep.folder), "--runs", str(sweep.runs))


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_command, "Queue", lambda keep_s=0.0: Said(answers=False))


@pytest.mark.usefixtures("no_slurm")
def test_json_has_every_run_with_its_cells(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [{"title": "a, x4", "seed": 0, "key": "a"}, {"title": "CARN", "seed": 0, "key": None}]
    grids = {"g": {"cells": cells}, "h": {"cells": [{"title": "same", "seed": 1, "key": "a"}]}}
    described = {"a": {"name": "student", "steps": 1000, "teacher": "t"}, "t": {"name": "teacher", "steps": 5}}
    sweep.submission({"a": "17_3"}, grids=grids, described=described)
    sweep.result("teacher-1", "t")
    assert status_command.main([*command(sweep, "--json")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["summary"] == {"finished": 1, "queued": 1}
    assert shown["grids"] == {"g": {"queued": 1}, "h": {"queued": 1}, "teachers": {"finished": 1}}
    teacher, student = shown["runs"]
    assert (teacher["name"], teacher["cells"], teacher["metric"]["value"]) == ("teacher", [], 31.5)
    assert student["cells"] == [
        {"grid": "g", "title": "a, x4", "seed": 0},
        {"grid": "h", "title": "same", "seed": 1},
    ]


@pytest.mark.usefixtures("no_slurm")
def test_cells_of_one_title_are_told_apart_by_their_labels(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        {"title": "x4", "labels": {"student": "x4"}, "seed": 0, "key": "a"},
        {"title": "x4", "labels": {"teacher": "x4"}, "seed": 0, "key": "b"},
    ]
    sweep.submission({}, at=NOW - 9, grids={"g": {"cells": cells}}, keys=["a", "b"])
    again = [cells[0] | {"key": "c"}, cells[1]]  # the grid's first cell is another run now
    sweep.submission({}, "two", at=NOW, grids={"g": {"cells": again}}, keys=["b", "c"])
    assert status_command.main([*command(sweep, "--json")]) == 0
    assert sorted(run["key"] for run in json.loads(capsys.readouterr().out)["runs"]) == ["b", "c"]


@pytest.mark.usefixtures("no_slurm")
def test_what_has_failed_is_shown_with_its_log_and_in_the_exit_code(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.submission({"a": "17_3", "b": "17_4"})
    sweep.state("a", "failed", job="17_3", message="error: no space")
    sweep.log("a", "one\ntwo\nerror: no space\n")
    assert status_command.main([*command(sweep)]) == 1
    shown = capsys.readouterr().out
    assert "no space" in shown
    assert "  two\n" in shown
    assert "g: b" not in shown  # queued: only counted
    status_command.main([*command(sweep, "--all")])
    assert "g: b" in capsys.readouterr().out


REASON = "data.train: /scratch/me/packed/div2k/train is not packed; run `hpcdistill prefetch configs/x4.yaml`"


def failed_runs(sweep: Sweep, count: int) -> None:
    keys = [f"k{number}" for number in range(count)]
    cells = [{"title": f"FSRCNN with a privileged teacher, x{n}", "seed": n, "key": key} for n, key in enumerate(keys)]
    sweep.submission({key: f"17_{number}" for number, key in enumerate(keys)}, grids={"dssd-1": {"cells": cells}})
    for number, key in enumerate(keys):
        sweep.state(key, "failed", job=f"17_{number}", message=f"error: {REASON} number-{number}")
        sweep.log(key, f"one\ntwo\n{'many words of a log ' * 6}and its end-{number}\n")


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
def test_reasons_are_whole_on_narrow_screens(sweep: Sweep, columns: int) -> None:
    failed_runs(sweep, 2)
    arguments = command(sweep, sys.executable, str(CLONE / "slurm/status.py"))
    screen, code = run_in_terminal(arguments, columns, PYTHONPATH=str(CLONE))
    assert code == 1
    assert max(map(len, screen.text.splitlines())) <= columns
    shown = re.sub(r"[\s│]", "", screen.text)
    for number in range(2):
        words = f"{REASON} number-{number}"
        assert re.sub(r"\s", "", words) in shown or all(word in screen.text for word in words.split()), screen.text
        assert f"end-{number}" in screen.text  # of its log
        assert f"17_{number}" in screen.text


def test_more_than_a_screen_keeps_reasons_rather_than_logs(sweep: Sweep) -> None:
    failed_runs(sweep, 30)
    arguments = command(sweep, sys.executable, str(CLONE / "slurm/status.py"))
    screen, _ = run_in_terminal(arguments, 80, PYTHONPATH=str(CLONE))
    assert len(screen.text.splitlines()) < ROWS
    count = screen.text.count("number-")
    assert count >= 3
    assert f"and {30 - count} more; --all" in screen.text
    assert "end-0" not in screen.text


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize("coloured", [False, True])
def test_watching_into_a_file_says_each_change(
    sweep: Sweep, coloured: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if coloured:
        monkeypatch.setenv("FORCE_COLOR", "1")
    sweep.submission({"a": "17_3"})
    sweep.state("a", "running", host=socket.gethostname(), pid=os.getpid(), started=utc(NOW - 5))
    seen: list[str] = []

    def wait(seconds: float) -> None:
        seen.append(capsys.readouterr().out)
        if len(seen) == 3:
            sweep.state("a", "failed", message="error: no space")

    monkeypatch.setattr(status_command.time, "sleep", wait)
    assert status_command.main([*command(sweep, "--watch")]) == 1
    last = capsys.readouterr().out
    assert "1 run," in seen[0]
    assert seen[1:] == ["", ""]
    assert "no space" in last
    assert not re.search(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]", seen[0] + last)  # colours end in m; nothing moves the cursor


@pytest.mark.usefixtures("no_slurm")
def test_damaged_plans_are_named_and_their_tasks_shown(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    write(sweep.folder / "submissions" / "bad" / "plan.json", '{"grids": 3}')
    sweep.state("a", "stopped")
    assert status_command.main([*command(sweep, "--json")]) == 1
    shown = json.loads(capsys.readouterr().out)
    [problem] = shown["problems"]
    assert problem.startswith(f"{sweep.folder / 'submissions/bad/plan.json'}: cannot be read")
    assert [run["key"] for run in shown["runs"]] == ["a"]


@pytest.mark.usefixtures("no_slurm")
def test_mistakes_are_one_line(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; submit first"):
        status_command.main(["--folder", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"nothing has been submitted"):
        status_command.main([*command(sweep)])
    sweep.submission({"a": "17_3"}, grids={"dssd-1": {"cells": [{"title": "a", "seed": 0, "key": "a"}]}})
    with pytest.raises(UserError, match=r"dsd-1: no such grid in .*; did you mean 'dssd-1'\?"):
        status_command.main([*command(sweep, "dsd-1")])
    with pytest.raises(UserError, match=r"does not say how it was submitted.*dssd-1 --retry failed"):
        status_command.main([*command(sweep, "--retry", "failed")])


def test_cancel_spares_what_other_grids_need(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {
        name: [{"title": key, "seed": 0, "key": key} for key in keys] for name, keys in {"g": "abd", "h": "c"}.items()
    }
    described = {key: {"name": key, "steps": 1, "teacher": "t" if key in "ac" else None} for key in "abcdt"}
    jobs = {"a": "17_0", "b": "17_1", "c": "17_2", "t": "16_0", "d": "17_4"}
    sweep.submission(jobs, grids={name: {"cells": content} for name, content in cells.items()}, described=described)
    sweep.result("d-1", "d")
    slurm = Said(*(job("PENDING", number) for number in jobs.values()))
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "cancel", lambda ids: cancelled.extend(ids) or [])
    monkeypatch.setattr(status_command, "Queue", lambda keep_s=0.0: slurm)
    assert status_command.main([*command(sweep, "g", "--cancel")]) == 0
    assert sorted(cancelled) == ["17_0", "17_1"]
    said = capsys.readouterr().err
    assert "g: a, seed 0: cancelled job 17_0 (queued)" in said
    assert "left alone, other grids need it" in said
    cancelled.clear()
    status_command.main([*command(sweep, "--cancel")])
    assert sorted(cancelled) == ["16_0", "17_0", "17_1", "17_2"]


@pytest.mark.usefixtures("no_slurm")
def test_cancel_stops_local_runs(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    sweep.submission({}, keys=["a"])
    sweep.state("a", "running", host=socket.gethostname(), pid=process.pid, started=utc(time.time()))
    assert status_command.main([*command(sweep, "--cancel")]) == 0
    assert process.wait(20) == -signal.SIGTERM


@pytest.mark.usefixtures("no_slurm")
def test_a_local_runner_s_runs_are_signalled_by_it_alone(
    sweep: Sweep, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = socket.gethostname()
    sweep.submission({}, at=time.time(), keys=["a"], local={"host": here, "pid": os.getpid()}, queue=["a"])
    sweep.state("a", "running", host=here, pid=process.pid, started=utc(time.time()))
    sent: list[tuple[int, int]] = []
    with monkeypatch.context() as patched:  # the fixture kills its process itself
        patched.setattr(os, "kill", lambda number, what: sent.append((number, what)))
        assert status_command.main([*command(sweep, "--cancel")]) == 0
        assert sent == [(os.getpid(), signal.SIGTERM)]
        # The runner has other grids' runs, too.
        sent.clear()
        assert status_command.main([*command(sweep, "g", "--cancel")]) == 0
        assert sent == [(process.pid, signal.SIGTERM)]


@pytest.mark.usefixtures("no_slurm")
def test_retry_submits_with_the_same_words(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    submit = type(sys)("submit")
    submit.main = lambda words: called.append(words) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpcdistill.sweep.submit", submit)
    monkeypatch.setattr("hpcdistill.sweep.submit", submit, raising=False)
    cells = {"cells": [{"title": "a", "seed": 0, "key": "a"}]}
    sweep.submission({}, "one", grids={"g": cells}, command=["g", "--seeds", "1"])
    sweep.submission({}, "two", at=NOW, grids={"g": cells, "h": cells}, command=["g", "h"])
    sweep.submission({}, "three", at=NOW - 7200, grids={"k": cells}, command=["k", "train.steps=3"])
    assert status_command.main([*command(sweep, "--retry", "failed")]) == 0
    assert called == [["g", "h", "--retry", "failed"], ["k", "train.steps=3", "--retry", "failed"]]
    called.clear()
    status_command.main([*command(sweep, "k", "--retry", "missing")])
    assert called == [["k", "train.steps=3", "--retry", "missing"]]


def test_the_script_loads_no_configuration_and_reads_recorded_answers(sweep: Sweep, tmp_path: Path) -> None:
    """The whole command, with programs that print what SLURM 22.05 has printed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = sweep.folder / "submissions" / "one" / "jobs" / "a" / "submission_file_1.sh"
    at = int(SUBMITTED)
    said = {
        "squeue": f"17_[1-2%1]|PENDING|{at}|N/A|JobArrayTaskLimit|{script}\n17_0|RUNNING|{at}|{at}|None|{script}\n",
        "sacct": f"JobID|State|Submit|Start|ExitCode|Reason|SubmitLine\n16_0|NODE_FAIL|{at}|{at}|0:0|None|{script}\n",
    }
    for name, text in said.items():
        (programs / f"{name}.out").write_text(text)
        (programs / name).write_text(f"#!/bin/sh\n/bin/cat {programs / name}.out\n")
        (programs / name).chmod(0o755)
    sweep.submission({"a": "17_0", "b": "17_1", "c": "17_2", "t": "16_0", "u": "15_0"})
    sweep.state("a", "running", job="17_0")
    sweep.state("t", "running", job="16_0")
    code = (
        "import sys, runpy\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'pydantic', 'yaml', 'submitit'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CLONE / "slurm" / "status.py"), *command(sweep, "--json")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": str(programs)},
    )
    assert (done.returncode, done.stderr) == (1, "")
    shown = json.loads(done.stdout)
    assert {run["key"]: run["state"] for run in shown["runs"]} == {
        "a": "running",
        "b": "queued",
        "c": "queued",
        "t": "failed",
        "u": "missing",
    }


def test_many_runs_are_one_question_to_slurm(sweep: Sweep) -> None:
    """So that the status of a thousand takes a second: bench/sweep.py measures it."""
    keys = [f"{number:012x}" for number in range(200)]
    sweep.submission({key: f"17_{number}" for number, key in enumerate(keys)})
    rows = [{"step": step, "images": step, "seconds": float(step)} for step in range(0, 500, 10)]
    for number, key in enumerate(keys):
        sweep.state(key, "running", job=f"17_{number}")
        if number % 2:
            sweep.result(f"toy-{key}", key)
        else:
            sweep.metrics(f"toy-{key}", rows)
    slurm = Said(*(job("RUNNING", f"17_{number}") for number in range(200)))
    statuses = task_statuses(keys, sweep.folder, sweep.runs, slurm)
    assert slurm.asked == 1
    assert [status.state for status in statuses] == ["running", "finished"] * 100


@pytest.mark.usefixtures("no_slurm")
def test_grids_are_named_as_everywhere(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name, a file, one from elsewhere that is gone by now, one that includes others; after options as well."""
    monkeypatch.chdir(tmp_path)
    text = "metrics: {psnr: {of: a/b/psnr, better: higher}}\ncells: [{labels: {a: b}, base: c.yaml}]\n"
    for name in ("g", "h"):
        write(tmp_path / f"configs/grids/{name}.yaml", text)
    write(tmp_path / "both.yaml", "include: [configs/grids/g.yaml, configs/grids/h.yaml]\n")
    cells = {name: {"cells": [{"title": name, "seed": 0, "key": name}]} for name in ("g", "gone")}
    sweep.submission({"g": "1_0", "gone": "1_1"}, grids=cells)

    def shown(*words: str) -> set[str]:
        status_command.main([*words, *command(sweep, "--json")])
        return {run["key"] for run in json.loads(capsys.readouterr().out)["runs"]}

    assert shown() == {"g", "gone"}
    for word in ("g", "g.yaml", "configs/grids/g.yaml", str(tmp_path / "configs/grids/g.yaml"), "both.yaml"):
        assert shown(word) == {"g"}
    assert shown("elsewhere/gone.yaml") == {"gone"}
    assert shown("--grid", "g", "gone") == {"g", "gone"}
    for word in ("h", "gon", "configs/grids/gg.yaml"):
        with pytest.raises(UserError, match=r"no such grid in .*submissions; (did you mean 'g|valid: g, gone)"):
            shown(word)
