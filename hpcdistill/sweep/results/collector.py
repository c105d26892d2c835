"""Collect a sweep: `python slurm/collect.py [RUNS] [--grid GRID ...] [--out DIR] [--strict]`.

Every result.json becomes part of one tidy CSV, of the papers' tables and of a report that is one page.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from hpcdistill.command import UserPath
from hpcdistill.config import configured_generators
from hpcdistill.console import out, say, warn
from hpcdistill.data.places import VARIABLE
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import user_path
from hpcdistill.sweep.grids.grid import load_grids
from hpcdistill.sweep.grids.plan import Plan, make_plan
from hpcdistill.sweep.results.collect import ResultTable, TableRow, collect
from hpcdistill.sweep.results.grid_report import About, make_folder, write_report
from hpcdistill.sweep.results.plots import main_metric
from hpcdistill.sweep.results.run_results import Found, RunResult, find_results, key_of
from hpcdistill.sweep.results.tables import order_text
from hpcdistill.sweep.watch.slurm_queue import Queue
from hpcdistill.sweep.watch.status import SILENT_S, TaskStatus, task_statuses

EXIT_DAMAGED = 1  # with --strict


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    overrides = [word for word in options.runs if "=" in word and not Path(word).is_dir()]
    folders = [word for word in options.runs if word not in overrides]
    if len(folders) > 1:
        raise UserError(f"{' '.join(folders)}: one folder of runs is read at a time")
    runs = user_path(folders[0] if folders else "runs")
    if options.data_root:
        os.environ[VARIABLE] = str(options.data_root)  # the configurations and the keys read it
    found = find_results(runs)
    make_folder(options.out)
    plan = make_plan(load_grids(options.grid or ()), options.seeds, overrides)
    statuses = known_statuses(plan, found, options.folder, runs)
    tables = collect(plan, found, statuses)
    if not options.grid:
        tables = [table for table in tables if set(table.counts) - {"missing", "reported", "measured"}]
    others = unused(plan, tables, found)
    if not tables and not others and not found.unreadable:
        raise UserError(f"{runs}: no result of any grid is there yet; python slurm/status.py says how far the runs are")
    about = About(
        title="The papers' tables, measured" if _of_papers(tables) else "What the sweep came to",
        command=shlex.join(["python", "slurm/collect.py", *arguments]),
        runs=str(runs),
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    page = write_report(options.out, tables, found, others, about, macs_counter(plan))
    _show(tables, others)
    for run in found.unreadable:
        warn(f"{run.folder / 'result.json'}: damaged, left out: {run.reason}")
    for line in found.twice:
        warn(line)
    for table in tables:
        for flag in table.flags:
            warn(f"{table.grid.name}: {flag}")
    say(f"{page}: open it in a browser; {options.out / 'results.csv'} and {options.out / 'tables'} have the numbers")
    return EXIT_DAMAGED if options.strict and found.unreadable else 0


def known_statuses(plan: Plan, found: Found, folder: Path, runs: Path) -> dict[str, TaskStatus]:
    """How the runs of `plan` are that have no result: what the sweep knows of them, else what their folders tell."""
    problems: list[str] = []
    wanted = [key for key in plan.runs if key not in found.by_key]
    statuses = {status.key: status for status in task_statuses(wanted, folder, runs, Queue(), problems=problems)}
    read = {run.folder.name for run in found.unreadable}
    for problem in problems:
        if not any(name in problem for name in read):  # those are said once
            warn(problem)
    known = {status.run.name for status in statuses.values() if status.run}
    for place in sorted(runs.glob("*/config.yaml")):  # started by hand
        run = place.parent
        if run.name in known or (run / "result.json").exists():
            continue
        key = key_of(run)
        if key in statuses and statuses[key].state == "missing":
            try:
                lives = time.time() - (run / "lock.json").stat().st_mtime < SILENT_S
            except OSError:
                lives = False
            if lives:
                statuses[key] = TaskStatus(key, run.name, "running", run=run)
            else:
                reason = f"{run}: the same command goes on with it"
                statuses[key] = TaskStatus(key, run.name, "stopped", reason=reason, run=run)
    return statuses


def unused(plan: Plan, tables: Sequence[ResultTable], found: Found) -> list[RunResult]:
    """The finished runs that are neither a cell of `tables` nor a teacher of one."""
    shown = {table.grid.name for table in tables}
    keys = {key for key, run in plan.runs.items() if any(grid in shown for grid, _, _ in run.uses)}
    folders = {run.folder for table in tables for run in table.runs}
    return [run for run in found.runs if run.key not in keys and run.folder not in folders]


def macs_counter(plan: Plan) -> Callable[[TableRow], float | None]:
    """What counts the MACs (10^9, the literature's rule) of the network that a row's first metric is of."""
    counted: dict[str, float | None] = {}

    def count(row: TableRow) -> float | None:
        measured = next(iter(row.cell.of.values()), None)
        key = row.trials[0].key if row.trials else None
        if measured is None or key is None:
            return None
        loaded = plan.runs[key].loaded
        generator = measured.partition("/")[0]
        configs = [loaded.config.method, *([loaded.teacher.config.method] if loaded.teacher else [])]
        said = json.dumps([generator, *(config.model_dump(mode="json") for config in configs)], sort_keys=True)
        if said not in counted:
            from hpcdistill.metrics.cost import network_cost

            try:
                module = configured_generators(loaded).get(generator)
                counted[said] = None if module is None else network_cost(module).macs / 1e9
            except (UserError, RuntimeError, AttributeError):  # a user's own network that the meta device cannot run
                counted[said] = None
        return counted[said]

    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/collect.py",
        description="Collect finished runs into the papers' tables, a CSV and a report.",
        epilog="Without --grid: all of configs/grids that have any result, and the runs that belong to none. Overrides "
        "and --seeds as they were given to submit_ablations.py. See docs/cluster.md.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUNS|key=value", help="folder of the runs (default: runs); overrides"
    )
    parser.add_argument("--grid", nargs="+", metavar="GRID", help="grids of configs/grids, or files")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of each cell (default: the grid's)")
    parser.add_argument("--out", action=UserPath, default=Path("sweeps/report"), help="default: sweeps/report")
    parser.add_argument("--folder", action=UserPath, default=Path("sweeps"), help="the sweep's files (default: sweeps)")
    parser.add_argument("--data-root", action=UserPath, metavar="DIR", help=f"of the runs (default: ${VARIABLE})")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a result.json is damaged")
    return parser


def _of_papers(tables: Sequence[ResultTable]) -> bool:
    return bool(tables) and all(table.grid.table for table in tables)


def _show(tables: Sequence[ResultTable], others: Sequence[RunResult]) -> None:
    """One line a table, on stdout."""
    shown = Table()
    for head in ("table", "finished", "without a result", "order against the paper's"):
        shown.add_column(head, overflow="fold")
    # Text: what a grid says is no markup, though it may look like some.
    for table in tables:
        counts: Mapping[str, int] = {str(state): count for state, count in table.counts.items()}
        runs = sum(len(row.trials) for row in table.rows)
        without = ", ".join(
            f"{count} {state}" for state, count in counts.items() if state not in ("finished", "reported", "measured")
        )
        metric = main_metric(table)
        orders = [order_text(order, alone=True) for order in table.orders if order.metric == metric]
        finished = f"{counts.get('finished', 0)} of {runs}"
        shown.add_row(*map(Text, (table.grid.name, finished, without, "\n".join(orders))))
    if tables:
        out.print(shown)
    if others:
        named = plural(len(others), "finished run")
        say(f"belong to none of these tables, and are listed at the report's end: {named}")
