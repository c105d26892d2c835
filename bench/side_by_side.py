"""Cells of a small network, one after the other or side by side: `python bench/side_by_side.py [--cells K] [--json]`.

The real loop's steps (x4, batch 16, HR 192, float32, channels-last; no start, evaluation or checkpoint). "after": each
cell in turn, with a thread for each core; "single": the same with one thread. "beside": as `hpcdistill.side_by_side`
does it, all cells at once, one thread each. "stacked": the bare network's step with `torch.func`, all cells in one
operator, with all threads. The ways take turns in short pieces of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from step import BATCH, ENDLESS, SCALE, Feed, Times, machine, random_batches, student
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from hpcdistill.command import positive, run_command
from hpcdistill.console import Table, err, out
from hpcdistill.default_generator import sharing
from hpcdistill.methods.base import Batch, Method
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.side_by_side import _share_an_arena
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.loop import Training
from hpcdistill.training.run_folder import RunFolder

PATCH = 192
TARGET = 1.5  # times as fast
METHODS: dict[str, Callable[[], Method]] = {
    "FSRCNN": lambda: PlainSR(PlainSR.Config(scale=SCALE)),
    "DSSD student": lambda: student("hfrm"),
}


class Cells:
    """`count` trainings that are driven step by step."""

    def __init__(self, build: Callable[[], Method], count: int, folder: Path, stack: contextlib.ExitStack) -> None:
        signals = stack.enter_context(StopSignals())
        data = random_batches(PATCH)
        config = TrainConfig(
            batch_size=BATCH, device="cpu", channels_last=True, gradient_norms_every=0, log_every=ENDLESS, trackers=()
        )

        def batches() -> Iterator[Batch]:
            yield from itertools.cycle(data)

        self.trainings: list[tuple[Training, Iterator[list[Batch] | None]]] = []
        for number in range(count):
            run = RunFolder(folder / str(number))
            run.create("", {})
            training = Training(
                build(),
                Feed(batches),
                None,
                run,
                make_accelerator(config),
                config,
                steps=ENDLESS,
                evaluate_every=ENDLESS,
                seed=number,
                name="bench",
            )
            self.trainings.append((training, stack.enter_context(training._session(signals))))
        self.steps = 0

    def _steps(self, number: int, steps: int) -> None:
        training, batches = self.trainings[number]
        for step in range(self.steps, self.steps + steps):
            taken = next(batches)
            assert taken is not None
            training.take_step(step, taken)

    def after(self, steps: int) -> None:
        """All cells one after the other."""
        for number in range(len(self.trainings)):
            self._steps(number, steps)
        self.steps += steps

    def beside(self, steps: int) -> None:
        """All cells at once, a CPU thread each."""

        def work(number: int) -> None:
            torch.set_num_threads(1)
            self._steps(number, steps)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(self.trainings))]
        with sharing():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.steps += steps


class Stacked:
    """`count` FSRCNN as one: bare steps with Adam, stacked parameters and `vmap`."""

    def __init__(self, count: int) -> None:
        networks: list[nn.Module] = [METHODS["FSRCNN"]().generators["student"] for _ in range(count)]
        self.base = copy.deepcopy(networks[0])
        parameters, self.buffers = stack_module_state(networks)  # type: ignore[arg-type]
        self.parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self.adam = torch.optim.Adam(self.parameters.values(), fused=True)
        batch = random_batches(PATCH)[0]
        self.hr, self.lr = batch["hr"], batch[f"lr{SCALE}"].expand(count, *batch[f"lr{SCALE}"].shape)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            vmap(self._loss)(self.parameters, self.buffers, self.lr).sum().backward()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def _loss(self, parameters: Any, buffers: Any, lr: torch.Tensor) -> torch.Tensor:
        enlarged: torch.Tensor = functional_call(self.base, (parameters, buffers), (lr,))
        return (enlarged - self.hr).abs().mean()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/side_by_side.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=positive, default=8, help="default: 8")
    parser.add_argument("--rounds", type=positive, default=5, help="pieces of each way (default: 5)")
    parser.add_argument("--steps", type=positive, default=2, help="of each cell in a piece (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    load, threads = os.getloadavg()[0], len(os.sched_getaffinity(0))
    _share_an_arena()
    rows = [measure(name, options.cells, options.rounds, options.steps, threads) for name in METHODS]
    report = {"cells": options.cells, "rows": rows, **machine(threads, load), "load_after": os.getloadavg()[0]}
    if options.json:
        out.out(json.dumps(report), highlight=False)
    else:
        show(report)


def measure(name: str, cells: int, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds of a cell's step, each way, in every round."""
    err.quiet = True
    taken: dict[str, list[Times]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trained = Cells(METHODS[name], cells, Path(folder), stack)
        ways: dict[str, Callable[[int], None]] = {
            "after": trained.after,
            "single": trained.after,
            "beside": trained.beside,
        }
        if name == "FSRCNN":
            ways["stacked"] = Stacked(cells)
        for turn in range(rounds + 1):
            for way, work in ways.items():
                torch.set_num_threads(1 if way == "single" else threads)
                start = Times.now()
                work(steps if turn else 1)
                if turn:  # the first warms up
                    taken.setdefault(way, []).append(Times.now() - start)
    err.quiet = False
    each = steps * cells
    row: dict[str, Any] = {"method": name}
    for way, times in taken.items():
        row[way] = {"wall": [time.wall / each for time in times], "cpu": [time.cpu / each for time in times]}
    for way in taken.keys() - {"after"}:
        for kind in ("wall", "cpu"):
            ratios = [one / other for one, other in zip(row["after"][kind], row[way][kind], strict=True)]
            row[way][f"{kind}_ratio"] = statistics.median(ratios)
    return row


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['cells']} cells, seconds of one's step: median (least); ratio of neighbouring pieces")
    for title in ("method", "way", "wall", "CPU", "times as fast", "CPU ratio"):
        table.add_column(title)
    for row in report["rows"]:
        for way in ("after", "single", "beside", "stacked"):
            if way in row:
                times = [f"{statistics.median(row[way][k]):.3f} ({min(row[way][k]):.3f})" for k in ("wall", "cpu")]
                ratios = [f"{row[way][f'{k}_ratio']:.2f}" if way != "after" else "" for k in ("wall", "cpu")]
                table.add_row(row["method"], way, *times, *ratios)
    table.caption = f"{report['cpu']}, torch {report['torch']}, load {report['load']}; target: {TARGET} times"
    out.print(table)


if __name__ == "__main__":
    run_command(main)
