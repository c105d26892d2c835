"""What a training step costs: `python bench/step.py [--part overhead|published] [--threads N] [--json]`.

overhead: the real loop against a bare PyTorch step of the same networks, in turns, in one run.
published: the loop's steps beside those of a published trainer (reference.py), and what each lever gives.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loader import make_set
from rich.box import SIMPLE_HEAD
from torch import Tensor
from torch.nn import functional

from hpcdistill.command import run_command
from hpcdistill.console import Table, out, say, warn
from hpcdistill.data.config import DataConfig
from hpcdistill.data.read.reader import PatchReader
from hpcdistill.methods.base import Batch, Method, OptimizerSettings
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.loop import Training
from hpcdistill.training.run_folder import RunFolder, describe_session

BATCH, PATCH, SCALE = 16, 192, 4
TINY = 16  # HR patch with hardly any arithmetic: what is left is what the loop itself takes
TARGET = 0.05  # what the loop may add to a bare step
BLOCK = 4  # steps of one side before the other's turn
IDLE = 0.5  # load average up to which the machine counts as free
ENDLESS = 10**9
LAYOUTS = ("contiguous", "channels_last")
# No decay, so that the loop and the bare step train with the same rate and must end with the same weights.
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, schedule="constant")


class _EnoughError(Exception):
    """Ends a run that has been measured for long enough; the loop would go on for ever."""


@dataclass(frozen=True)
class Feed:
    """The loop's reader: batches from any generator, which takes the times between them."""

    batches: Callable[[], Iterator[Batch]]

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        return self.batches()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("overhead", "published", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each row's measurement (default: 15)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="of PyTorch; default: the cores there are")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side of `published` (default: 5)")
    parser.add_argument("--cases", nargs="*", help="rows of `published`; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > IDLE:
        warn(f"the load average is {load:.1f}: other programs slow this down; compare CPU times, or run it again idle")
    report: dict[str, Any] = {"machine": machine(options.threads, load), "batch": BATCH, "scale": SCALE}
    if options.part != "published":
        report["overhead"] = {"target": TARGET, "rows": measure_overhead(options.seconds, options.threads)}
        rows = report["overhead"]["rows"].values()
        report["overhead"]["reached"] = all(
            row["overhead"] <= TARGET for row in rows if (row["reader"], row["patch"]) == ("prepared", PATCH)
        )
    if options.part != "overhead":
        import published  # which reads this file: its workers are started with it

        cases = options.cases or list(published.CASES)
        rows = published.measure(cases, options.rounds, options.threads)
        report["published"] = {"rows": rows}
    if options.json:
        out.out(json.dumps(report), highlight=False)
    else:
        show(report)


def measure_overhead(seconds: float, threads: int) -> dict[str, dict[str, Any]]:
    """The loop against the bare step, each row for `seconds`: prepared batches in both layouts, and a real reader."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder), images=48, height=320, width=480)
        needs = student("hfrm").needs
        reader = PatchReader([Path(folder)], needs, DataConfig(patch=PATCH, cache="ram"), seed=0, batch_size=BATCH)
        for layout in LAYOUTS:
            for source, patch, read in (
                ("prepared", PATCH, None),
                ("from ram", PATCH, reader),
                ("prepared", TINY, None),
            ):
                name = f"{layout} {source} {patch}"
                say(f"overhead: {name}")
                row = {"layout": layout, "reader": source, "patch": patch}
                rows[name] = row | overhead(layout, patch, read, seconds, threads)
    return rows


def overhead(layout: str, patch: int, reader: PatchReader | None, seconds: float, threads: int) -> dict[str, Any]:
    """DSSD's student: blocks of the loop's steps and of bare steps in turns, until `seconds` are over.

    The bare side always has prepared batches; with a `reader` its work is part of the loop's side.
    """
    method = student("hfrm")
    bare = BareStep(copy.deepcopy(method), layout)
    prepared = random_batches(patch)
    of_loop: list[Times] = []
    of_bare: list[Times] = []

    def batches() -> Iterator[Batch]:
        delivered = iter(reader.loader(0, ENDLESS)) if reader else itertools.cycle(prepared)
        wanted = itertools.cycle(prepared)
        started = time.perf_counter()
        for turn in itertools.count():
            start = Times.now()
            for batch in itertools.islice(delivered, BLOCK):
                yield batch
            middle = Times.now()  # the loop asks for the next batch once it is through with the last
            for batch in itertools.islice(wanted, BLOCK):
                bare(batch)
            if turn == 0:  # the first block warms up
                if reader is None:
                    check_equal(method, bare.method)
                continue
            of_loop.append(middle - start)
            of_bare.append(Times.now() - middle)
            if turn >= 3 and time.perf_counter() - started > seconds:
                raise _EnoughError

    run_loop(method, batches, layout, threads, trackers=("tensorboard",))
    pairs = list(zip(of_loop, of_bare, strict=True))
    return {
        "steps": BLOCK * len(pairs),
        "added_cpu_seconds": statistics.median(loop.cpu - step.cpu for loop, step in pairs) / BLOCK,
        "loop_seconds": statistics.median(loop.wall for loop in of_loop) / BLOCK,
        "bare_seconds": statistics.median(step.wall for step in of_bare) / BLOCK,
        # Of neighbours in time: whatever else the machine did, it did to both.
        "overhead": statistics.median(loop.wall / step.wall for loop, step in pairs) - 1,
        "overhead_cpu": statistics.median(loop.cpu / step.cpu for loop, step in pairs) - 1,
        # With the log lines, which most blocks do not have.
        "overhead_total": sum(loop.wall for loop in of_loop) / sum(step.wall for step in of_bare) - 1,
        "overhead_cpu_total": sum(loop.cpu for loop in of_loop) / sum(step.cpu for step in of_bare) - 1,
    }


class BareStep:
    """One training step as it is written down without a library: the student's networks, VID, fused Adam."""

    def __init__(self, method: PrivilegedStudent, layout: str) -> None:
        self.method = method.to(memory_format=memory_format(layout)).train()
        self.network, self.teacher = method.student, method.teacher
        module: Any = method.groups["student"].module
        self.estimator = module.estimator
        self.adam = torch.optim.Adam(module.parameters(), lr=OPTIMIZER.learning_rate, eps=OPTIMIZER.eps, fused=True)

    def __call__(self, batch: Batch) -> None:
        hr, lr = batch["hr"], batch[f"lr{SCALE}"]
        sr, maps = self.network(lr, maps=("expanding",))
        mu, b = self.estimator(maps["expanding"])
        with torch.no_grad():
            target = self.teacher.features(hr, "expanding")
        vid = (torch.log(2 * b) + (target - mu).abs() / b).mean()
        loss = functional.l1_loss(sr, hr) + 1e-6 * vid
        loss.backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def run_loop(
    method: Method, batches: Callable[[], Iterator[Batch]], layout: str | None, threads: int, trackers: tuple[str, ...]
) -> None:
    """`training.loop.Training` in float32 without evaluation, until `batches` raises _EnoughError.

    `layout` None: what the loop takes by itself.
    """
    chosen = {} if layout is None else {"channels_last": layout == "channels_last"}
    config = TrainConfig(
        batch_size=BATCH,
        device="cpu",
        **chosen,
        threads=threads,
        log_every=100,
        gradient_norms_every=0,
        checkpoint_every=ENDLESS,
        trackers=trackers,
    )
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.create("", {})
        accelerator = make_accelerator(config, folder.path)
        if trackers:
            accelerator.init_trackers("tensorboard")
        try:
            Training(
                method,
                Feed(batches),
                None,
                folder,
                accelerator,
                config,
                steps=ENDLESS,
                evaluate_every=ENDLESS,
                seed=0,
                name="bench",
            ).run()
        except _EnoughError:
            return
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()  # not end_training, which would end the process group as well
    raise KeyboardInterrupt  # only a stop signal ends an endless run; the loop took it for a request to save


def student(encoder: str) -> PrivilegedStudent:
    """DSSD's student (encoder "hfrm") or PISR's ("pisr"), with an untrained teacher: its step takes as long."""
    torch.manual_seed(0)
    degradation = "sdm" if encoder == "hfrm" else "none"
    teacher = PrivilegedTeacher(SCALE, encoder=encoder, degradation=degradation)  # type: ignore[arg-type]
    return PrivilegedStudent(PrivilegedStudent.Config(scale=SCALE, optimizer=OPTIMIZER), {"teacher": teacher})


def random_batches(patch: int) -> list[dict[str, Tensor]]:
    """Eight batches of noise; HR and its LR images have nothing to do with each other."""
    random = torch.Generator().manual_seed(0)
    sides = {"hr": patch, "lr2": patch // 2, f"lr{SCALE}": patch // SCALE}
    return [
        {name: torch.rand(BATCH, 1, side, side, generator=random) for name, side in sides.items()} for _ in range(8)
    ]


def check_equal(one: Method, other: Method) -> None:
    """The comparison is only worth something when both sides did the same work."""
    theirs: Mapping[str, Tensor] = other.state_dict()
    worst = max(float((value - theirs[name]).abs().max()) for name, value in one.state_dict().items())
    assert worst < 1e-4, f"the loop and the bare step trained different weights (difference {worst:.2g})"


@dataclass(frozen=True)
class Times:
    wall: float  # seconds on the clock
    cpu: float  # seconds of processor time, of all threads

    @staticmethod
    def now() -> Times:
        return Times(time.perf_counter(), time.process_time())

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.cpu - other.cpu)


def memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def machine(threads: int, load: float) -> dict[str, Any]:
    session = describe_session()
    packages = {name: session["packages"][name] for name in ("torch", "accelerate")}
    return {"cpu": session["cpu"], "threads": threads, "load": round(load, 2), "idle": load <= IDLE} | packages


def show(report: dict[str, Any]) -> None:
    what = report["machine"]
    out.print(f"{what['cpu']}, {what['threads']} threads, torch {what['torch']}, load {what['load']}", soft_wrap=True)
    if "overhead" in report:
        table = Table(title=f"what the loop adds to a bare step: DSSD student x{SCALE}, batch {BATCH}", box=SIMPLE_HEAD)
        for heading in ("layout, batches, HR", "loop ms", "bare ms", "added", "CPU", "CPU ms"):
            table.add_column(heading, justify="left" if heading.startswith("layout") else "right")
        for name, row in report["overhead"]["rows"].items():
            milliseconds = (f"{row[key] * 1e3:.1f}" for key in ("loop_seconds", "bare_seconds"))
            added = (f"{row[key]:+.1%}" for key in ("overhead", "overhead_cpu"))
            table.add_row(name, *milliseconds, *added, f"{row['added_cpu_seconds'] * 1e3:+.2f}")
        out.print(table)
        verdict = "reached" if report["overhead"]["reached"] else "NOT reached"
        say(f"target {TARGET:.0%} with prepared batches of HR {PATCH}: {verdict}")
    for row in report.get("published", {}).get("rows", ()):
        target = "" if row["target"] is None else f", target {row['target']:.2f}"
        table = Table(title=f"{row['step']} beside PISR's {row['reference']}{target}", box=SIMPLE_HEAD)
        for heading in ("HR " + str(row["patch"]), "s", "CPU s", "of theirs", "CPU"):
            table.add_column(heading, justify="left" if heading.startswith("HR") else "right")
        for side, found in row["sides"].items():
            seconds = (f"{found[key]:.3f}" for key in ("wall_seconds", "cpu_seconds"))
            table.add_row(side, *seconds, *(f"{found[key]:.2f}" for key in ("of_theirs_wall", "of_theirs")))
        out.print(table)
        say(f"of the plain step in its better layout: {row['of_plain_in_its_better_layout']:.2f}")


if __name__ == "__main__":
    run_command(main)
