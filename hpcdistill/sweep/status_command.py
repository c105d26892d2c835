"""Watch a sweep: `python slurm/status.py [GRID ...] [--watch] [--json] [--cancel] [--retry failed|missing|all]`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hpcdistill.command import Parser, UserPath, program
from hpcdistill.console import out, say, warn
from hpcdistill.errors import EXIT_FAILED, UserError, nearest, plural
from hpcdistill.storage import user_path
from hpcdistill.sweep.processes import is_alive, parent_of
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import TaskStatus, task_statuses
from hpcdistill.sweep.status_table import SweepView, render, title
from hpcdistill.sweep.submissions import Submission, SubmittedCell, epoch, read_submissions, submitted_files
from hpcdistill.sweep.task_folder import read_task, task_keys

REFRESH_S = 3.0
ASK_S = 15.0  # between two questions to SLURM: its controller has other users


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    if not (folder := options.folder).is_dir():
        raise UserError(f"{folder}: no such folder; submit first, `python slurm/submit_ablations.py`, or give --folder")
    words = [*options.grid, *(options.more or ())]
    sweep = Sweep(options.folder, options.runs, words, Queue(keep_s=ASK_S if options.watch else 0.0))
    if options.cancel:
        return cancel(sweep)
    if options.retry:
        return retry(sweep, options.retry)
    if options.watch:
        return watch(sweep, options.all)
    view = sweep.look()
    if options.json:
        sys.stdout.write(json.dumps(as_json(view, sweep), indent=1) + "\n")
    else:
        out.print(render(view, None if options.all or not out.moves else out.size.height, options.all))
    return EXIT_FAILED if view.failed else 0


def _parser() -> Parser:
    parser = Parser(
        prog=program("status"),
        description="The state of a sweep's runs: from their files, and from SLURM where it answers.",
        epilog="Exit code: 0; 1 when a run has failed or a file is damaged; 2 for a mistake on the command line.",
    )
    parser.add_argument(
        "grid", nargs="*", metavar="GRID", help="grids that were submitted, by name or file (default: all)"
    )
    parser.add_argument("--grid", nargs="+", dest="more", metavar="GRID", help="the same as a GRID above")
    parser.add_argument(
        "--folder", action=UserPath, default=Path("sweeps"), help="the sweep's folder (default: sweeps)"
    )
    parser.add_argument("--runs", action=UserPath, default=Path("runs"), help="where the runs are (default: runs)")
    parser.add_argument("--all", action="store_true", help="every run, not only those that run or have failed")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--watch", action="store_true", help="keep showing it until nothing runs or waits, or Ctrl-C")
    action.add_argument("--json", action="store_true", help="one JSON object on stdout")
    action.add_argument("--cancel", action="store_true", help="cancel what runs or waits, without asking")
    action.add_argument(
        "--retry", choices=("failed", "missing", "all"), help="submit again what has failed, is missing"
    )
    return parser


class Sweep:
    """A sweep's folder, narrowed to some grids."""

    def __init__(self, folder: Path, runs: Path, words: Sequence[str], queue: Queue) -> None:
        self.folder, self.runs, self.words, self.queue = folder, runs, list(words), queue
        self.grids: list[str] = []  # the names that the words mean
        self.submissions: list[Submission] = []

    def look(self) -> SweepView:
        """Read everything anew. UserError when nothing was submitted, or not a grid that was asked for."""
        self.submissions, problems = read_submissions(self.folder)
        tasks = task_keys(self.folder)
        if not (self.submissions or tasks or problems):
            raise UserError(f"{self.folder}: nothing has been submitted; `python slurm/submit_ablations.py` does it")
        cells: dict[SubmittedCell, SubmittedCell] = {}
        for submission in self.submissions:  # newest first: what a grid's cell is now, not what it was once
            for cell in submission.cells:
                cells.setdefault(dataclasses.replace(cell, key=None), cell)
        known = dict.fromkeys(cell.grid for cell in cells.values())
        self.grids = [grid for word in self.words for grid in self._named(word, known)]
        by_key: dict[str, list[SubmittedCell]] = {}
        for cell in cells.values():
            if cell.key is not None and (not self.grids or cell.grid in self.grids):
                by_key.setdefault(cell.key, []).append(cell)
        keys = _with_teachers(by_key, self.submissions)
        if not self.grids:  # also what only a plan.json that is damaged now could place
            keys += [key for key in tasks if key not in keys and not any(key in s.runs for s in self.submissions)]
        statuses = task_statuses(keys, self.folder, self.runs, self.queue, self.submissions, problems)
        return SweepView(statuses, by_key, problems)

    def _named(self, word: str, known: Collection[str]) -> list[str]:
        """The submitted grids that `word` means: a name, a file, or one that includes others."""
        if word in known:
            return [word]
        # Imported only now: reading YAML would double the time that status takes to start.
        from hpcdistill.sweep.grid import grid_files
        from hpcdistill.sweep.grid_file import SUFFIXES

        hint = nearest(word, known) if known else "no plan.json can be read"
        path = user_path(word)
        if path.suffix in SUFFIXES and not path.is_file() and path.stem in known:
            return [path.stem]  # gone since it was submitted
        try:
            names = [file.stem for file in grid_files(word, submitted_files(self.submissions))]
        except UserError:
            if path.is_file():  # it is there, and something is wrong in it
                raise
            names = []
        if not (found := [name for name in names if name in known]):
            raise UserError(f"{word}: no such grid in {self.folder / 'submissions'}; {hint}")
        return found

    def shared(self, view: SweepView) -> set[str]:
        """Keys of runs that other grids need as well, as cells or teachers."""
        if not self.grids:
            return set()
        others = {
            cell.key: [cell]
            for submission in self.submissions
            for cell in submission.cells
            if cell.key is not None and cell.grid not in self.grids
        }
        return set(_with_teachers(others, self.submissions))


def _with_teachers(by_key: dict[str, list[SubmittedCell]], submissions: Sequence[Submission]) -> list[str]:
    """The keys and those of the teachers that they need, teachers first."""
    teacher: dict[str, str | None] = {}
    for submission in reversed(submissions):
        teacher.update({key: run.get("teacher") for key, run in submission.runs.items()})
    keys: dict[str, None] = {}
    for key in by_key:
        needed = teacher.get(key)
        while needed and needed not in keys:
            keys[needed] = None
            needed = teacher.get(needed)
    teachers = [key for key in keys if key not in by_key]
    return teachers + list(by_key)


def watch(sweep: Sweep, everything: bool) -> int:
    """Show the tables until nothing runs or waits any more, or Ctrl-C; in a file, whenever a run's state changes."""
    view = sweep.look()
    try:
        if not out.moves:
            view = _follow(sweep, view, everything)
            return EXIT_FAILED if view.failed else 0
        from rich.live import Live  # only a display that moves needs it

        with Live(render(view, out.size.height, everything), console=out, auto_refresh=False) as live:
            while not view.over:
                time.sleep(REFRESH_S)
                view = sweep.look()
                live.update(render(view, out.size.height, everything), refresh=True)
    except KeyboardInterrupt:
        say("the runs go on")
    return EXIT_FAILED if view.failed else 0


def _follow(sweep: Sweep, view: SweepView, everything: bool) -> SweepView:
    """`watch` where nothing can be drawn over; the last view."""
    shown = None
    while True:
        states = {status.key: status.state for status in view.statuses}
        if states != shown:
            out.print(render(view, None, everything))
            out.file.flush()
            shown = states
        if view.over:
            return view
        time.sleep(REFRESH_S)
        view = sweep.look()


def cancel(sweep: Sweep) -> int:
    """Cancel every run that runs or waits; those that other grids need stay. Says what it did."""
    view = sweep.look()
    kept = sweep.shared(view)
    jobs: dict[str, TaskStatus] = {}
    # They pass it on to their runs, which must not have it twice: the second Ctrl-C is not to save.
    runners = [] if sweep.grids else _stop_runners(sweep)
    ended = len(runners)
    for status in view.statuses:
        if status.state not in ("running", "queued", "blocked"):
            continue
        if status.key in kept:
            say(f"{title(view, status)}: left alone, other grids need it")
        elif status.job is not None:
            if status.state != "blocked" or status.job in sweep.queue.ask([status.job]):
                jobs[status.job] = status
        elif status.state == "running":
            ended += _stop_here(sweep, view, status, runners)
    complaints = sweep.queue.cancel(jobs) if jobs else []
    for line in complaints:
        warn(line)
    if not complaints:
        for job, status in jobs.items():
            say(f"{title(view, status)}: cancelled job {job} ({status.state})")
    say(
        f"cancelled {plural(0 if complaints else len(jobs), 'job')}, "
        f"stopped {plural(ended, 'process', 'processes')}; submit again to go on"
    )
    return EXIT_FAILED if complaints else 0


def _stop_here(sweep: Sweep, view: SweepView, status: TaskStatus, runners: Sequence[int]) -> int:
    """Signal a run of this machine, which then saves and ends; 1 when that was done."""
    state = read_task(sweep.folder / "tasks" / status.key).state
    host, process = state.get("host"), state.get("pid")
    if host != socket.gethostname() or not isinstance(process, int):
        warn(f"{title(view, status)}: runs on {host}; cancel it there")
        return 0
    if parent_of(process) in runners:
        return 0
    return _signal(process, epoch(state.get("started")), signal.SIGTERM, title(view, status))


def _stop_runners(sweep: Sweep) -> list[int]:
    """Signal the local runners, so that they stop their runs and start nothing more; their process numbers."""
    stopped = []
    for submission in sweep.submissions:
        if submission.local and submission.local[0] == socket.gethostname():
            name = f"the local runner of {submission.name}"
            # Not SIGINT, which it may ignore: a script starts so what it runs in the background.
            if _signal(submission.local[1], submission.time, signal.SIGTERM, name):
                stopped.append(submission.local[1])
    return stopped


def _signal(process: int, started: float | None, number: signal.Signals, name: str) -> int:
    if not is_alive(process, started):
        return 0
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError) as error:
        warn(f"{name}: process {process}: {error.strerror}")
        return 0
    say(f"{name}: told process {process} to save and stop")
    return 1


def retry(sweep: Sweep, what: str) -> int:
    """Submit again, with the words of the submissions that the grids are from."""
    sweep.look()
    commands: dict[tuple[str, ...], str] = {}
    placed: set[str] = set()
    for submission in sweep.submissions:
        grids = {cell.grid for cell in submission.cells}
        wanted = (grids & set(sweep.grids) if sweep.grids else grids) - placed
        placed |= wanted
        if not wanted:
            continue
        if submission.command is None:
            raise UserError(
                f"{submission.folder / 'plan.json'}: does not say how it was submitted; run your command again, "
                f"`python slurm/submit_ablations.py {shlex.join(sorted(wanted))} --retry {what}`"
            )
        commands.setdefault(submission.command, submission.name)
    from hpcdistill.sweep import submit  # triples the time that status takes to start, and only this needs it

    code = 0
    for command, name in commands.items():
        say(f"{name}: python slurm/submit_ablations.py {shlex.join(command)} --retry {what}")
        code = max(code, submit.main([*command, "--retry", what]))
    return code


def as_json(view: SweepView, sweep: Sweep) -> dict[str, Any]:
    """Everything as one JSON object; times in seconds."""
    counted = Counter(status.state for status in view.statuses)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "folder": str(sweep.folder),
        "slurm": sweep.queue.answers,
        "summary": dict(counted),
        "grids": {grid: dict(states) for grid, states in view.summary().items()},
        "runs": [_run_as_json(view, status) for status in view.statuses],
        "problems": list(view.problems),
    }


def _run_as_json(view: SweepView, status: TaskStatus) -> dict[str, Any]:
    values = dataclasses.asdict(status)
    for name in ("log", "run"):
        values[name] = str(values[name]) if values[name] else None
    if status.metric:
        name, value = status.metric
        values["metric"] = {"name": name, "value": value if math.isfinite(value) else None}
    cells = view.cells.get(status.key, ())
    values["cells"] = [{"grid": cell.grid, "title": cell.title, "seed": cell.seed} for cell in cells]
    return values
