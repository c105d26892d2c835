"""Speed of the sweep's tools: `python bench/sweep.py [--cells N] [--json]`.

Plans and submits a grid of 1,000 cells to a stand-in for SLURM, asks for the status of all its runs, and collects 1,000
results. Targets: 10 s with one sbatch call an array, 1 s, and 5 s. Nothing is trained; run it in the clone's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpcdistill.command import positive, run_command
from hpcdistill.console import Table, err, out, say
from hpcdistill.sweep import collect, submit
from hpcdistill.sweep.grid import load_grid
from hpcdistill.sweep.plan import Plan, make_plan
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import task_statuses

TARGETS = {"planned and submitted": 10.0, "status": 1.0, "collected": 5.0}  # seconds for 1,000 cells
METRIC = "student/set5/psnr"
LINES = 100  # of each run's metrics.jsonl; one in ten is an evaluation
SBATCH = """\
#!/bin/sh
echo x >> "{folder}/calls"
echo "Submitted batch job $(wc -l < "{folder}/calls")"
"""
SCONTROL = """\
#!/bin/sh
echo "MaxArraySize            = 1001"
"""
SQUEUE = """\
#!/bin/sh
cat "{folder}/queue" 2> /dev/null || true
"""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), options.cells)
    if options.json:
        out.out(json.dumps(report), highlight=False)
        return
    table = Table(title=f"A grid of {report['cells']:,} cells, {report['runs']:,} runs")
    for head in ("step", "seconds", "target"):
        table.add_column(head, justify="left" if head == "step" else "right")
    for step, seconds in report["seconds"].items():
        table.add_row(step, f"{seconds:.2f}", f"{TARGETS[step]:g}")
    out.print(table)
    say(f"{report['sbatch_calls']} sbatch calls for {report['arrays']} arrays and the collector's job")
    if not report["reaches_targets"]:
        say("not all targets are reached", style="yellow")


def measure(folder: Path, cells: int) -> dict[str, Any]:
    """The seconds of each step, the modules loaded before."""
    grid, runs, sweep = folder / "grid.yaml", folder / "runs", folder / "sweeps"
    grid.write_text(grid_text(cells), encoding="utf-8")
    words = [str(grid), f"runs={runs}"]
    plan = make_plan([load_grid(grid)], None, words[1:])  # a first time: what is loaded only once is not measured
    seconds: dict[str, float] = {}
    with stand_in(folder / "slurm") as calls, quiet():
        start = time.perf_counter()
        submit.main([*words, "--folder", str(sweep), "--no-data-check"])  # nothing is trained
        seconds["planned and submitted"] = time.perf_counter() - start
        queue_all(folder / "slurm", sweep)
        start = time.perf_counter()
        statuses = task_statuses(plan, sweep, runs, Queue())
        seconds["status"] = time.perf_counter() - start
        assert {status.state for status in statuses} == {"queued"}, statuses[0]
        save_results(plan, runs)
        start = time.perf_counter()
        collect.main([str(runs), *words[1:], "--grid", str(grid), "--folder", str(sweep), "--out", str(folder / "out")])
        seconds["collected"] = time.perf_counter() - start
        count = len(calls.read_text(encoding="utf-8").splitlines())
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert f"{cells} of {cells} finished" in page
    (submission,) = (sweep / "submissions").glob("*/plan.json")
    return {
        "cells": cells,
        "runs": len(plan.runs),
        "arrays": len(json.loads(submission.read_text(encoding="utf-8"))["arrays"]),
        "sbatch_calls": count,
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "targets": TARGETS,
        "reaches_targets": all(value < TARGETS[step] for step, value in seconds.items()),
    }


def grid_text(cells: int) -> str:
    """Students of one teacher, each with a weight of its own."""
    side = math.ceil(cells / 20)
    weights = "".join(f'    "{n}": {{set: [method.weight_vid={1e-6 * (n + 1):.3e}]}}\n' for n in range(side))
    steps = "".join(f'    "{n}": {{set: [train.steps={1000 + n}]}}\n' for n in range(math.ceil(cells / side)))
    return (
        "title: Many cells\nmetrics:\n"
        f"  psnr: {{label: PSNR, of: {METRIC}, better: higher}}\n"
        f"base: configs/dssd/x4.yaml\naxes:\n  weight:\n{weights}  steps:\n{steps}"
    )


@contextlib.contextmanager
def stand_in(folder: Path) -> Iterator[Path]:
    """SLURM's programs, first on PATH; the file that has a line for each call of sbatch."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    calls = folder / "calls"
    calls.touch()
    for name, text in {"sbatch": SBATCH, "srun": SQUEUE, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text.format(folder=folder), encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        yield calls
    finally:
        os.environ["PATH"] = before


def queue_all(folder: Path, sweep: Path) -> None:
    """Let squeue say that every run waits."""
    (submission,) = (sweep / "submissions").glob("*/plan.json")
    jobs = json.loads(submission.read_text(encoding="utf-8"))["jobs"].values()
    now = int(time.time())
    script = f"{submission.parent}/jobs/submission.sh"
    lines = [f"{job}|PENDING|{now}|N/A|Priority|{script}\n" for job in jobs]
    (folder / "queue").write_text("".join(lines), encoding="utf-8")


def save_results(plan: Plan, runs: Path) -> None:
    """A finished run folder for every run of the plan."""
    noise = random.Random(0)
    protocol = {"metric": "PSNR", "rule": "pisr", "scale": 4, "selects": METRIC, "test_sets": {"set5": 5}}
    for key, run in plan.runs.items():
        folder = runs / f"{run.name}-{key[:8]}"
        folder.mkdir(parents=True)
        numbers = {METRIC: 31 + noise.gauss(0, 0.1), "student/set5/ssim": 0.87}
        log = "".join(
            json.dumps({"step": step, **(numbers if step % 10 == 0 else {"loss": 0.1, "seconds": 1.0})}) + "\n"
            for step in range(1, LINES + 1)
        )
        (folder / "metrics.jsonl").write_text(log, encoding="utf-8")
        identity = {"identity": {"data": ["0" * 64], "selection": "1" * 64}, "sessions": []}
        (folder / "environment.json").write_text(json.dumps(identity), encoding="utf-8")
        result = {
            "name": run.name,
            "key": key,
            "method": run.loaded.config.method.name,
            "steps": LINES,
            "seed": run.seed,
            "best": {"step": LINES, "metrics": numbers},
            "last": {"step": LINES, "metrics": numbers},
            "protocol": protocol,
            "revision": "0" * 12,
        }
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what the tools say."""
    before = out.file, err.file
    out.file = err.file = io.StringIO()
    try:
        yield
    finally:
        out.file, err.file = before


if __name__ == "__main__":
    run_command(main)
