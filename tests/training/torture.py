"""Random kills of random ranks of real methods, and what they change: nothing.

    python tests/training/torture.py --kills 50 --json docs/results/torture.json

A run starts on two ranks. One of them, and at a random moment, is killed by SIGKILL: anywhere in a step or an
evaluation, or (two in five) rank 0 inside a save, before or in the middle of a random one of its disk operations. The
same command starts again, in every other run on 1, 2 or 4 ranks, and is killed again, or finishes. The end is compared
with the run that nobody disturbed: bit for bit where the ranks stayed two, to 1e-5 where they did not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))  # as pytest has it from pyproject.toml
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from accelerate import Accelerator
from ranked_commands import Ranks
from safetensors.torch import load
from small_methods import build, samples_of, write_vgg
from torch import nn
from toy import ToyReader, newest_tensors, rows, run

from hpcdistill.errors import EXIT_RANK_LOST
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.training import checkpoint
from hpcdistill.training.checkpoint import Checkpoints
from hpcdistill.training.evaluation import Evaluation, until_stopped

METHODS = ("plain_sr", "privileged_student", "cyclegan", "pix2pix", "fesd_paired")
RANKS = 2
STEPS, CHECKPOINT_EVERY, EVALUATE_EVERY = 14, 3, 4
BATCH = 4
TOLERANCE = 1e-5  # relative, between different numbers of ranks; everything is float64
SECONDS = 120  # an attempt's time limit


@dataclass(frozen=True)
class Kill:
    """When to kill which rank: at a step, some time after its batch is asked for, or at a disk operation of a save."""

    rank: int
    step: int = -1
    delay: float = 0.0  # seconds
    operation: int = -1  # of this attempt's saves; the killing one is left half done where it can be
    evaluation: int = -1  # the number of the attempt's evaluation


@dataclass
class Figures:
    """What happened."""

    kills: int = 0
    in_a_save: int = 0
    in_an_evaluation: int = 0
    of_rank_0: int = 0
    runs: int = 0
    resumed_by_ranks: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    runs_compared_bit_by_bit: int = 0
    runs_compared_to_1e_5: int = 0
    largest_relative_difference: float = 0.0
    steps: int = 0
    steps_repeated: int = 0
    half_written_checkpoints_left: int = 0
    longest_end_s: float = 0.0  # from the killed rank's end to that of the last one
    bytes_lost: int = 0
    lines_missing: int = 0
    lines_doubled: int = 0


class Score:
    """A number of the weights; asks `stop` for each of its images, and may be where a kill falls."""

    larger_is_better = True

    def __init__(self, first: str, before: Callable[[int], None]) -> None:
        self.selects: str | None = f"{first}/toy/score"
        self.before, self.calls = before, 0

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Any = None) -> Evaluation:
        self.calls += 1
        with shared_work(accelerator.num_processes, accelerator.device):
            for _ in until_stopped(range(2), stop):
                self.before(self.calls)
        sums = {name: sum(float(p.detach().abs().sum()) for p in net.parameters()) for name, net in generators.items()}
        return Evaluation({f"{name}/toy/score": value for name, value in sums.items()})

    def protocol(self) -> dict[str, Any]:
        return {}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_saves(killing: int, counted: Path) -> None:
    """Have this process's saves count their disk operations into `counted`, and end it at number `killing`."""
    number, inside = 0, threading.local()
    save = Checkpoints._save

    def saving(*arguments: Any) -> None:
        inside.saving = True
        try:
            save(*arguments)
        finally:
            inside.saving = False
            counted.write_text(str(number))

    def wrapped(work: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            if getattr(inside, "saving", False):
                number += 1
                if number - 1 == killing:
                    if half:
                        half(*arguments)
                    die()
            return work(*arguments, **options)

        return operation

    write = Path.write_bytes
    Checkpoints._save = saving  # type: ignore[method-assign]
    Path.write_bytes = wrapped(write, lambda path, data: write(path, data[: len(data) // 2]))  # type: ignore[method-assign]
    Path.rename = wrapped(Path.rename)  # type: ignore[method-assign]
    for name in ("sync_file", "sync_folder", "_digest_on_disk"):
        setattr(checkpoint, name, wrapped(getattr(checkpoint, name)))
    shutil.rmtree = wrapped(shutil.rmtree)  # type: ignore[assignment]


def training(method: str, vgg: Path, folder: Path, kill: Kill | None) -> Callable[[int, int], int]:
    def main(rank: int, ranks: int) -> int:
        mine = kill if kill and kill.rank == rank else None

        def at_step(step: int) -> None:
            if rank == 0:
                with (folder.parent / f"{folder.name}.steps").open("a") as steps:
                    steps.write(f"{step}\n")
            if mine and mine.step == step:
                threading.Timer(mine.delay, die).start()

        def at_image(evaluation: int) -> None:
            if mine and mine.evaluation == evaluation:
                die()

        if rank == 0:
            count_saves(mine.operation if mine else -1, folder.parent / f"{folder.name}.operations")
        made = build(method, vgg)
        run(
            made,
            ToyReader(BATCH, samples_of(method), rank, ranks, at_step),
            folder,
            STEPS,
            Score(next(iter(made.generators)), at_image),
            EVALUATE_EVERY,
            checkpoint_every=CHECKPOINT_EVERY,
            gradient_norms_every=5,
            log_every=2,
            ema=0.9 if method == "plain_sr" else 0.0,
        )
        return 0

    return main


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


class Torture:
    """Runs, kills, and compares; `figures` grow. `folder` takes it all."""

    def __init__(self, seed: int, folder: Path, say: Callable[[str], None] = print) -> None:
        self.random, self.folder, self.say = random.Random(seed), folder, say
        self.figures = Figures()
        self.vgg = write_vgg(folder / "vgg16.safetensors")
        self.undisturbed: dict[str, Path] = {}

    def run(self, kills: int, end: float = float("inf")) -> None:
        """`kills` kills over the methods in turn; none is begun after the time `end` (time.monotonic)."""
        number = 0
        while self.figures.kills < kills and time.monotonic() < end:
            wanted = min(self.random.choice((1, 2, 3)), kills - self.figures.kills)
            self.one_run(METHODS[number % len(METHODS)], number, wanted)
            number += 1

    def one_run(self, method: str, number: int, kills: int) -> None:
        """A run with so many kills, to its end, compared."""
        if method not in self.undisturbed:
            self.undisturbed[method] = self.folder / f"undisturbed-{method}"
            self._finish(method, self.undisturbed[method], RANKS)
        folder, ranks = self.folder / f"{number:03d}-{method}", [RANKS]
        for again in range(kills + 1):
            if again:
                others = [count for count in (1, 2, 4) if count != ranks[-1]]
                ranks.append(self.random.choice(others) if number % 2 else RANKS)
                self.figures.resumed_by_ranks[f"{ranks[-2]} -> {ranks[-1]}"] += 1
            more = again < kills and newest_step(folder) < STEPS
            if not more:
                self._finish(method, folder, ranks[-1])
                break
            kill = self._kill(folder, method, ranks[-1])
            codes, _ = self._attempt(method, folder, ranks[-1], kill)
            self._count(method, kill, codes, folder, ranks[-1])
        self._compare(folder, self.undisturbed[method], set(ranks) == {RANKS})
        self.figures.runs += 1
        self.say(f"{folder.name}: ranks {ranks}: the same end ({self.figures.kills} kills so far)")
        shutil.rmtree(folder)

    def _finish(self, method: str, folder: Path, ranks: int) -> None:
        codes, said = self._attempt(method, folder, ranks, None)
        assert codes == [0] * ranks, f"{folder.name}: exit codes {codes}\n{said}"

    def _attempt(self, method: str, folder: Path, ranks: int, kill: Kill | None) -> tuple[list[int | None], str]:
        """The exit codes and what was said."""
        with Ranks(ranks, training(method, self.vgg, folder, kill), folder.parent / f"{folder.name}.said") as started:
            codes = started.codes(SECONDS)
            text = "".join(started.said(rank) for rank in range(ranks))
            assert "Traceback" not in text, text
            if kill and ranks > 1:
                took = max(started.ended.values()) - started.ended[kill.rank]
                self.figures.longest_end_s = max(self.figures.longest_end_s, round(took, 2))
        return codes, text

    def _kill(self, folder: Path, method: str, ranks: int) -> Kill:
        """A moment in what is left of the run."""
        start = newest_step(folder)
        kind = self.random.random()
        step = self.random.randrange(start, STEPS)
        if kind < 0.4:
            saves = STEPS // CHECKPOINT_EVERY + 1
            operations = int(Path(f"{self.undisturbed[method]}.operations").read_text()) // saves
            left = saves - start // CHECKPOINT_EVERY
            return Kill(0, operation=self.random.randrange(left * operations))
        rank = self.random.randrange(ranks)
        if kind < 0.5:
            return Kill(rank, evaluation=1)
        return Kill(rank, step=step, delay=self.random.uniform(0, 0.04))

    def _count(self, method: str, kill: Kill, codes: list[int | None], folder: Path, ranks: int) -> None:
        figures = self.figures
        if codes[kill.rank] == 0:  # it was over before the moment came
            assert codes == [0] * ranks, codes
            return
        if ranks > 1 and codes.count(0) == ranks - 1:  # the others had ended, as all was done
            assert newest_step(folder) == STEPS, (codes, kill)
            return
        expected = [-signal.SIGKILL if rank == kill.rank else EXIT_RANK_LOST for rank in range(ranks)]
        assert codes == expected, (codes, kill)
        figures.kills += 1
        figures.methods[method] += 1
        figures.in_a_save += kill.operation >= 0
        figures.in_an_evaluation += kill.evaluation >= 0
        figures.of_rank_0 += kill.rank == 0
        figures.half_written_checkpoints_left += bool(list((folder / "checkpoints").glob(".step-*")))

    def _compare(self, folder: Path, undisturbed: Path, exact: bool) -> None:
        figures = self.figures
        steps = [int(line) for line in Path(f"{folder}.steps").read_text().split()]
        figures.steps += STEPS
        figures.steps_repeated += len(steps) - STEPS
        ours, theirs = rows(folder), rows(undisturbed)
        found, expected = (Counter((row["step"], "images" in row) for row in lines) for lines in (ours, theirs))
        figures.lines_missing += (expected - found).total()
        figures.lines_doubled += (found - expected).total()
        assert found == expected, found - expected or expected - found
        files = newest_tensors(folder), newest_tensors(undisturbed)
        assert files[0].keys() == files[1].keys()
        weights = [
            {str(file.relative_to(run)): file for file in sorted(run.glob("generators/*/*.safetensors"))}
            for run in (folder, undisturbed)
        ]
        assert weights[0].keys() == weights[1].keys()
        for one, other in zip(*(files_of.values() for files_of in weights), strict=True):
            files[0][one.name + one.parent.name] = one.read_bytes()
            files[1][one.name + one.parent.name] = other.read_bytes()
        if exact:
            figures.runs_compared_bit_by_bit += 1
            assert ours == theirs, next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
            for name, content in files[0].items():
                same = _tensors(content).keys() == _tensors(files[1][name]).keys() and all(
                    value.tobytes() == _tensors(files[1][name])[key].tobytes()
                    for key, value in _tensors(content).items()
                )
                figures.bytes_lost += 0 if same else len(content)
                assert same, name
            return
        figures.runs_compared_to_1e_5 += 1
        for left, right in zip(ours, theirs, strict=True):
            for key, value in left.items():
                self._close(np.array(value), np.array(right[key]), f"step {left['step']} {key}")
        for name, content in files[0].items():
            expected_tensors = _tensors(files[1][name])
            for key, array in _tensors(content).items():
                self._close(array, expected_tensors[key], f"{name} {key}")

    def _close(self, found: np.ndarray, expected: np.ndarray, name: str) -> None:
        """Relative to the tensor's largest value, as the sums over ranks are rounded at its scale."""
        scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
        difference = float(np.abs(found.astype(float) - expected.astype(float)).max(initial=0)) / scale
        self.figures.largest_relative_difference = max(self.figures.largest_relative_difference, difference)
        assert difference <= TOLERANCE, f"{name}: {difference:.1e}"


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load(content).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="another one at each start when not given")
    parser.add_argument("--minutes", type=float, default=30, help="begin no run after that")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(seed, Path(folder), lambda line: print(line, flush=True))
        torture.run(options.kills, start + 60 * options.minutes)
    described = {
        "what": "SIGKILL of random ranks of small runs; two in five inside a save",
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "seconds": round(time.monotonic() - start),
        "a_run": {
            "steps": STEPS,
            "checkpoint_every": CHECKPOINT_EVERY,
            "evaluate_every": EVALUATE_EVERY,
            "batch_size": BATCH,
            "ranks": RANKS,
        },
        **vars(torture.figures),
    }
    text = json.dumps(described, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
