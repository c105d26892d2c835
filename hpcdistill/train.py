"""Train a run: `hpcdistill train CONFIG [CONFIG ...] [key=value ...]`.

Files and overrides are merged from left to right. A student's teacher is found by its identity, or trained first.
The same command again resumes; a finished run prints its result.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from hpcdistill.command import Parser, program, run_command
from hpcdistill.config import config_files, to_yaml
from hpcdistill.console import Table, is_main_process, out, warn
from hpcdistill.errors import EXIT_STOPPED, plural
from hpcdistill.metrics.reference import BICUBIC, below_bicubic, bicubic_value
from hpcdistill.metrics.selection import choice_of
from hpcdistill.run import Run, load_run
from hpcdistill.training.progress import NOTHING_MEASURED

GUIDE = """\
hpcdistill trains small image generators from large ones.

  hpcdistill train CONFIG [VARIANT ...] [key=value ...]

  a first run on a CPU:  hpcdistill train configs/dssd/x4.yaml configs/variants/cpu.yaml
  one GPU:               hpcdistill train configs/dssd/x4.yaml
  several GPUs:          accelerate launch --num_processes 4 -m hpcdistill.train configs/dssd/x4.yaml
  what would be run:     hpcdistill train configs/dssd/x4.yaml --print-config
"""


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    if not arguments:
        _guide()
        return 0
    parser = Parser(prog=program("train"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="configuration files and overrides")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    options = parser.parse_intermixed_args(arguments)
    run = load_run(options.config)
    if options.print_config:
        _print_configs(run)
        return 0
    # Imported only now: a configuration is printed, and a misspelt one refused, in a third of a second without torch.
    from hpcdistill.ranks.rendezvous import leave
    from hpcdistill.ranks.signals import StopSignals
    from hpcdistill.trainer import train

    with StopSignals(last=True) as signals:
        result = train(run, signals)
        leave()  # a launcher ends who is late by a signal
    if result is None:
        return EXIT_STOPPED
    _show(result)
    return 0


def _print_configs(run: Run) -> None:
    """The resolved configuration, and each teacher's once, whatever the number of roles that it fills."""
    roles: dict[str, list[str]] = {}
    for role, teacher in run.teachers.items():
        if teacher.run:
            roles.setdefault(to_yaml(teacher.run.config), []).append(role)
    sys.stdout.write(to_yaml(run.config))
    for config, filled in roles.items():
        sys.stdout.write(f"# configuration of {' and '.join(filled)}\n---\n{config}")


def _guide() -> None:
    """What to type, and the configurations there are."""
    out.print(GUIDE, markup=False)
    configs = config_files(Path("configs")) if Path("configs").is_dir() else []
    if configs:
        out.print("Configurations:")
        for path in configs:
            out.print(f"  {path}", markup=False)
        variants = sorted(Path("configs/variants").glob("*.yaml"))
        out.print("\nVariants, merged over a configuration:")
        for path in variants:
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            out.print(f"  {path}  {first if first.startswith('#') else ''}", markup=False)
    else:
        out.print("Run it from the clone's folder, where configs/ is.")


def _show(result: dict[str, Any]) -> None:
    """The result as a table, on rank 0."""
    if not is_main_process():
        return
    steps = plural(result["steps"], "step") if isinstance(result.get("steps"), int) else "None steps"
    title = f"{result['name']}-{result.get('identity')}: {steps}, {result.get('seconds') or 0:.0f} s"
    measured = {which: result.get(which) or {"step": None, "metrics": {}} for which in ("best", "last")}
    metrics = measured["last"]["metrics"]
    if not metrics:
        out.print(f"{title}; {NOTHING_MEASURED}", markup=False, soft_wrap=True)
        return
    table = Table(title=title)
    choice = choice_of(result)
    count = result.get("evaluations")
    of = f", of {plural(count, 'evaluation')}" if count else ""
    said = (f"best: chosen by {choice}{of}" if choice else None, (result.get("protocol") or {}).get("note"))
    table.caption = "; ".join(filter(None, said)) or None
    table.add_column("metric")
    for which, part in measured.items():
        table.add_column(f"{which} (step {part.get('step')})" if result.get(which) else which, justify="right")
    for metric in metrics:
        values = (part["metrics"].get(metric) for part in measured.values())
        table.add_row(Text(metric), *(f"{math.nan if value is None else value:.4f}" for value in values))
    for metric in dict.fromkeys(f"{BICUBIC}/{metric.partition('/')[2]}" for metric in metrics):
        if (value := bicubic_value(result, metric)) is not None:  # the same whatever the weights
            table.add_row(Text(metric), f"{value:.4f}", f"{value:.4f}", style="dim")
    out.print(table)
    for line in below_bicubic(result):
        warn(f"{result['name']}: {line}")


if __name__ == "__main__":
    run_command(main)
