"""What ends one rank ends all of them: soon, with one line that names it, and with one exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from ranked_commands import Ranks, end_of
from toy import BATCH, Regression, ToyReader, regression_samples, rows, run

from hpcdistill.errors import EXIT_RANK_LOST, UserError
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.ranks import watchdog
from hpcdistill.ranks.rendezvous import join, leave
from hpcdistill.ranks.signals import StopSignals

pytestmark = pytest.mark.distributed
STALL = 600.0


def meet(times: int = 1) -> None:
    """Collective calls of all ranks."""
    for _ in range(times):
        dist.all_reduce(torch.ones(3))


def work(failing: dict[int, Callable[[], object]], stall: float = STALL) -> Callable[[int, int], None]:
    """Join, meet, then `failing[rank]()`; the other ranks go on meeting and so wait for the missing one."""

    def main(rank: int, ranks: int) -> None:
        join(True, stall)
        meet()
        if rank in failing:
            failing[rank]()
        meet(2)

    return main


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


PROBLEM = "data.train: the file x.png is no image; remove it"


@pytest.mark.parametrize("culprits", [(1,), (0,), (0, 1, 2)], ids=str)
def test_a_user_error_is_one_line(culprits: tuple[int, ...], tmp_path: Path) -> None:
    main = work({rank: raising(UserError(PROBLEM)) for rank in culprits})
    codes, said = end_of(main, tmp_path)
    assert codes == [2, 2, 2]
    assert said[1:] == ["", ""]
    own, foreign = f"error: {PROBLEM}\n", f"error: rank 1 ({os.uname().nodename}): {PROBLEM}\n"
    if len(culprits) == 1:
        assert said[0] == (own if culprits == (0,) else foreign)
    else:  # whichever was the first to say it
        assert said[0] == own or PROBLEM in said[0]
        assert said[0].count("\n") == 1


def test_a_full_disk_on_rank_0(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/step-1")
    codes, said = end_of(work({0: raising(full)}), tmp_path)
    assert codes == [2, 2, 2]
    assert said == ["error: runs/a/step-1: the disk is full; free some space and run the same command again\n", "", ""]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_crash_has_one_traceback(culprit: int, tmp_path: Path) -> None:
    codes, said = end_of(work({culprit: lambda: 1 / 0}), tmp_path)
    assert codes == [1, 1, 1]
    assert said[culprit].count("Traceback") == 1
    assert said[culprit].endswith("ZeroDivisionError: division by zero\n")
    if culprit:
        assert said[0] == (
            f"error: rank 1 ({os.uname().nodename}): ZeroDivisionError: division by zero (a traceback is in its log)\n"
        )
    assert [text for rank, text in enumerate(said) if rank not in (0, culprit)] == [""] * (2 - bool(culprit))


def test_a_crash_of_all_has_one_traceback(tmp_path: Path) -> None:
    codes, said = end_of(work({rank: lambda: 1 / 0 for rank in range(3)}), tmp_path)
    assert codes == [1, 1, 1]
    assert "".join(said).count("Traceback") == 1


def test_an_error_of_all_in_a_collective_is_nobody_s_death(tmp_path: Path) -> None:
    """All were waiting, so no rank is missing: what the call says is what happened."""
    broken = raising(RuntimeError("gloo: no such operation"))
    codes, said = end_of(work(dict.fromkeys(range(2), broken)), tmp_path, ranks=2)
    assert codes == [1, 1]
    assert "".join(said).count("RuntimeError: gloo: no such operation\n") == 1


def kill_self(number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("victim", "ranks"), [(0, 2), (0, 4), (1, 4)])
def test_a_killed_rank_is_named(victim: int, ranks: int, tmp_path: Path) -> None:
    codes, said = end_of(work({victim: kill_self()}), tmp_path, ranks)
    assert codes == [-9 if rank == victim else EXIT_RANK_LOST for rank in range(ranks)]
    host = os.uname().nodename
    expected = (
        f"error: rank 0 ({host}), which holds the ranks' common store, is gone (killed? out of memory?); see its log\n"
        if victim == 0
        else f"error: rank 1 ({host}) died without a word (killed? out of memory?); see its log\n"
    )
    speaker = 1 if victim == 0 else 0
    assert said == [expected if rank == speaker else "" for rank in range(ranks)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_gives_no_sign_of_life(victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOST_AFTER", 5.0)
    with Ranks(2, work({victim: kill_self(signal.SIGSTOP)}), tmp_path) as started:
        codes = started.codes(40, without=(victim,))
        assert codes[1 - victim] == EXIT_RANK_LOST
        [line] = started.said(1 - victim).splitlines()
    assert line.startswith(f"error: rank {victim} ({os.uname().nodename})")
    assert "has given no sign of life for 5 s" in line


def test_a_stopped_and_continued_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol suspend`: all ranks sleep for longer than any limit."""
    monkeypatch.setattr(watchdog, "LOST_AFTER", 4.0)
    monkeypatch.setattr(watchdog, "DEAD_AFTER", 2.0)

    def main(rank: int, ranks: int) -> None:
        join(True, 4.0)
        for number in range(40):
            meet()
            (tmp_path / f"at-{rank}").write_text(str(number))
            watchdog.progress()
            time.sleep(0.1)

    with Ranks(2, main, tmp_path) as started:
        while not (tmp_path / "at-1").exists():
            assert started.processes[1].is_alive()
            time.sleep(0.01)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(2):
                os.kill(started.pid(rank), number)
            time.sleep(5 if number == signal.SIGSTOP else 0)
        assert started.codes() == [0, 0]
        assert [started.said(rank) for rank in range(2)] == ["", ""]


def test_a_hanging_reader_is_named(tmp_path: Path) -> None:
    culprit = 0

    def main(rank: int, ranks: int) -> None:
        def before(step: int) -> None:
            if step == 5 and rank == culprit:
                time.sleep(1000)

        reader = ToyReader(BATCH, regression_samples, rank, ranks, before)
        run(Regression(), reader, tmp_path / "run", 20, timeout=3)

    codes, said = end_of(main, tmp_path, ranks=2)
    assert codes == [EXIT_RANK_LOST] * 2
    assert said[1] == ""
    line = said[0].splitlines()[-1]
    assert line.startswith("error: no rank has gone on for 3 s (train.timeout): rank 0 (")
    assert "Traceback" not in said[0]
    # The one that hangs is where the loop asks for a batch, the other one in a collective call.
    places = [part.split(" in ")[1] for part in line.split("train.timeout): ")[1].split("; ")]
    assert places[culprit].startswith("training/batches.py:")
    assert places[culprit] != places[1 - culprit]


def test_a_rank_that_goes_on_lets_the_others_wait(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, 2.0)
        for _ in range(40 if rank == 1 else 0):  # an evaluation's larger share
            time.sleep(0.1)
            watchdog.progress()
        if rank == 0:
            with watchdog.patient():
                time.sleep(0.1)
        meet()

    codes, said = end_of(main, tmp_path, ranks=2)
    assert (codes, said) == ([0, 0], ["", ""])


def test_main_first_outlasts_every_limit(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, 2.0)
        for turn in range(2):
            with watchdog.main_first():
                if rank == 0:
                    time.sleep(3 if turn == 0 else 0)
                    (tmp_path / f"packed-{turn}").touch()
                assert (tmp_path / f"packed-{turn}").exists()
        meet()

    codes, said = end_of(main, tmp_path)
    assert (codes, said) == ([0, 0, 0], ["", "", ""])


def test_an_error_in_main_first_ends_who_waits(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, STALL)
        with watchdog.main_first():
            raise UserError(PROBLEM)

    codes, said = end_of(main, tmp_path)
    assert (codes, said) == ([2, 2, 2], [f"error: {PROBLEM}\n", "", ""])


def test_what_must_be_done_before_the_end_is_done(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, STALL)
        watchdog.before_exit(lambda: (tmp_path / f"released-{rank}").touch())
        work({1: raising(UserError(PROBLEM))})(rank, ranks)

    end_of(main, tmp_path, ranks=2)
    assert sorted(path.name for path in tmp_path.glob("released-*")) == ["released-0", "released-1"]


def test_rank_0_leaves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the store: the others may take longer than LAST_WORDS to come to their end."""
    monkeypatch.setattr(watchdog, "LAST_WORDS", 1.0)

    def main(rank: int, ranks: int) -> int:
        join(True, STALL)
        meet()
        time.sleep(2 * rank)
        return 75

    codes, said = end_of(main, tmp_path, ranks=2)
    assert (codes, said) == ([75, 75], ["", ""])


def test_join_again_after_leaving(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        for _ in range(3):
            join(True, STALL)
            meet()
            leave()
            assert watchdog.active() is None

    codes, said = end_of(main, tmp_path)
    assert (codes, said) == ([0, 0, 0], ["", "", ""])


def test_two_runs_one_after_the_other(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        for name in ("teacher", "student"):
            run(Regression(), ToyReader(BATCH, regression_samples, rank, ranks), tmp_path / name, 5)

    codes, said = end_of(main, tmp_path, ranks=2)
    assert codes == [0, 0]
    assert said[1] == ""
    assert rows(tmp_path / "teacher") == rows(tmp_path / "student")


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])

        def main(rank: int, ranks: int) -> None:
            os.environ["MASTER_PORT"] = port
            if rank == 0:
                join(True, STALL)

        codes, said = end_of(main, tmp_path, ranks=2)
    assert codes == [2, 0]
    assert said[0].startswith(f"error: rank 0 of 2 did not find the others at 127.0.0.1:{port} (")
    assert "set MASTER_PORT to a free one" in said[0]
    assert said[0].count("\n") == 1


def test_a_rank_that_hangs_in_its_share_of_an_evaluation_is_noticed(tmp_path: Path) -> None:
    """The other one waits at the end of `shared_work`, which is no progress either."""
    culprit = 1

    def main(rank: int, ranks: int) -> None:
        join(True, 3.0)
        PartialState(cpu=True)
        with shared_work(ranks, "cpu"):
            if rank == culprit:
                time.sleep(1000)

    codes, said = end_of(main, tmp_path, ranks=2, seconds=30)
    assert codes == [EXIT_RANK_LOST] * 2
    assert said[0].startswith("error: no rank has gone on for 3 s (train.timeout): rank 0 (")
    places = [part.split(" in ")[1] for part in said[0].split("train.timeout): ")[1].split("; ")]
    assert "shared_work.py" in places[1 - culprit]
    assert "shared_work.py" not in places[culprit]


@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_that_leaves_before_the_others_is_noticed(early: int, tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, 3.0)
        if rank == early:
            leave()
        meet()

    codes, said = end_of(main, tmp_path, ranks=2, seconds=30)
    assert codes == [EXIT_RANK_LOST] * 2
    assert said[0].startswith("error: no rank has gone on for 3 s (train.timeout): ")
    assert said[0].count("\n") == 1
    assert said[1] == ""


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_reader_that_leaves_ends_all(culprit: int, tmp_path: Path) -> None:
    """`| head` behind one rank; what rich makes of it, too."""

    def unread() -> None:
        if culprit:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        try:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    codes, said = end_of(work({culprit: unread}), tmp_path, ranks=2, seconds=30)
    assert codes == [1, 1]
    host = os.uname().nodename
    assert said == [f"error: rank 1 ({host}): the reader of its output has left\n" if culprit else "", ""]


def test_the_lock_goes_last(tmp_path: Path) -> None:
    """While a rank is still in the run, nobody may take it over."""

    def main(rank: int, ranks: int) -> None:
        join(True, STALL)
        if rank == 0:
            watchdog.before_exit(lambda: (tmp_path / f"after-{len(list(tmp_path.glob('ended-*')))}").touch())
        else:
            watchdog.before_exit(lambda: time.sleep(0.5))
            watchdog.before_exit(lambda: (tmp_path / f"ended-{rank}").touch())
        work({1: raising(UserError(PROBLEM))})(rank, ranks)

    codes, said = end_of(main, tmp_path)
    assert (codes, said[1:]) == ([2, 2, 2], ["", ""])
    assert sorted(path.name for path in tmp_path.glob("after-*")) == ["after-2"]


def test_a_launcher_that_ends_the_others_does_not_take_their_words(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to all other ranks as soon as one has died; SIGKILL comes 30 s later."""

    def main(rank: int, ranks: int) -> None:
        with StopSignals():
            work({1: kill_self()})(rank, ranks)

    with Ranks(3, main, tmp_path) as started:
        assert started.processes[1].join(30) is None
        for _ in range(20):
            for rank in (0, 2):
                if started.processes[rank].exitcode is None:
                    os.kill(started.pid(rank), signal.SIGTERM)
            time.sleep(0.1)
        assert started.codes(40) == [EXIT_RANK_LOST, -9, EXIT_RANK_LOST]
        lines = [line for line in started.said(0).splitlines() if line and not line.startswith("stopping after")]
    assert lines == [f"error: rank 1 ({os.uname().nodename}) died without a word (killed? out of memory?); see its log"]


PROGRAM = """\
import os, signal, sys, time
import torch, torch.distributed as dist
from hpcdistill.command import run_command
from hpcdistill.ranks.rendezvous import join
from hpcdistill.ranks.signals import StopSignals

def main(arguments):
    with StopSignals():
        join(True, 600.0)
        dist.all_reduce(torch.ones(1))
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            dist.all_reduce(torch.ones(1))

run_command(main)
"""


def test_torchrun_lets_the_dead_rank_be_named(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    clone = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=clone, env=environment
    )
    assert done.returncode == 1
    line = f"error: rank 1 ({os.uname().nodename}) died without a word (killed? out of memory?); see its log\n"
    assert line in done.stderr
    assert done.stderr.count("Traceback") <= 1, "torchrun has one of its own"
