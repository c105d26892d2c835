"""A signal to one rank stops all of them at the same step, with a checkpoint that loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranked_commands import Ranks
from terminal import Screen, run_in_terminal
from torch import nn
from torch.utils.data import Dataset
from toy import (
    BATCH,
    Regression,
    TableEvaluator,
    ToyReader,
    newest_tensors,
    regression_samples,
    rows,
    run,
    saved,
    states_equal,
)

from hpcdistill.data.read.loader import Batch, StepLoader
from hpcdistill.errors import EXIT_STOPPED, UserError
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.ranks import signals, watchdog
from hpcdistill.ranks.rendezvous import join, leave
from hpcdistill.ranks.signals import STOPPING, StopSignals
from hpcdistill.training import checkpoint
from hpcdistill.training.checkpoint import Checkpoints
from hpcdistill.training.evaluation import Evaluation, until_stopped

STEPS = 14
EVALUATE_EVERY = 4
SCORES = {4: 1.0, 8: 3.0, 12: 2.0, 14: 0.0}  # by age; the best in the middle
OPTIONS: dict[str, Any] = {"checkpoint_every": 5, "log_every": 3, "ema": 0.5, "timeout": 60}
Before = Callable[[int, int], None]  # (rank, step or image)


def nothing(rank: int, number: int) -> None:
    pass


def signalled(number: signal.Signals, rank: int, at: int, times: int = 1, pause: float = 0.0) -> Before:
    def before(current_rank: int, current: int) -> None:
        if (current_rank, current) == (rank, at):
            for again in range(times):
                time.sleep(pause if again else 0)
                os.kill(os.getpid(), number)

    return before


class SlowEvaluator(TableEvaluator):
    """Looks at four images a rank, and asks `stop` before each; `before(rank, 100 * evaluation + image)`."""

    def __init__(self, before: Before) -> None:
        super().__init__(SCORES)
        self.before, self.calls = before, 0

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Any = None) -> Evaluation:
        self.calls += 1
        with shared_work(accelerator.num_processes, accelerator.device):
            for image in until_stopped(range(4), stop):
                self.before(accelerator.process_index, 100 * self.calls + image)
        return super().__call__(generators, accelerator)


def training(folder: Path, at_step: Before = nothing, at_image: Before = nothing) -> Callable[[int, int], int]:
    def main(rank: int, ranks: int) -> int:
        reader = ToyReader(BATCH, regression_samples, rank, ranks, lambda step: at_step(rank, step))
        outcome = run(
            Regression(dropout=0.5), reader, folder, STEPS, SlowEvaluator(at_image), EVALUATE_EVERY, **OPTIONS
        )
        (folder.parent / f"{folder.name}-{rank}").write_text(f"{outcome.position.step} {outcome.finished}")
        return 0 if outcome.finished else EXIT_STOPPED

    return main


def trained(folder: Path, ranks: int = 2, **where: Before) -> list[int | None]:
    with Ranks(ranks, training(folder, **where), folder.with_suffix(".said")) as started:
        return started.codes()


def outcomes(folder: Path) -> list[str]:
    return [(folder.parent / f"{folder.name}-{rank}").read_text() for rank in range(2)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "undisturbed"
    assert trained(folder) == [0, 0]
    return folder


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert newest_tensors(folder) == newest_tensors(undisturbed)
    assert rows(folder) == rows(undisturbed)
    for which in ("best", "last"):
        assert states_equal(saved(folder, which), saved(undisturbed, which))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGUSR2, 0)],
    ids=str,
)
def test_one_rank_s_signal_stops_all(number: signal.Signals, rank: int, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert trained(folder, at_step=signalled(number, rank, 6)) == [EXIT_STOPPED] * 2
    step = int(outcomes(folder)[0].split()[0])
    assert outcomes(folder) == [f"{step} False"] * 2
    assert 7 <= step < STEPS
    assert checkpoints(folder)[-1] == f"step-{step:08d}"
    assert not list((folder / "generators" / "last").iterdir())
    assert trained(folder) == [0, 0]
    assert_same(folder, undisturbed)


@pytest.mark.distributed
@pytest.mark.parametrize(("evaluation", "step", "rank"), [(2, 8, 0), (2, 8, 1), (4, STEPS, 1)])
def test_an_interrupted_evaluation_is_made_up_for(
    evaluation: int, step: int, rank: int, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    at_image = signalled(signal.SIGUSR1, rank, 100 * evaluation + 2)
    assert trained(folder, at_image=at_image) == [EXIT_STOPPED] * 2
    assert outcomes(folder) == [f"{step} False"] * 2
    [newest] = [path for path in (folder / "checkpoints").iterdir() if path.name == f"step-{step:08d}"]
    assert '"due": true' in (newest / "state.json").read_text()
    assert sum("score" in row for row in rows(folder)) == evaluation - 1
    # Interrupted again, in the evaluation that is made up for.
    assert trained(folder, at_image=signalled(signal.SIGTERM, 1 - rank, 101)) == [EXIT_STOPPED] * 2
    assert trained(folder) == [0, 0]
    assert_same(folder, undisturbed)


@pytest.mark.distributed
def test_a_second_interrupt_ends_all_ranks_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    at_step = signalled(signal.SIGINT, 1, 6, times=2, pause=signals.ECHO + 0.2)
    assert trained(folder, at_step=at_step) == [130, 130]
    said = (tmp_path / "run.said" / "rank-0.txt").read_text()
    assert said.splitlines()[-1] == f"error: rank 1 ({os.uname().nodename}): stopped"
    assert "Traceback" not in said + (tmp_path / "run.said" / "rank-1.txt").read_text()


@pytest.mark.distributed
def test_a_launcher_s_echo_is_no_second_interrupt(tmp_path: Path) -> None:
    """torchrun passes the terminal's SIGINT on to ranks that the terminal has told already."""
    assert trained(tmp_path / "run", at_step=signalled(signal.SIGINT, 1, 6, times=2)) == [EXIT_STOPPED] * 2


class WorkerReader(Dataset[Batch]):
    """A toy reader whose batches come from processes; `before` is called in the trainer."""

    def __init__(self, reader: ToyReader) -> None:
        self.reader = reader

    def __getitem__(self, step: int) -> Batch:
        return self.reader[step]

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        for step, batch in enumerate(StepLoader(self, first_step, last_step, 2, False), first_step):
            assert self.reader.before is not None
            self.reader.before(step)
            yield batch


@pytest.mark.distributed
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_to_the_whole_process_group_leaves_the_workers(number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal, `scancel --full` and some launchers send it."""

    def before(step: int) -> None:
        if step == 6:
            os.killpg(0, number)
        time.sleep(0.02)  # the workers hear it while they are needed

    def main(rank: int, ranks: int) -> int:
        os.setpgid(0, 0)
        reader: Any = WorkerReader(ToyReader(BATCH, regression_samples, rank, ranks, before))
        reader.batch_size = BATCH
        outcome = run(Regression(), reader, tmp_path / "run", 200, **OPTIONS)
        (tmp_path / f"step-{rank}").write_text(str(outcome.position.step))
        return 0 if outcome.finished else EXIT_STOPPED

    with Ranks(2, main, tmp_path / "said") as started:
        assert started.codes() == [EXIT_STOPPED] * 2
        assert "Error" not in started.said(0) + started.said(1)
    first, second = ((tmp_path / f"step-{rank}").read_text() for rank in range(2))
    assert first == second
    assert checkpoints(tmp_path / "run")[-1] == f"step-{int(first):08d}"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (2.0, list(range(1, 9))),  # slower than PACE: at every step
        (0.25, [1, 5, 9, 13, 17]),
        (1 / 16, [1, 17, 33, 49]),
        (0.001, [1, 21, 41, 61]),  # at the latest after MOST_STEPS
    ],
)
def test_ranks_agree_about_once_a_second(seconds: float, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    asked: list[int] = []
    agreeing = StopSignals()

    def most(accelerator: Any, *values: float) -> list[float]:
        asked.append(step)
        return list(values)

    monkeypatch.setattr(signals, "_largest", most)
    accelerator: Any = type("Two", (), {"num_processes": 2})()
    for step in range(1, expected[-1] + 1):
        now += seconds
        agreeing.received = step == expected[-1]
        assert agreeing.agreed_at_step(accelerator) == (step == expected[-1])
    assert asked == expected


@pytest.mark.parametrize("slow", [0, 1])
def test_the_slowest_rank_sets_the_pace(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, step = 0.0, 0
    agreeing, asked = StopSignals(), list[int]()

    def most(accelerator: Any, *own: float) -> list[float]:
        asked.append(step)
        return [0.0, 0.5 if slow else 0.125]

    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals, "_largest", most)
    accelerator: Any = type("Two", (), {"num_processes": 2})()
    while step < 21:
        now, step = now + 0.125, step + 1
        assert not agreeing.agreed_at_step(accelerator)
    assert asked == (list(range(1, 22, 2)) if slow else [1, 9, 17])


def test_a_slow_student_does_not_take_over_its_teacher_s_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    agreeing = StopSignals()
    monkeypatch.setattr(signals, "_largest", lambda accelerator, *own: list(own))
    accelerator: Any = type("Two", (), {"num_processes": 2})()
    for _ in range(30):
        now += 0.008
        agreeing.agreed_at_step(accelerator)
    now += 500.0  # an evaluation, say
    agreeing.restart()
    now += 3.0
    agreeing.received = True
    assert agreeing.agreed_at_step(accelerator)


@pytest.mark.distributed
@pytest.mark.parametrize("told", [0, 1])
def test_one_rank_s_signal_interrupts_all_ranks_evaluation(told: int, tmp_path: Path) -> None:
    """They share no collective call until each has come to its end, which would take minutes."""

    def at_image(rank: int, number: int) -> None:
        if number == 101 and rank == told:
            os.kill(os.getpid(), signal.SIGUSR1)
        while number > 100 and rank != told and not watchdog.stop_requested():
            time.sleep(0.1)

    assert trained(tmp_path / "run", at_image=at_image) == [EXIT_STOPPED] * 2
    assert outcomes(tmp_path / "run") == [f"{EVALUATE_EVERY} False"] * 2


@pytest.mark.distributed
def test_a_stop_is_forgotten_by_who_listens_next(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        join(True, 60)
        with StopSignals() as first:
            if rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            while not watchdog.stop_requested():
                time.sleep(0.05)
            assert (first.requested(), first.received) == (True, rank == 0)
        assert not watchdog.stop_requested()
        dist.barrier()
        with StopSignals() as second:
            time.sleep(1.5)
            assert not second.requested()
        leave()

    with Ranks(2, main, tmp_path) as started:
        assert started.codes() == [0, 0]


@pytest.mark.distributed
@pytest.mark.parametrize("told", [0, 1])
def test_a_second_interrupt_ends_who_waits_in_a_collective_call(
    told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's handlers wait for the main thread there."""
    monkeypatch.setattr(signals, "STUCK", 1.0)

    def main(rank: int, ranks: int) -> None:
        join(True, 600)
        with StopSignals():
            (tmp_path / f"here-{rank}").touch()
            if rank != told:
                while True:
                    time.sleep(0.1)
            dist.all_reduce(torch.ones(1))

    with Ranks(2, main, tmp_path / "said") as started:
        while not all((tmp_path / f"here-{rank}").exists() for rank in range(2)):
            assert all(process.is_alive() for process in started.processes)
            time.sleep(0.05)
        time.sleep(0.5)
        for _ in range(2):
            os.kill(started.pid(told), signal.SIGINT)
            time.sleep(signals.ECHO + 0.3)
        assert started.codes(20) == [130, 130]
        assert started.said(0).splitlines()[-1].endswith("stopped")
        assert "Traceback" not in started.said(0) + started.said(1)


@pytest.mark.distributed
def test_an_error_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is being saved in the background when rank 0 fails; the others hear of it soon."""
    monkeypatch.setattr(checkpoint, "LONGEST_SAVE_S", 0.5)
    monkeypatch.setattr(Checkpoints, "_wait_quietly", lambda checkpoints: time.sleep(1000))

    def fails(rank: int, step: int) -> None:
        if (rank, step) == (0, 6):
            raise UserError("the disk is slow")

    assert trained(tmp_path / "run", at_step=fails) == [2, 2]
    assert (tmp_path / "run.said" / "rank-0.txt").read_text().endswith("error: the disk is slow\n")


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    """By `nohup`, or by a script in what it runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as listening:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
            assert not listening.received
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_forked_child_s_signals_are_its_own() -> None:
    """Data workers are forked while the trainer listens."""
    with StopSignals() as listening:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        time.sleep(0.3)
        assert not listening.received


STOPPED_ON_A_SCREEN = """
import time
from hpcdistill.console import say
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.training.progress import TrainingProgress

with StopSignals() as signals, TrainingProgress("toy", 0, 10**6, 16) as progress:
    late = time.monotonic() + 30
    while not signals.received and time.monotonic() < late:
        progress.advance()
        progress.show_losses({"l1": 0.5})
        time.sleep(0.002)
    time.sleep(0.5)  # the display goes on: the step is finished, a checkpoint saved
    say("toy: stopped")
"""


def test_ctrl_c_leaves_no_bar_on_the_screen() -> None:
    """The echo of Ctrl-C and the line that answers it stand in the display: both have to be erased, or it stays."""

    def look(screen: Screen) -> str | None:
        return "\x03" if "0.5" in screen.text else None

    command = [sys.executable, "-c", STOPPED_ON_A_SCREEN]
    screen, code = run_in_terminal(command, 80, look, PYTHONPATH=str(Path(__file__).parents[2]))
    assert code == 0
    lines = [line for line in screen.text.splitlines() if line]
    assert lines == ["stopping after this step, with a checkpoint; Ctrl-C again stops at once", "toy: stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_second_signal_while_a_stopped_run_ends_changes_nothing(number: signal.Signals) -> None:
    """SLURM signals the training as well as the task that passes it on; the later one may find it saved and ending."""
    script = (
        "import atexit, os, sys; from hpcdistill.ranks.signals import StopSignals\n"
        f"atexit.register(lambda: os.kill(os.getpid(), {number:d}))\n"
        f"with StopSignals(last=True): os.kill(os.getpid(), {number:d})\n"
        f"os.kill(os.getpid(), {number:d})\n"
        "sys.exit(75)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 75


def test_who_was_not_stopped_dies_of_a_signal_as_any_process() -> None:
    script = (
        "import os; from hpcdistill.ranks.signals import StopSignals\n"
        f"with StopSignals(last=True): pass\nos.kill(os.getpid(), {signal.SIGTERM:d})"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGTERM
