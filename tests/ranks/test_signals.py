"""A signal to one rank stops all of them at the same step, with a checkpoint that loses nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from ranked_commands import Ranks
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
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.ranks import signals
from hpcdistill.ranks.signals import EXIT_STOPPED, STOPPING, StopSignals
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
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
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
@pytest.mark.parametrize(("evaluation", "step"), [(2, 8), (4, STEPS)])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_evaluation_is_made_up_for(
    rank: int, evaluation: int, step: int, undisturbed: Path, tmp_path: Path
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
        (1 / 32, [1, 33, 65, 97]),
        (0.001, [1, 101, 201, 301]),  # at the latest after MOST_STEPS
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

    monkeypatch.setattr(agreeing, "_most", most)
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
    monkeypatch.setattr(agreeing, "_most", most)
    accelerator: Any = type("Two", (), {"num_processes": 2})()
    while step < 21:
        now, step = now + 0.125, step + 1
        assert not agreeing.agreed_at_step(accelerator)
    assert asked == (list(range(1, 22, 2)) if slow else [1, 9, 17])
