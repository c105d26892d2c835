"""Collect sweeps: `python slurm/collect.py [GRID ...] [key=value ...] [--runs DIR] [--out DIR] [--strict]`.

Every result.json becomes part of one tidy CSV, of the papers' tables and of a report that is one page.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from hpcdistill.command import Parser, UserPath, program, whole
from hpcdistill.console import Table, out, say, warn
from hpcdistill.data.places import VARIABLE
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import user_path
from hpcdistill.sweep.gather import Gathered, gather, gather_named, merged, run_folders
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.grid_file import SUFFIXES
from hpcdistill.sweep.grid_report import About, make_folder, write_report
from hpcdistill.sweep.plan import Plan, sort_words
from hpcdistill.sweep.plots import main_metric
from hpcdistill.sweep.results import Found, RunResult, find_results, key_of
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import SILENT_S, TaskStatus, task_statuses
from hpcdistill.sweep.submissions import Submission, read_submissions, submitted_files
from hpcdistill.sweep.table_layout import order_text
from hpcdistill.sweep.table_rows import ResultTable, TableRow
from hpcdistill.sweep.tables import make_tables

EXIT_DAMAGED = 1  # with --strict


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    folders = [options.runs] if options.runs else []
    folders += [user_path(word) for word in options.words if _is_folder(word)]
    if len(folders) > 1:
        raise UserError(f"{' '.join(map(str, folders))}: one folder of runs is read at a time")
    words = sort_words([word for word in options.words if not _is_folder(word)])
    folders = folders or [user_path(word.removeprefix("runs=")) for word in words.overrides if word.startswith("runs=")]
    names = [*words.grids, *(options.grid or ())]
    if options.data_root:
        os.environ[VARIABLE] = str(options.data_root)  # the configurations and the keys read it
    submissions, problems = read_submissions(options.folder)
    runs, *elsewhere = _run_folders(folders, submissions, options.with_others or not names)
    found = find_results(runs, *elsewhere)
    make_folder(options.out)
    gathered = _planned(names, words.overrides, options.seeds, submissions, options.with_others)
    gathered.left_out += problems
    plan, shown = gathered.plan, gathered.submitted
    tables = make_tables(plan, found, statuses_without_result(plan, found, options.folder, runs, submissions))
    tables = [
        table for table in tables if table.grid.name in shown or set(table.counts) - {"missing", "reported", "measured"}
    ]
    others = unused(plan, tables, found)
    if not tables and not others and not found.unreadable:
        raise UserError(f"{runs}: no result of any grid is there yet; python slurm/status.py says how far the runs are")
    about = About(
        title="The papers' tables, measured" if _of_papers(tables) else "What the sweep came to",
        command=shlex.join(["python", "slurm/collect.py", *arguments]),
        runs=", ".join(map(str, (runs, *elsewhere))),
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        left_out=tuple(gathered.left_out),
    )
    page = write_report(options.out, tables, found, others, about, macs_counter(plan))
    _show(tables, others)
    for run in found.unreadable:
        warn(f"left out: {run.line}")
    for line in found.twice:
        warn(line)
    for line in gathered.left_out:
        warn(f"not in the tables: {line}")
    for table in tables:
        for flag in table.flags:
            warn(f"{table.grid.name}: {flag}")
    say(f"{page}: open it in a browser; {options.out / 'results.csv'} and {options.out / 'tables'} have the numbers")
    return EXIT_DAMAGED if options.strict and (found.unreadable or gathered.left_out) else 0


def _planned(
    names: Sequence[str],
    overrides: Sequence[str],
    seeds: Sequence[int] | None,
    submissions: Sequence[Submission],
    with_others: bool,
) -> Gathered:
    """The grids `names`; besides, or without names, all that there are."""
    if not names:
        return gather(submissions, overrides, seeds)
    named = gather_named(load_grids(names, submitted_files(submissions)), submissions, overrides, seeds)
    if not with_others:
        return named
    others = gather(submissions, without=named.submitted)
    return Gathered(merged([named.plan, others.plan]), named.submitted | others.submitted, others.left_out)


def _is_folder(word: str) -> bool:
    """Whether a word is the folder of the runs: an earlier spelling of --runs."""
    path = user_path(word)
    return path.is_dir() or ("=" not in word and path.parent != Path() and path.suffix not in SUFFIXES)


def _run_folders(given: Sequence[Path], submissions: Sequence[Submission], everything: bool) -> list[Path]:
    """Where runs are read: as given, else runs; for all sweeps also where these have put theirs."""
    folders = [given[-1] if given else Path("runs")]
    more = run_folders(submissions) if everything else []
    if not given and more and not folders[0].is_dir():
        folders = []
    known = {folder.resolve() for folder in folders}
    return [*folders, *(folder for folder in more if folder.resolve() not in known)]


def statuses_without_result(
    plan: Plan, found: Found, folder: Path, runs: Path, submissions: list[Submission]
) -> dict[str, TaskStatus]:
    """The status of the runs of `plan` that have no result: by the sweep's files, else by their run folders."""
    wanted = [key for key in plan.runs if key not in found.by_key]
    statuses = {s.key: s for s in task_statuses(wanted, folder, runs, Queue(), submissions, found=found)}
    known = {status.run.name for status in statuses.values() if status.run}
    for config in sorted(runs.glob("*/config.yaml")):  # started by hand
        run = config.parent
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
        configs = [loaded.config.method, *(t.run.config.method for t in loaded.teachers.values() if t.run)]
        said = json.dumps([generator, *(config.model_dump(mode="json") for config in configs)], sort_keys=True)
        if said not in counted:
            from hpcdistill.metrics.cost import network_cost  # takes torch, which few tables need

            try:
                module = loaded.untrained().generators.get(generator)
                counted[said] = None if module is None else network_cost(module).macs / 1e9
            except (UserError, RuntimeError, AttributeError):  # a user's own network that the meta device cannot run
                counted[said] = None
        return counted[said]

    return count


def _parser() -> Parser:
    parser = Parser(
        prog=program("collect"),
        description="Collect finished runs into the papers' tables, a CSV and a report.",
        epilog="Without a GRID: all of configs/grids that have any result, all that was submitted, with the overrides "
        "and seeds of its submission, and the runs that belong to none; with one: its tables alone. Overrides and "
        "--seeds given here replace those. See docs/cluster.md.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="GRID|key=value",
        help="grids, by name or file; overrides and overlay files, as for submit_ablations.py",
    )
    parser.add_argument("--grid", nargs="+", metavar="GRID", help="the same as a GRID above")
    parser.add_argument("--with-others", action="store_true", help="show what is shown without a GRID as well")
    parser.add_argument("--runs", action=UserPath, metavar="DIR", help="folder of the runs (default: runs)")
    parser.add_argument("--seeds", nargs="+", type=whole, metavar="N", help="seeds of each cell (default: the grid's)")
    parser.add_argument("--out", action=UserPath, default=Path("sweeps/report"), help="default: sweeps/report")
    parser.add_argument("--folder", action=UserPath, default=Path("sweeps"), help="the sweep's files (default: sweeps)")
    parser.add_argument("--data-root", action=UserPath, metavar="DIR", help=f"of the runs (default: ${VARIABLE})")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a result.json or a grid is damaged")
    return parser


def _of_papers(tables: Sequence[ResultTable]) -> bool:
    return bool(tables) and all(table.grid.table for table in tables)


def _show(tables: Sequence[ResultTable], others: Sequence[RunResult]) -> None:
    """One line a table, on stdout."""
    shown = Table()
    printed = any(entry.printed is not None for table in tables for row in table.rows for entry in row.entries.values())
    heads = ("table", "finished", "without a result", *(["order against the paper's"] if printed else []))
    for head in heads:
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
        line = (table.grid.name, finished, without, "\n".join(orders))
        shown.add_row(*map(Text, line[: len(heads)]))
    if tables:
        out.print(shown)
    if others:
        named = plural(len(others), "finished run")
        say(f"belong to none of these tables, and are listed at the report's end: {named}")
