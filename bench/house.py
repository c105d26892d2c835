"""This checkout beside an older one, command by command, in turns: `python bench/house.py [--against 869aaa5]`.

Processor seconds (user and system, children too) and the largest resident memory of a whole process: printing a
configuration, planning every grid, the status of a sweep, and a training of FSRCNN on a CPU, whose seconds a step are
taken from its own log. With --tests also `make test` of both, which takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.command import positive, run_command
from hpcdistill.console import Table, out, say

CLONE = Path(__file__).resolve().parents[1]
STEPS = 60  # of the training; its first 20 are not counted
GRID = """\
title: Status
metrics: {psnr: {label: PSNR, of: student/photos/psnr, better: higher}}
base: configs/fsrcnn/x4.yaml
overlays: [configs/variants/cpu.yaml]
axes: {rate: {one: {}, two: {set: [method.optimizer.learning_rate=2e-3]}}}
"""


@dataclass(frozen=True)
class Cost:
    """Of one finished process."""

    seconds: float  # of processor time
    megabytes: float  # largest resident set
    output: str


@dataclass(frozen=True)
class Build:
    """A checkout, and a folder of its own for what it writes."""

    name: str
    clone: Path
    place: Path

    def run(self, *words: str) -> Cost:
        """One command, in the checkout's folder; RuntimeError with its last words when it fails."""
        environment = os.environ | {"PYTHONPATH": str(self.clone), "HPCDISTILL_DATA": str(self.place / "data")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the first run compiles, as it does for a user
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.clone, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            log.seek(0)
            output = log.read().decode(errors="replace")
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"{self.name}: {' '.join(words)}: {output[-500:]}")
        return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/house.py", description=__doc__)
    parser.add_argument("--against", default="869aaa5", metavar="REVISION", help="the older build (default: 869aaa5)")
    parser.add_argument("--runs", type=positive, default=5, help="of each command, in turns (default: 5)")
    parser.add_argument("--tests", action="store_true", help="`make test` of both, once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        older = folder / "older"
        git = ["git", "-C", str(CLONE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(older), options.against], check=True)
        try:
            builds = [Build("now", CLONE, folder / "a"), Build(options.against, older, folder / "b")]
            rows = _measure(builds, options.runs)
            if options.tests:
                rows["make test, processor s"] = {
                    build.name: [build.run("-m", "pytest", "-q").seconds] for build in builds
                }
        finally:
            subprocess.run([*git, "remove", "--force", str(older)], check=True)
    if options.json:
        out.out(json.dumps(rows), highlight=False)
    else:
        _show(rows, [build.name for build in builds])


def _measure(builds: Sequence[Build], runs: int) -> dict[str, dict[str, list[float]]]:
    """Row -> build -> its values, one a turn."""
    rows: dict[str, dict[str, list[float]]] = {}
    for build in builds:
        build.place.mkdir()
        (build.place / "grid.yaml").write_text(GRID)
        build.run("shards/pack.py", "photos")
        build.run(*_sweep(build))
    for turn in range(runs):
        for build in builds if turn % 2 == 0 else reversed(builds):
            say(f"turn {turn + 1} of {runs}: {build.name}")
            sweep = str(build.place / "sweeps")
            training = build.run(*_training(build, turn))
            values = {
                "print a configuration, processor s": build.run(
                    "-m", "hpcdistill.train", "configs/dssd/x4.yaml", "--print-config"
                ).seconds,
                "plan every grid, processor s": build.run(
                    "slurm/submit_ablations.py", "--dry-run", "--folder", str(build.place / "dry")
                ).seconds,
                "status of a sweep, processor s": build.run("slurm/status.py", "--folder", sweep).seconds,
                "a step of FSRCNN, ms": _step_ms(build, turn),
                "memory of that training, MB": training.megabytes,
            }
            for name, value in values.items():
                rows.setdefault(name, {}).setdefault(build.name, []).append(value)
    return rows


def _sweep(build: Build) -> list[str]:
    place = build.place
    own = [f"runs={place / 'sweep-runs'}", "train.steps=2", "train.device=cpu", "eval.every=2", "train.trackers=[]"]
    words = ["slurm/submit_ablations.py", str(place / "grid.yaml"), "--local", "--folder", str(place / "sweeps")]
    return [*words, *own]


def _training(build: Build, turn: int) -> list[str]:
    words = ["-m", "hpcdistill.train", "configs/fsrcnn/x4.yaml", "configs/variants/cpu.yaml", "train.device=cpu"]
    own = [f"train.steps={STEPS}", "train.log_every=20", "train.trackers=[]", "eval.every=1000", "data.workers=0"]
    return [*words, *own, "train.threads=1", "train.gradient_norms_every=0", f"runs={build.place / f'runs-{turn}'}"]


def _step_ms(build: Build, turn: int) -> float:
    """Milliseconds a step between the first and the last log line of the training of this turn."""
    [log] = (build.place / f"runs-{turn}").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    return 1000 * (seconds[STEPS] - seconds[20]) / (STEPS - 20)


def _show(rows: dict[str, dict[str, list[float]]], names: Sequence[str]) -> None:
    table = Table(title="medians")
    table.add_column("")
    for name in (*names, "ratio"):
        table.add_column(name, justify="right")
    for title, values in rows.items():
        now, older = (statistics.median(values[name]) for name in names)
        table.add_row(title, f"{now:.2f}", f"{older:.2f}", f"{now / older:.2f}")
    out.print(table)


if __name__ == "__main__":
    run_command(main)
