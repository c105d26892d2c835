"""PSNR for the processor's time: `python bench/quality.py [--seconds N] [--seeds N [N ...]] [--json]`.

Trains the published student (FSRCNN at x4) and ours (the same network over the bicubic image) on BSD and T91, as long
as `--seconds` of processor time last, in turns, and measures both on B100 and Set5. Needs the packed sets bsd, t91,
b100 and set5 in $HPCDISTILL_DATA (docs/data.md), and one thread a training. Target: ours at least 0.8 dB above on B100.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcdistill.command import UserPath, positive, run_command
from hpcdistill.console import Table, out, say
from hpcdistill.data.places import data_root
from hpcdistill.errors import UserError

CLONE = Path(__file__).resolve().parents[1]
RECIPES = {
    "plain FSRCNN": (),
    "ours": ("configs/variants/ours.yaml",),
}
SETS = ("b100", "set5")
PROBE = 300  # steps of the training that tells how long one takes
TARGET = 0.8  # dB on B100
PUBLISHED = 25.94  # of PISR's code, plain FSRCNN, 3,000 iterations, about a minute of two cores (three seeds, +-0.05)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=positive, default=30, help="of processor time a training (default: 30)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--data", action=UserPath, help="folder of the packed sets (default: $HPCDISTILL_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    data = options.data or data_root()
    for name in ("bsd", "t91", *SETS):
        if not (data / name / "index.json").is_file():
            raise UserError(f"{data / name}: no packed set; pack it with `python shards/pack.py {name}`")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options.seconds, options.seeds, data, Path(folder))
    if options.json:
        out.out(json.dumps(results), highlight=False)
    else:
        show(results)


def measure(seconds: int, seeds: Sequence[int], data: Path, folder: Path) -> list[dict[str, Any]]:
    """One training a recipe and seed, the recipes in turns."""
    rows = []
    for seed in seeds:
        for name, recipe in RECIPES.items():
            # A step costs the difference of two short trainings: what starts Python is in both.
            costs = [train(recipe, steps, seed, data, folder)["cpu_seconds"] for steps in (PROBE // 3, PROBE)]
            step = (costs[1] - costs[0]) / (PROBE - PROBE // 3)
            steps = max(1, round(seconds / step))
            say(f"{name}, seed {seed}: {1000 * step:.1f} ms a step, {steps} steps")
            rows.append({"recipe": name, **train(recipe, steps, seed, data, folder, evaluated=True)})
    return rows


def train(
    recipe: Sequence[str], steps: int, seed: int, data: Path, folder: Path, evaluated: bool = False
) -> dict[str, Any]:
    """A training in a process of its own: its processor time, without the evaluation's, and its PSNR."""
    arguments = [
        sys.executable,
        *("-m", "hpcdistill.train", "configs/fsrcnn/x4.yaml", "configs/variants/quality.yaml", *recipe),
        *(f"train.steps={steps}", f"seed={seed}", f"runs={folder}", f"name=quality-{steps}", "train.trackers=[]"),
        *(
            [f"data.eval={{{', '.join(f'{name}: {data / name}' for name in SETS)}}}"]
            if evaluated
            else ["data.eval={}", "eval.select=null"]
        ),
    ]
    environment = {**os.environ, "HPCDISTILL_DATA": str(data), "OMP_NUM_THREADS": "1"}
    before = _children_seconds()
    subprocess.run(arguments, cwd=CLONE, env=environment, check=True, stdout=subprocess.DEVNULL)
    cpu_seconds = _children_seconds() - before
    result = {"steps": steps, "seed": seed, "cpu_seconds": cpu_seconds}
    if evaluated:
        [found] = sorted(folder.glob(f"quality-{steps}-*/result.json"), key=os.path.getmtime)[-1:]
        metrics = json.loads(found.read_text(encoding="utf-8"))["last"]["metrics"]
        result |= {name: metrics[f"student/{name}/psnr"] for name in SETS}
    return result


def show(results: Sequence[dict[str, Any]]) -> None:
    """The rows, and the difference on B100 over the seeds."""
    table = Table(title="PSNR [dB] for the same processor time")
    for heading in ("recipe", "seed", "steps", "CPU s with start and evaluation", *SETS):
        table.add_column(heading)
    for row in results:
        numbers = (f"{row[name]:.2f}" for name in SETS)
        table.add_row(row["recipe"], f"{row['seed']}", f"{row['steps']}", f"{row['cpu_seconds']:.0f}", *numbers)
    out.print(table)
    plain, ours = ([row["b100"] for row in results if row["recipe"] == name] for name in RECIPES)
    gain = statistics.mean(b - a for a, b in zip(plain, ours, strict=True))
    met = "met" if gain >= TARGET else "missed"
    out.print(f"ours on B100: {gain:+.2f} dB over plain FSRCNN trained here (target: +{TARGET}; {met})")
    over = statistics.mean(ours) - PUBLISHED
    out.print(f"and {over:+.2f} dB over the published trainer's plain FSRCNN ({PUBLISHED}) after a minute of two cores")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main)
