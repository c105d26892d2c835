"""A run whose data come from processes ends as one without them: by the same line and code, with nothing left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranked_commands import Ranks
from toy import BATCH, Regression, ToyReader, newest_tensors, regression_samples, rows, run, saved, states_equal

from hpcdistill.data.read.loader import StepLoader
from hpcdistill.errors import EXIT_STOPPED
from hpcdistill.methods.base import Batch, Carry, Progress, Terms

STEPS = 8
AT = 4
OPTIONS: dict[str, Any] = {"log_every": 3, "ema": 0.5}


class WorkerReader(ToyReader):
    """Batches from two processes, which leave their numbers in `folder`; `happens` is called in that of step AT."""

    def __init__(
        self, folder: Path, happens: Callable[[], None] = lambda: None, workers: int = 2, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(BATCH, regression_samples, rank, ranks)
        self.folder, self.happens, self.workers = folder, happens, workers

    def __getitem__(self, step: int) -> Batch:
        if self.workers:
            (self.folder / f"reader-{os.getpid()}").touch()
        if step == AT:
            self.happens()
        return super().__getitem__(step)

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Any:
        dataset: Any = self
        return StepLoader(dataset, first_step, last_step, self.workers, False)


def readers(folder: Path) -> list[int]:
    """The processes that have read."""
    return [int(path.name.partition("-")[2]) for path in folder.glob("reader-*")]


class Fails(Regression):
    """Raises `error` at step AT, in the middle of a step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.step = error, 0

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.step += 1
        if self.step > AT:
            raise self.error
        return super().loss(batch, carry, progress)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """Also when the test has failed: what is left would keep pytest from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


def ended(tmp_path: Path, main: Callable[[], int | None]) -> tuple[int | None, str]:
    """Exit code and output of a command whose process is alone; nothing of it is left."""
    with Ranks(1, lambda rank, ranks: main(), tmp_path / "said") as started:
        [code] = started.codes()
        said = started.said(0)
    assert readers(tmp_path)
    assert not [pid for pid in readers(tmp_path) if psutil.pid_exists(pid)]
    return code, said


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 2, "error: runs/x: the disk is full; free some space"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=["full disk", "out of memory", "Ctrl-C"],
)
def test_a_run_that_fails_ends(error: BaseException, code: int, line: str, tmp_path: Path) -> None:
    def main() -> None:
        run(Fails(error), WorkerReader(tmp_path), tmp_path / "run", STEPS)

    found, said = ended(tmp_path, main)
    assert found == code, said
    assert said.splitlines()[-1].startswith(line)
    assert said.count("Traceback") == (code == 1)


def test_a_killed_reader_process_ends_the_run(tmp_path: Path) -> None:
    reader = WorkerReader(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    code, said = ended(tmp_path, lambda: run(Regression(), reader, tmp_path / "run", STEPS) and 0)
    assert code == 71
    assert said.splitlines()[-1].startswith("error: a process that reads data was killed")
    assert "Traceback" not in said


def test_data_that_never_come_end_the_run(tmp_path: Path) -> None:
    reader = WorkerReader(tmp_path, lambda: time.sleep(1000))
    code, said = ended(tmp_path, lambda: run(Regression(), reader, tmp_path / "run", STEPS, timeout=2) and 0)
    assert code == 71
    assert said.splitlines()[-1].startswith("error: no batch has come from the 2 processes that read data for 2 s")


@pytest.mark.distributed
def test_no_reader_process_outlives_a_rank_that_the_watchdog_ends(tmp_path: Path) -> None:
    """Rank 0 waits in a collective call when rank 1 fails; the readers of both hang."""

    def hangs() -> None:
        (tmp_path / f"hangs-{os.getpid()}").touch()
        time.sleep(1000)

    class FailsWhenBothHang(Regression):
        def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
            if os.environ["RANK"] == "1":
                while len(list(tmp_path.glob("hangs-*"))) < 2:  # `codes` ends what waits for ever
                    time.sleep(0.05)
                raise OSError(errno.ENOSPC, "No space left", "runs/x")
            return super().loss(batch, carry, progress)

    def main(rank: int, ranks: int) -> None:
        run(FailsWhenBothHang(), WorkerReader(tmp_path, hangs, 4, rank, ranks), tmp_path / "run", STEPS, timeout=60)

    with Ranks(2, main, tmp_path / "said") as started:
        assert started.codes() == [2, 2], started.said(0)
    assert len(list(tmp_path.glob("hangs-*"))) == 2
    ending = [process for process in psutil.process_iter() if process.pid in readers(tmp_path)]
    _, left = psutil.wait_procs(ending, 60)
    assert not left, [process.kill() for process in left]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(Regression(), WorkerReader(folder, workers=0), folder, STEPS, checkpoint_every=AT, **OPTIONS)
    return folder


class Marking(Regression):
    """Leaves a file in the step before AT: the trainer waits for the batch of AT, or is about to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        if progress.number == AT - 1:
            self.file.touch()
        return super().loss(batch, carry, progress)


@pytest.mark.parametrize(
    ("number", "checkpoint_every"),
    [(signal.SIGTERM, 3), (signal.SIGINT, AT), (signal.SIGUSR1, 3)],
    ids=["between checkpoints", "at a checkpoint", "the third signal"],
)
def test_a_signal_is_heard_while_a_batch_is_waited_for(
    number: signal.Signals, checkpoint_every: int, undisturbed: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, **OPTIONS}

    def signalled() -> None:
        while not (tmp_path / "here").exists():
            time.sleep(0.05)
        time.sleep(0.3)  # mostly it waits by now; where it does not yet, it ends with the same step
        os.kill(os.getppid(), number)
        time.sleep(1000)

    def main() -> int:
        outcome = run(Marking(tmp_path / "here"), WorkerReader(tmp_path, signalled), tmp_path / "run", STEPS, **options)
        assert (outcome.finished, outcome.position.step) == (False, AT)
        return EXIT_STOPPED

    code, said = ended(tmp_path, main)
    assert code == EXIT_STOPPED, said
    assert f"stopped at step {AT} of {STEPS}; the same command goes on from here" in said
    assert (tmp_path / "run" / "checkpoints" / f"step-{AT:08d}").is_dir()
    assert run(Regression(), WorkerReader(tmp_path), tmp_path / "run", STEPS, **options).finished
    assert newest_tensors(tmp_path / "run") == newest_tensors(undisturbed)
    assert rows(tmp_path / "run") == rows(undisturbed)
    assert states_equal(saved(tmp_path / "run"), saved(undisturbed))


def test_a_signal_before_the_first_batch_saves_nothing(tmp_path: Path) -> None:
    class First(WorkerReader):
        def __getitem__(self, step: int) -> Batch:
            (self.folder / f"reader-{os.getpid()}").touch()
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1000)
            raise AssertionError

    def main() -> int:
        outcome = run(Regression(), First(tmp_path), tmp_path / "run", STEPS)
        return EXIT_STOPPED if not outcome.finished else 0

    code, said = ended(tmp_path, main)
    assert code == EXIT_STOPPED, said
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
