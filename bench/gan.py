"""What an iteration of a GAN's distillation costs: `python bench/gan.py [--rows NAME ...] [--threads N ...] [--json]`.

Updates of FESD, DCD and OMGD (CycleGAN, 256x256, batch 1) beside what the code released for DCD and OMGD computes:
gan_reference.py writes it down plainly, --peer runs it as it was released. Time in turns, ours and theirs, in one
process; peak memory of each in a process of its own. VGG16 is random. Theirs always computes in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gan_peer import Peer
from gan_reference import SIDE, Reference
from rich.box import SIMPLE_HEAD
from torch import Tensor

from hpcdistill.command import UserPath, positive, run_command
from hpcdistill.console import Table, out, say, warn
from hpcdistill.deploy.latency.memory import peak
from hpcdistill.methods.base import Phase
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.omgd import OMGD
from hpcdistill.methods.student_gan import STUDENT, StudentGAN
from hpcdistill.models.vgg import VGG16Features
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.metrics_log import RunningMeans
from hpcdistill.training.networks import Networks
from hpcdistill.training.nonfinite import NonFiniteGuard
from hpcdistill.training.run_folder import describe_session
from hpcdistill.training.segments import Courses, place_segments
from hpcdistill.training.update import Updates

# row -> our method, its phases, their update
ROWS = {
    "teacher": ("fesd", "teacher", "teacher"),
    "fesd student": ("fesd", "student", "student_dcd"),
    "dcd student": ("dcd", "student", "student_dcd"),
    "omgd student": ("omgd", "student", "student_omgd"),
    "fesd iteration": ("fesd", "iteration", "iteration"),
    "dcd iteration": ("dcd", "iteration", "iteration"),
}
TARGETS = {  # row, precision -> ours / theirs at most: of the seconds with two threads, of the peak memory
    ("fesd student", "fp32"): {"seconds": 0.6},
    ("fesd iteration", "fp32"): {"seconds": 0.65, "memory": 0.55},
    ("fesd iteration", "bf16"): {"seconds": 0.45},
}
STEPS = 1000  # of the run that our updates pretend to be part of
Update = Callable[[Tensor, Tensor], None]


class Ours:
    """The loop's own updates, `training.update.Updates`, of a method's phases."""

    def __init__(self, kind: str, phases: str, precision: str, threads: int) -> None:
        torch.manual_seed(0)
        self.method = method = built(kind)
        method.vgg = VGG16Features(method.config.style_layers)
        config = TrainConfig.model_validate(
            {"batch_size": 1, "device": "cpu", "precision": precision, "threads": threads, "gradient_norms_every": 0}
        )
        accelerator = make_accelerator(config)
        networks = Networks(method, accelerator, config)
        guard = NonFiniteGuard(method.generators, accelerator.device)
        stretches = place_segments(method.segments(), STEPS, evaluated=False)
        courses = Courses(stretches, method.groups)
        means = RunningMeans(accelerator.device)
        self.updates = Updates(networks, guard, means, config, courses, seed=0, steps=STEPS)
        self.phases: Sequence[Phase] = {
            "teacher": method.teachers_phases,
            "student": [phase for phase in method.phases if phase.name == STUDENT],
            "iteration": method.phases,
        }[phases]
        self.step = 0

    def __call__(self, a: Tensor, b: Tensor) -> None:
        self.updates.make(self.phases, self.step, [{"a": a, "b": b}])
        self.step += 1


def built(kind: str) -> StudentGAN:
    """FESD as configs/fesd/horse2zebra.yaml has it with one student update, DCD and OMGD as their configs."""
    if kind == "omgd":
        return OMGD(OMGD.Config())
    if kind == "dcd":
        values = {"shift": {"mode": "none"}, "weight_spectral": 0, "weight_student": 0}
        return DistilledGAN(DistilledGAN.Config.model_validate(values))
    return DistilledGAN(DistilledGAN.Config(spectrum="crop"))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/gan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2], help="default: 1 2")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of ours")
    parser.add_argument("--rounds", type=positive, default=5, help="updates of each side (default: 5)")
    parser.add_argument(
        "--peer", action=UserPath, metavar="FOLDER", help="DCD's released code in the reference's place"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args(arguments)
    if options.cell:
        out.out(json.dumps(measure(**json.loads(options.cell))), highlight=False)
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        warn(f"the load average is {load:.1f}: other programs slow this down; compare CPU times with one thread")
    session = describe_session()
    report: dict[str, Any] = {"cpu": session["cpu"], "torch": session["packages"]["torch"], "load": round(load, 2)}
    report["theirs"] = "DCD as released" if options.peer else "the reference"
    report["rows"] = rows(options)
    if options.json:
        out.out(json.dumps(report), highlight=False)
    else:
        show(report)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row in every precision and number of threads; theirs is measured anew beside each of ours."""
    found = []
    peer = str(options.peer.resolve()) if options.peer else None
    for name in options.rows:
        if peer and name.startswith("omgd"):
            say(f"{name}: left out, the peer is DCD")
            continue
        memory = {side: cell(name, "fp32", 1, peer, 2, side)["peak"] for side in ("ours", "theirs")}
        memory |= {"bf16": cell(name, "bf16", 1, peer, 2, "ours")["peak"]} if "bf16" in options.precisions else {}
        for precision in options.precisions:
            ours = memory["ours" if precision == "fp32" else precision]
            for threads in options.threads:
                say(f"{name}, {precision}, {threads} thread(s)")
                row = {"row": name, "precision": precision, "threads": threads}
                row |= cell(name, precision, threads, peer, options.rounds, "both")
                row["memory"] = {"ours": ours, "theirs": memory["theirs"], "ratio": ours / memory["theirs"]}
                found.append(row)
    return found


def cell(row: str, precision: str, threads: int, peer: str | None, rounds: int, side: str) -> dict[str, Any]:
    """`measure`, in a process of its own."""
    given = {"row": row, "precision": precision, "threads": threads, "peer": peer, "rounds": rounds, "side": side}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--cell", json.dumps(given)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(row: str, precision: str, threads: int, peer: str | None, rounds: int, side: str) -> dict[str, Any]:
    """Seconds of an update of each side, in turns after one of each; or, of one side alone, the process's peak."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    a, b = (2 * torch.rand(1, 3, SIDE, SIDE, generator=random) - 1 for _ in range(2))
    kind, phases, update = ROWS[row]
    sides: dict[str, Update] = {}
    with tempfile.TemporaryDirectory() as folder:
        if side != "ours":
            theirs = Peer(Path(peer), Path(folder)) if peer else Reference()
            sides["theirs"] = getattr(theirs, update)
        if side != "theirs":
            sides["ours"] = Ours(kind, phases, precision, threads)
        turns = [{name: seconds(partial(one, a, b)) for name, one in sides.items()} for _ in range(rounds + 1)][1:]
    if side != "both":
        return {"peak": peak()}
    found: dict[str, Any] = {"updates": rounds}
    for clock in ("wall", "cpu"):
        found[clock] = {name: statistics.median(turn[name][clock] for turn in turns) for name in sides}
        found[clock]["ratio"] = statistics.median(turn["ours"][clock] / turn["theirs"][clock] for turn in turns)
    return found


def seconds(run: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def show(report: dict[str, Any]) -> None:
    out.print(f"{report['cpu']}, torch {report['torch']}, load {report['load']}", soft_wrap=True)
    table = Table(title=f"an update, 256x256, batch 1, beside {report['theirs']} in float32", box=SIMPLE_HEAD)
    for heading in ("row", "threads", "s", "theirs", "ratio", "CPU s", "theirs", "ratio", "GB", "theirs", "ratio"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in report["rows"]:
        cells = [f"{row['row']}, {row['precision']}", str(row["threads"])]
        for key, scale in (("wall", 1.0), ("cpu", 1.0), ("memory", 1e9)):
            cells += [f"{row[key][side] / scale:.2f}" for side in ("ours", "theirs")] + [f"{row[key]['ratio']:.2f}"]
        table.add_row(*cells)
    out.print(table)
    for row in report["rows"]:
        for what, target in TARGETS.get((row["row"], row["precision"]), {}).items():
            if row["threads"] == 2:
                ratio = row["wall" if what == "seconds" else "memory"]["ratio"]
                verdict = "reached" if ratio <= target else "NOT reached"
                say(f"{row['row']}, {row['precision']}, {what}: {ratio:.2f}, target {target:.2f}: {verdict}")


if __name__ == "__main__":
    run_command(main)
