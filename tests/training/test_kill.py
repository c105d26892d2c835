"""The real command, killed by SIGKILL at random moments and started again, ends as if nothing had happened.

A server process imports everything once and forks a process an attempt; that one runs `hpcdistill.train`. Killing is
timed by what the attempt prints and writes, so that it falls into training, saving, evaluating and the hand-over from
teacher to student, not into the imports.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toy import rows, states_equal

ROOT = Path(__file__).resolve().parents[2]
SEED = 20240611
STEPS = 30  # of the teacher, and then of the student
CHECKPOINT_EVERY = 3
EVALUATE_EVERY = 12
ARGUMENTS = [
    "configs/dssd/x4.yaml",
    "configs/variants/cpu.yaml",
    "data.patch=24",
    "train.batch_size=2",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "train.log_every=2",
    "train.gradient_norms_every=5",
    "train.trackers=[]",
    f"eval.every={EVALUATE_EVERY}",
    "eval.samples=1",
]
STAGES = ("dssd-teacher-x4", "dssd-x4")
# With torch._dynamo, which the first optimizer imports for two seconds.
PRELOADED = [
    "torch._dynamo",
    "hpcdistill.train",
    "hpcdistill.training.loop",
    "hpcdistill.metrics.run_evaluators",
    "hpcdistill.run",
]


def command(data: str, output: str, arguments: list[str]) -> None:
    """What a forked process does: `python -m hpcdistill.train` with its output in a file."""
    with open(output, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ |= {"HPCDISTILL_DATA": data, "OMP_NUM_THREADS": "1"}
    import torch

    from hpcdistill.command import run_command
    from hpcdistill.train import main

    torch.set_num_threads(1)
    run_command(lambda _: main(arguments))


class Attempt:
    """One start of the command."""

    def __init__(self, runs: Path, data: Path, number: int) -> None:
        self.runs = runs
        self.output = runs.parent / f"{runs.name}-{number}.txt"
        self.output.touch()
        arguments = [*ARGUMENTS, f"runs={runs}"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process: ForkServerProcess = context.Process(target=command, args=(str(data), str(self.output), arguments))
        self.process.start()

    def reached(self, stage: str) -> int:
        """The step that this attempt has last shown of `stage`; 0 before, STEPS after it."""
        text = self.output.read_text()
        shown = [int(step) for step in re.findall(rf"^{stage} step (\d+)/", text, re.MULTILINE)]
        return max(shown, default=0)

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.001, seconds: float = 60) -> bool:
        """Whether `condition`, looked at every `pause` seconds, came true while the process lived."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                return condition()
            assert time.monotonic() < end, f"nothing happened in {seconds} s:\n{self.output.read_text()}"
            time.sleep(pause)
        return True

    def send(self, number: signal.Signals) -> int:
        """Signal the process, wait for its end and give its exit code (-9: killed)."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.end()

    def end(self, seconds: float = 60) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail(f"no end within {seconds} s:\n{self.output.read_text()}")
        return self.process.exitcode

    def folder(self, stage: str) -> Path | None:
        return next(self.runs.glob(f"{stage}-????????"), None)

    def saving(self, stage: str) -> bool:
        """Whether a checkpoint is being written just now."""
        folder = self.folder(stage)
        return folder is not None and any((folder / "checkpoints").glob(f".step-*.{self.process.pid}.tmp"))

    def generator(self, stage: str, which: str) -> bool:
        folder = self.folder(stage)
        return folder is not None and any((folder / "generators" / which).glob("*.safetensors"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a command that nobody disturbed; it packs the photographs too."""
    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    attempt = Attempt(runs, data, 0)
    assert attempt.end(120) == 0, attempt.output.read_text()
    return runs


def moments(kills: int, generator: random.Random) -> Iterator[tuple[str, str, int, float]]:
    """(kind, stage, step, further delay in seconds) of each kill, in the order of the run.

    Four at the hand-over; of the others a third while a checkpoint is written, the rest anywhere in a step, an
    evaluation or what lies between.
    """
    in_stage = (kills - 4) // 2
    for stage in STAGES:
        for place, step in enumerate(sorted(generator.randrange(0, STEPS - 4) for _ in range(in_stage))):
            yield (
                ("saving", stage, step, generator.uniform(0, 0.002))
                if place % 3 == 0
                else ("training", stage, step, generator.uniform(0, 0.05))
            )
        if stage == STAGES[0]:
            for kind in ("evaluating", "finishing", "handing over", "starting"):
                yield kind, stage, STEPS, generator.uniform(0, 0.02)


def kill(attempt: Attempt, kind: str, stage: str, step: int, delay: float) -> int:
    """Wait for the moment, then kill; the exit code."""
    if kind == "training":
        attempt.wait_until(lambda: attempt.reached(stage) >= step)
    elif kind == "saving":
        attempt.wait_until(lambda: attempt.reached(stage) >= step)
        attempt.wait_until(lambda: attempt.saving(stage), pause=0)
    elif kind == "evaluating":
        attempt.wait_until(lambda: attempt.reached(stage) >= STEPS)
    elif kind == "finishing":
        attempt.wait_until(lambda: attempt.generator(stage, "last"))
    elif kind == "handing over":
        attempt.wait_until(lambda: bool((folder := attempt.folder(stage)) and (folder / "result.json").exists()))
    else:
        attempt.wait_until(lambda: attempt.folder(STAGES[1]) is not None)
    time.sleep(delay)
    return attempt.send(signal.SIGKILL)


def assert_same(runs: Path, undisturbed: Path) -> None:
    """Everything that says what was trained is the same to the bit."""
    folders, expected = (sorted(path.name for path in folder.iterdir()) for folder in (runs, undisturbed))
    assert folders == expected
    assert len(folders) == 2
    for name in folders:
        ours, theirs = runs / name, undisturbed / name
        for file in sorted(theirs.glob("generators/*/*.safetensors")):
            resumed = ours / file.relative_to(theirs)
            assert states_equal(load_file(resumed), load_file(file)), resumed
            assert resumed.read_bytes() == file.read_bytes()
        newest = max((theirs / "checkpoints").iterdir())
        for file in sorted(newest.rglob("*.safetensors")):
            assert (ours / file.relative_to(theirs)).read_bytes() == file.read_bytes(), file
        assert rows(ours) == rows(theirs)
        assert result(ours) == result(theirs)
        assert not [path for path in ours.rglob("*") if path.name.endswith(".tmp")]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "images_per_second", "revision")}


@pytest.mark.timeout(900)  # starts the command nine times and more
@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.torture)])
def test_kills_change_nothing(kills: int, undisturbed: Path, data: Path, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    runs = tmp_path / "runs"
    killed, during_saves, leftovers, starts = 0, 0, 0, set()
    for number, (kind, stage, step, delay) in enumerate(moments(kills, generator)):
        attempt = Attempt(runs, data, number)
        code = kill(attempt, kind, stage, step, delay)
        text = attempt.output.read_text()
        print(f"{kind} {stage} {step} +{delay * 1000:.1f} ms: exit {code}, at {[attempt.reached(s) for s in STAGES]}")
        assert "Traceback" not in text
        if code == 0:  # this process was kept waiting and came too late: all is done
            break
        assert code == -signal.SIGKILL, text
        killed += 1
        during_saves += kind == "saving"
        leftovers += bool(list(runs.glob("*/checkpoints/.step-*.tmp")))
        starts |= set(re.findall(r"^(\S+): resuming at step (\d+)", text, re.MULTILINE))
    attempt = Attempt(runs, data, kills)
    assert attempt.end() == 0, attempt.output.read_text()
    assert killed >= kills // 2
    assert during_saves >= killed // 5
    assert leftovers >= killed // 20  # of many saves one at least was really cut short
    assert {stage for stage, _ in starts} == set(STAGES)
    assert len(starts) >= 3 * killed // 10  # the kills fell into different parts of the run
    assert_same(runs, undisturbed)


def test_sigterm_saves_and_ends_with_its_own_exit_code(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    [teacher] = undisturbed.glob(f"{STAGES[0]}-*")
    shutil.copytree(teacher, runs / teacher.name)
    attempt, stage = Attempt(runs, data, 0), STAGES[1]
    assert attempt.wait_until(lambda: attempt.reached(stage) >= 14)
    assert attempt.send(signal.SIGTERM) == 75
    text = attempt.output.read_text()
    [stopped] = re.findall(rf"^{stage}: stopped at step (\d+) of {STEPS}; the same command goes on", text, re.MULTILINE)
    folder = attempt.folder(stage)
    assert folder is not None
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == f"step-{int(stopped):08d}"
    assert not (folder / "result.json").exists()
    attempt = Attempt(runs, data, 1)
    assert attempt.end() == 0
    assert f"{stage}: resuming at step {stopped} of {STEPS}" in attempt.output.read_text()
    assert_same(runs, undisturbed)
