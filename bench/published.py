"""The loop's steps beside those of a published trainer, side by side: `python bench/step.py --part published`.

Each side is a process of its own, so that neither gains from what the other does to its memory; all are asked for a
few steps in turn, round after round. A lever is the step of the row before with one thing more switched on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import step as single
import torch
from reference import Step

from hpcdistill.console import err, say
from hpcdistill.methods.base import Batch, Method
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.ops import own_backward
from hpcdistill.training.accelerator import keep_freed_memory

ROUND = 1.5  # seconds that a side measures before the next one's turn, at least one step
WARM = 2  # steps of a side that are not measured
KEPT = "theirs, freed memory kept"  # as ours is: what the ratios are of
DEFAULT = "the loop, as it comes"
PLAIN = "the loop, contiguous, PyTorch's backward"
LAST = "+ channels-last"
PRELU, CONVOLUTION, LOSS = "+ own PReLU", "+ own convolution", "+ own VID"


@dataclass(frozen=True)
class Case:
    """A step of ours, and the published one that it stands beside."""

    build: Callable[[], Method]
    reference: str  # of `reference.Step`
    patch: int
    target: float | None  # ours / theirs at most


def _teacher(encoder: str, degradation: str) -> Method:
    config = PrivilegedTeacherTraining.Config(scale=single.SCALE, encoder=encoder, degradation=degradation)  # type: ignore[arg-type]
    return PrivilegedTeacherTraining(config)


CASES = {
    "FSRCNN": Case(lambda: PlainSR(PlainSR.Config(scale=single.SCALE)), "fsrcnn", 192, 0.45),
    "FSRCNN-96": Case(lambda: PlainSR(PlainSR.Config(scale=single.SCALE)), "fsrcnn", 96, None),
    "PISR-student": Case(lambda: single.student("pisr"), "lean", 192, 0.40),
    "PISR-student-as-released": Case(lambda: single.student("pisr"), "student", 192, None),
    "DSSD-student": Case(lambda: single.student("hfrm"), "lean", 192, None),
    "PISR-teacher": Case(lambda: _teacher("pisr", "none"), "teacher", 192, 0.65),
    "DSSD-teacher": Case(lambda: _teacher("hfrm", "sdm"), "teacher", 192, 2.0),
}


def measure(cases: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """For each case the medians of every side, over `rounds` turns of each."""
    return [_row(name, rounds, threads) for name in cases]


def _row(name: str, rounds: int, threads: int) -> dict[str, Any]:
    case = CASES[name]
    sides = ["theirs", KEPT, DEFAULT, PLAIN, LAST, PRELU, CONVOLUTION, *([LOSS] if "student" in name else [])]
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_Worker(name, side, threads)) for side in sides}
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for turn in range(rounds):
            say(f"{name}: round {turn + 1} of {rounds}")
            for side, worker in workers.items():
                taken[side].append(worker.measure())
    found: dict[str, Any] = {}
    kept = taken[KEPT]
    for side, turns in taken.items():
        found[side] = {
            **{f"{clock}_seconds": statistics.median(turn[clock] for turn in turns) for clock in ("wall", "cpu")},
            # Of neighbours in time: whatever else the machine did, it did to both.
            "of_theirs": statistics.median(turn["cpu"] / other["cpu"] for turn, other in zip(turns, kept, strict=True)),
            "of_theirs_wall": statistics.median(
                turn["wall"] / other["wall"] for turn, other in zip(turns, kept, strict=True)
            ),
        }
    best = min(found[side]["cpu_seconds"] for side in (PLAIN, LAST))
    return {
        "step": name,
        "patch": case.patch,
        "reference": case.reference,
        "target": case.target,
        "sides": found,
        "of_plain_in_its_better_layout": found[DEFAULT]["cpu_seconds"] / best,
    }


class _Worker:
    """A process that makes the steps of one side when it is asked to."""

    def __init__(self, case: str, side: str, threads: int) -> None:
        command = [sys.executable, str(Path(__file__)), case, side, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Worker:
        return self

    def measure(self) -> dict[str, float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _theirs(case: Case, turns: _Turns) -> None:
    trainer = Step(case.reference, single.SCALE)
    for batch in itertools.cycle(single.random_batches(case.patch)):
        if not turns.wait():
            return
        trainer(batch)


def _ours(case: Case, turns: _Turns, layout: str | None, threads: int) -> None:
    err.quiet = True  # the loop's own lines say nothing here

    def batches() -> Iterator[Batch]:
        for batch in itertools.cycle(single.random_batches(case.patch)):
            if not turns.wait():
                raise single._EnoughError
            yield batch

    single.run_loop(case.build(), batches, layout, threads, trackers=())


class _Turns:
    """Times the steps between two calls of `wait`: for each line of stdin those of `ROUND` seconds."""

    def __init__(self) -> None:
        self.taken: list[single.Times] = []
        self.calls = 0
        self.started = 0.0
        self.before = single.Times.now()

    def wait(self) -> bool:
        """Before each step, until it says that there is none to make."""
        now, self.calls = single.Times.now(), self.calls + 1
        if self.calls <= WARM:
            return True
        if self.calls > WARM + 1:
            self.taken.append(now - self.before)
        if not self.taken or time.perf_counter() - self.started >= ROUND:
            if self.taken:
                walls, cpus = [one.wall for one in self.taken], [one.cpu for one in self.taken]
                medians = {"wall": statistics.median(walls), "cpu": statistics.median(cpus)}
                sys.stdout.write(json.dumps(medians) + "\n")
                sys.stdout.flush()
            self.taken = []
            if not sys.stdin.readline():
                return False
            self.started = time.perf_counter()
        self.before = single.Times.now()
        return True


def _switched(side: str) -> contextlib.AbstractContextManager[Any]:
    """With only the levers of this row and of those before it."""
    order = (PLAIN, LAST, PRELU, CONVOLUTION, LOSS)
    if side not in order:
        return contextlib.nullcontext()
    off = {PRELU: "_PReLU", CONVOLUTION: "_Conv2d", LOSS: "_Laplace _ScaledSoftplus"}
    stack = contextlib.ExitStack()
    for lever in order[order.index(side) + 1 :]:
        for kind in off.get(lever, "").split():
            stack.enter_context(mock.patch.object(own_backward, kind, _Ordinary(kind)))
    return stack


class _Ordinary:
    """PyTorch's own operation in the place of one with an own backward pass."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def apply(self, *inputs: Any) -> Any:
        functional = torch.nn.functional
        if self.kind == "_PReLU":
            return functional.prelu(*inputs)
        if self.kind == "_Conv2d":
            return functional.conv2d(*inputs)
        if self.kind == "_ScaledSoftplus":
            x, scale, smallest = inputs
            return scale * functional.softplus(x) + smallest
        mu, b, target = inputs
        return (torch.log(2 * b) + (target - mu).abs() / b).mean()


def main() -> None:
    """A worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("side")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    case, turns = CASES[options.case], _Turns()
    if options.side.startswith("theirs"):
        if options.side == KEPT:
            keep_freed_memory()
        _theirs(case, turns)
    else:
        layouts = {DEFAULT: None, PLAIN: "contiguous"}
        with _switched(options.side):
            _ours(case, turns, layouts.get(options.side, "channels_last"), options.threads)


if __name__ == "__main__":
    main()
