"""SLURM's answers, as SLURM 22.05 gave them on a test cluster, told by programs that stand in for its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpcdistill.sweep.slurm_queue import Job, Queue, tasks_of

# Recorded: array 1 of five tasks (done, failed with code 3, running, cancelled, running), array 2 after its tasks one
# to one, array 4 of 901 tasks one at a time, and job 5 requeued.
SQUEUE = """\
1_3|CANCELLED|1795315438|1795315438|None|/home/u/a.sh
1_0|COMPLETED|1795315438|1795315438|None|/home/u/a.sh
2_0|COMPLETED|1795315438|1795315440|None|(null)
1_1|FAILED|1795315438|1795315438|NonZeroExitCode|/home/u/a.sh
2_4|PENDING|1795315438|N/A|Dependency|(null)
2_3|PENDING|1795315438|N/A|DependencyNeverSatisfied|(null)
23_1|CANCELLED|1795316068|N/A|DependencyNeverSatisfied|(null)
4_[1-900%1]|PENDING|1795315438|N/A|JobArrayTaskLimit|(null)
15|PENDING|1795315583|N/A|job requeued in held state|(null)
1_2|RUNNING|1795315438|1795315438|None|/home/u/a.sh
5|PENDING|1795315444|1795315450|BeginTime|(null)
"""
SACCT_HEAD = "JobID|State|Submit|Start|ExitCode|Reason|SubmitLine\n"
SACCT = """\
1_1|FAILED|1795315438|1795315438|3:0|None|sbatch --parsable --mem=100 a.sh
1_3|CANCELLED by 0|1795315438|1795315438|0:0|JobArrayTaskLimit|sbatch --parsable --mem=100 a.sh
5|NODE_FAIL|1795315585|1795315585|0:0|None|sbatch --parsable --mem=100 --wrap sleep 300 | tee x
23_0|CANCELLED|1795316068|None|0:0|Dependency|sbatch -d aftercorr:22 --kill-on-invalid-dep=yes --wrap sleep 1
27_[0-5%1]|PENDING|1795316076|Unknown|0:0|None|sbatch --array=0-5%1 --wrap sleep 30
"""
Slurm = Callable[..., Queue]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """Makes a queue whose PATH has nothing but the programs given: name -> what it prints, or (output, error, code)."""

    def make(*, keep_s: float = 0.0, **programs: str | tuple[str, str, int]) -> Queue:
        for name, said in programs.items():
            output, error, code = said if isinstance(said, tuple) else (said, "", 0)
            (tmp_path / f"{name}.out").write_text(output)
            (tmp_path / f"{name}.err").write_text(error)
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            record = tmp_path / name
            program.write_text(
                f'#!/bin/sh\necho "$@" >> {record}.asked\necho "$SLURM_TIME_FORMAT" "$SQUEUE_USERS" >> {record}.env\n'
                f"/bin/cat {record}.out\n/bin/cat {record}.err >&2\nexit {code}\n"
            )
            program.chmod(0o755)
        return Queue({"PATH": str(tmp_path / "bin"), "SQUEUE_USERS": "somebody"}, keep_s=keep_s)

    return make


def asked(folder: Path, name: str) -> list[str]:
    file = folder / f"{name}.asked"
    return file.read_text().splitlines() if file.exists() else []


def test_squeue_tells_of_single_jobs_and_of_the_tasks_of_arrays(slurm: Slurm, tmp_path: Path) -> None:
    queue = slurm(squeue=SQUEUE)
    found = queue.ask(["1_1", "1_2", "1_3", "2_3", "2_4", "4_1", "4_777", "5", "15", "23_1"])
    assert queue.answers
    assert found["1_2"] == Job("1_2", "RUNNING", 1795315438.0, 1795315438.0, "", "/home/u/a.sh")
    assert found["4_777"] == Job("4_777", "PENDING", 1795315438.0, None, "JobArrayTaskLimit", "")
    assert {job.id for job in found.values() if job.live} == {"1_2", "2_3", "2_4", "4_1", "4_777", "5", "15"}
    assert {job.id for job in found.values() if job.waiting} == {"2_3", "2_4", "4_1", "4_777", "5", "15"}
    assert {job.id for job in found.values() if job.never_starts} == {"2_3", "23_1"}
    # An array is asked for by its number: its waiting tasks have no line of their own.
    [question] = asked(tmp_path, "squeue")
    assert "--jobs=1,15,2,23,4,5" in question
    assert "--states=all" in question
    # The user's own defaults are not the program's.
    assert (tmp_path / "squeue.env").read_text() == "%s \n"


def test_accounting_is_asked_once_for_what_squeue_has_forgotten(slurm: Slurm, tmp_path: Path) -> None:
    queue = slurm(squeue="1_2|RUNNING|1795315438|1795315438|None|/home/u/a.sh\n", sacct=SACCT_HEAD + SACCT)
    found = queue.ask(["1_1", "1_2", "1_3", "23_0", "99"])
    assert found["1_1"] == Job(
        "1_1", "FAILED", 1795315438.0, 1795315438.0, "exit 3:0", "sbatch --parsable --mem=100 a.sh"
    )
    assert found["1_3"].state == "CANCELLED"
    assert not found["1_3"].never_starts
    assert found["23_0"].never_starts
    assert "99" not in found
    assert found["1_2"].state == "RUNNING"
    [question] = asked(tmp_path, "sacct")
    assert "--jobs=1,23,99" in question
    assert "--parsable2" in question


def test_squeue_s_word_on_what_lives_counts(slurm: Slurm) -> None:
    """Recorded: accounting took a requeued job for lost, and cancelled tasks of an array for waiting."""
    queue = slurm(squeue="5|PENDING|1795315588|1795315594|BeginTime|(null)\n", sacct=SACCT_HEAD + SACCT)
    found = queue.ask(["5", "27_3"])
    assert found["5"].state == "PENDING"
    assert "27_3" not in found


def test_accounting_alone_is_believed(slurm: Slurm) -> None:
    queue = slurm(squeue=("", "slurm_load_jobs error: Unable to contact slurm controller", 1), sacct=SACCT)
    assert queue.ask(["27_3", "5"])["27_3"].waiting
    assert queue.answers
    # A command may have the separator in it.
    assert queue.ask(["5"])["5"].command.endswith("sleep 300 | tee x")


def test_only_jobs_whose_end_matters_are_looked_up_in_accounting(slurm: Slurm, tmp_path: Path) -> None:
    queue = slurm(squeue="", sacct=SACCT)
    assert queue.ask(["1_1", "5"], past=[]) == {}
    assert asked(tmp_path, "sacct") == []
    assert set(queue.ask(["1_1", "5"], past=["5"])) == {"5"}


def test_a_cluster_without_accounting_answers_all_the_same(slurm: Slurm) -> None:
    queue = slurm(squeue=SQUEUE, sacct=("", "Slurm accounting storage is disabled\n", 1))
    assert set(queue.ask(["5", "99"])) == {"5"}
    assert queue.answers


def test_a_job_that_squeue_has_forgotten_is_an_answer(slurm: Slurm) -> None:
    queue = slurm(squeue=("", "slurm_load_jobs error: Invalid job id specified\n", 1))
    assert queue.ask(["99"]) == {}
    assert queue.answers


def test_without_slurm_nothing_is_known(slurm: Slurm) -> None:
    queue = slurm()
    assert queue.ask(["1"]) == {}
    assert not queue.answers
    broken = slurm(squeue=("", "squeue: error: fetch_config: DNS SRV lookup failed\n", 1))
    assert broken.ask(["1"]) == {}
    assert not broken.answers


def test_an_older_sacct_has_no_submit_line(tmp_path: Path) -> None:
    program = tmp_path / "sacct"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *submitline*) echo \'sacct: error: Invalid field requested: "submitline"\' >&2; '
        "exit 1;; esac\necho '1_1|FAILED|1795315438|1795315438|3:0|None'\n"
    )
    program.chmod(0o755)
    found = Queue({"PATH": str(tmp_path)}).ask(["1_1"])
    assert found == {"1_1": Job("1_1", "FAILED", 1795315438.0, 1795315438.0, "exit 3:0", "")}


def test_answers_are_kept_for_a_while(slurm: Slurm, tmp_path: Path) -> None:
    queue = slurm(squeue=SQUEUE, keep_s=1000)
    assert set(queue.ask(["5", "1_2"])) == {"5", "1_2"}
    assert set(queue.ask(["5"])) == {"5"}
    assert len(asked(tmp_path, "squeue")) == 1
    queue.forget()
    queue.ask(["5"])
    assert len(asked(tmp_path, "squeue")) == 2


def test_nothing_is_asked_about_no_job(slurm: Slurm, tmp_path: Path) -> None:
    assert slurm(squeue=SQUEUE).ask([]) == {}
    assert asked(tmp_path, "squeue") == []


def test_cancelling_takes_few_calls_and_passes_complaints_on(slurm: Slurm, tmp_path: Path) -> None:
    queue = slurm(scancel=("", "scancel: error: Kill job error on job id 7_0: Invalid job id specified\n", 1))
    complaints = queue.cancel([f"7_{task}" for task in range(501)])
    assert complaints == ["scancel: error: Kill job error on job id 7_0: Invalid job id specified"] * 2
    assert sorted(word for line in asked(tmp_path, "scancel") for word in line.split()) == sorted(
        f"7_{task}" for task in range(501)
    )
    assert slurm(scancel="").cancel(["8"]) == []


@pytest.mark.parametrize(
    ("line", "tasks"),
    [
        ("17", ["17"]),
        ("17_3", ["17_3"]),
        ("4_[1-3,7%2]", ["4_1", "4_2", "4_3", "4_7"]),
        ("4_[0-6:3]", ["4_0", "4_3", "4_6"]),
        ("4_[5]", ["4_5"]),
    ],
)
def test_ranges_of_tasks_are_written_out(line: str, tasks: list[str]) -> None:
    assert list(tasks_of(line)) == tasks
