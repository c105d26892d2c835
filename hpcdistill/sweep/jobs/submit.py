"""Submit the ablation grids: `python slurm/submit_ablations.py [GRID ...] [OVERLAY ...] [key=value ...]`.

Or run them here (--local). Again, it leaves alone what has finished or is in the queue, and submits the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdistill.command import UserPath, positive, whole
from hpcdistill.console import out, say, warn
from hpcdistill.data.places import VARIABLE, data_root
from hpcdistill.errors import UserError, plural
from hpcdistill.file_lock import locked
from hpcdistill.storage import user_path
from hpcdistill.sweep.grids.grid import EVERYTHING, Grid, grid_file, load_grids
from hpcdistill.sweep.grids.words import sort_words
from hpcdistill.sweep.jobs.profile import Profile, load_profile
from hpcdistill.sweep.watch.submissions import Submission, read_submissions, submitted_files, submitted_grids

if TYPE_CHECKING:
    from hpcdistill.sweep.grids.plan import Plan
    from hpcdistill.sweep.jobs.arrays import Retry, Selection
    from hpcdistill.sweep.watch.status import TaskStatus

FOLDER = Path("sweeps")
REPORT = "report"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    words = sort_words(options.grid)
    # What is wrong with the words themselves is said at once, before torch is loaded.
    profile = Profile() if options.local and not options.cluster else load_profile(options.cluster or "default")
    submissions = read_submissions(options.folder)[0]
    submitted = submitted_files(submissions)
    grids = load_grids(words.grids, submitted)
    if not (options.local or options.dry_run):
        from hpcdistill.sweep.jobs.cluster_jobs import check_slurm

        check_slurm()
    if VARIABLE in profile.environment:  # the configurations are resolved here
        os.environ[VARIABLE] = os.path.expandvars(profile.environment[VARIABLE])

    from hpcdistill.sweep.grids.plan import make_plan
    from hpcdistill.sweep.jobs.submission import set_aside_damaged

    overrides = [*profile.set, *words.overrides]
    origins = dict.fromkeys(profile.set, f"--cluster {options.cluster or 'default'}: set")
    plan = make_plan(grids, options.seeds, overrides, origins=origins)
    if not options.local:
        check_fits(plan, profile, options.cluster or "default")
    runs = runs_folder(plan)
    named = [str(grid_file(word, submitted)) if word in submitted else word for word in words.grids]
    prefetch = shlex.join(prefetch_command(named, overrides, profile))
    if options.dry_run:
        selection = _show(plan, grids, profile, runs, options)
        if lacking := _lacking(selection, prefetch, options):
            warn(lacking)
        return 0
    with _alone(options.folder):
        statuses = known_statuses(plan, options.folder, runs)
        selection = _selected(plan, statuses, options)
        if lacking := _lacking(selection, prefetch, options):
            raise UserError(lacking)
        set_aside_damaged(runs, selection.chosen, statuses)
        collect = collect_command(words.grids, overrides, options.seeds, runs, options.folder)
        again = _without_retry(arguments)
        if not selection.chosen and not are_noted(plan, submissions):
            note_grids(options.folder, plan, again)
        if not options.local:
            return _submit(plan, selection, profile, options, (words.grids, overrides, runs), again)
        from hpcdistill.sweep.jobs.local import Local

        # What is written down is: another submission that starts now leaves these runs alone.
        here = Local(plan, selection, options.folder, profile, options.parallel, collect, again)
    return here.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/submit_ablations.py",
        description="Submit the runs of ablation grids: teachers, then students, then the tables. Returns at once.",
        epilog="Without a GRID: all tables of both papers. Again: what has finished or is queued is left alone. "
        "Watch with `python slurm/status.py`. See docs/cluster.md.",
    )
    parser.add_argument(
        "grid",
        nargs="*",
        metavar="GRID|OVERLAY|key=value",
        help="grids, by name or file; overlay files and overrides, which hold for every run",
    )
    parser.add_argument("--cluster", metavar="PROFILE", help="of slurm/clusters, or a file (default: default)")
    parser.add_argument("--seeds", nargs="+", type=whole, metavar="N", help="seeds of each cell (default: the grid's)")
    parser.add_argument(
        "--parallel",
        type=positive,
        metavar="N",
        help="runs of each stage (teachers, students) at the same time, with --local of all (default: the profile's)",
    )
    parser.add_argument(
        "--retry",
        choices=("missing", "failed", "all"),
        default="missing",
        help="missing: what never ran, was stopped or lost; failed: what failed; all: both (default: missing)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and the job script; change nothing")
    parser.add_argument(
        "--no-data-check", action="store_true", help="start runs whose data this machine does not see: the nodes do"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine's GPUs, or its CPU, not on SLURM")
    parser.add_argument(
        "--folder", action=UserPath, default=FOLDER, help="where the sweep keeps its files (default: sweeps)"
    )
    return parser


def check_fits(plan: Plan, profile: Profile, name: str) -> None:
    """UserError, naming a cell, when a run cannot be run as the profile says."""
    paths = {grid.name: grid for grid in plan.grids}
    for run in plan.runs.values():
        try:
            profile.check_fits(run.loaded.config)
        except UserError as error:
            grid_name, number, _ = run.uses[0]
            grid = paths[grid_name]
            raise UserError(
                f"{grid.path}: ({grid.cells[number].title}): {run.name}, --cluster {name}: {error}"
            ) from None


def runs_folder(plan: Plan) -> Path:
    """Where all runs of the plan are put. UserError for several folders, and for a data set that the runs read."""
    from hpcdistill.requirements import check_runs_apart

    for run in plan.runs.values():
        check_runs_apart(run.loaded.config)
    folders = sorted({run.loaded.config.runs for run in plan.runs.values()})
    if len(folders) > 1:
        raise UserError(f"runs: the cells name different folders ({', '.join(folders)}); name one, e.g. runs=runs")
    return Path(folders[0]) if folders else Path("runs")


def known_statuses(plan: Plan, folder: Path, runs: Path, *, ask: bool = True) -> dict[str, TaskStatus]:
    """What is known of each run of the plan; without `ask` by the files alone."""
    from hpcdistill.sweep.watch.slurm_queue import Queue
    from hpcdistill.sweep.watch.status import task_statuses

    queue = Queue() if ask else Queue({"PATH": ""})
    return {status.key: status for status in task_statuses(plan, folder, runs, queue)}


def collect_command(
    grids: Sequence[str],
    overrides: Sequence[str],
    seeds: Sequence[int] | None,
    runs: Path,
    folder: Path,
    data: Path | None = None,
) -> list[str]:
    """The command that makes the tables of this sweep; without the interpreter. `data`: the data root, elsewhere."""
    command = ["slurm/collect.py", str(runs), *overrides, "--grid", *(grids or [EVERYTHING])]
    command += ["--with-others", "--folder", str(folder), "--out", str(folder / REPORT)]
    command += ["--data-root", str(data)] if data else []
    return command + (["--seeds", *map(str, seeds)] if seeds else [])


def are_noted(plan: Plan, submissions: Sequence[Submission]) -> bool:
    """Whether each grid's newest submission was made with the words that `plan` was made with."""
    newest = submitted_grids(submissions)
    told = [(newest[name].overrides, newest[name].seeds) for name in plan.seeds if name in newest]
    return told == [(plan.overrides, plan.given_seeds)] * len(plan.seeds)


def prefetch_command(grids: Sequence[str], overrides: Sequence[str], profile: Profile) -> list[str]:
    """The command that fetches what the runs of this sweep need, to the data root that its jobs read."""
    root = [f"{VARIABLE}={data_root()}"] if VARIABLE in profile.environment else []
    return [*root, "python", "-m", "hpcdistill.prefetch", *overrides, "--grid", *(grids or [EVERYTHING])]


def _lacking(selection: Selection, prefetch: str, options: argparse.Namespace) -> str | None:
    """One line on data and weights that the chosen runs need and that are not here: each would say so by itself."""
    if options.no_data_check:
        return None
    from hpcdistill.requirements import how_to_get, missing_for

    places, weights = missing_for(run.loaded for run in selection.chosen)
    if not places and not weights:
        return None
    return f"{how_to_get(places, weights, prefetch)}; --no-data-check goes on without (the nodes may see more)"


def note_grids(folder: Path, plan: Plan, command: Sequence[str]) -> None:
    """Write down grids all of whose runs are there already: status and the tables know grids by their submissions."""
    from hpcdistill.sweep.jobs.submission import SubmissionFolder

    SubmissionFolder(folder.absolute(), plan, profile={"name": "none"}, command=list(command)).save()


def _without_retry(arguments: Sequence[str]) -> list[str]:
    """The command line as it is to be given again, by `status.py --retry`."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--retry":
            next(words, None)
        elif not word.startswith("--retry="):
            kept.append(word)
    return kept


def _selected(plan: Plan, statuses: dict[str, TaskStatus], options: argparse.Namespace) -> Selection:
    from hpcdistill.sweep.jobs.arrays import select

    retry: Retry = options.retry
    return select(plan, statuses, retry, options.local)


def _submit(
    plan: Plan,
    selection: Selection,
    profile: Profile,
    options: argparse.Namespace,
    told: tuple[Sequence[str], Sequence[str], Path],
    again: Sequence[str],
) -> int:
    """`told` are the words of the collector: grids, overrides, the folder of the runs."""
    from hpcdistill.sweep.jobs.arrays import make_arrays
    from hpcdistill.sweep.jobs.cluster_jobs import JobMaker, ignored_options, largest_array
    from hpcdistill.sweep.jobs.plan_view import say_left
    from hpcdistill.sweep.jobs.submission import (
        CLONE,
        SubmissionFolder,
        needs_folder,
        snapshot_code,
        task_folder,
        write_tasks,
    )
    from hpcdistill.sweep.jobs.task import Command, Task

    grids, overrides, runs = told
    say_left(selection, options.retry)
    if not selection.chosen:
        collect = collect_command(grids, overrides, options.seeds, runs, options.folder)
        say(f"nothing to submit; the tables: python {shlex.join(collect)}")
        return 0
    folder, here = options.folder.absolute(), Path.cwd()
    name = options.cluster or "default"
    submission = SubmissionFolder(
        folder, plan, profile={"name": name, **profile.model_dump(mode="json")}, command=list(again)
    )
    write_tasks(folder, plan, selection.chosen)
    code = snapshot_code(submission.path / "code") if profile.snapshot else CLONE
    jobs = JobMaker(profile, name, code, "hpcdistill")
    arrays = make_arrays(selection, profile, largest_array(profile), options.parallel or profile.parallel)
    if ignored := ignored_options():
        warn(ignored)
    ids: list[str] = []
    submission.save()
    for array in arrays:
        calls = [
            Task(task_folder(folder, run.key).path, here, run.teacher, profile.scratch, profile.requeues)
            for run in array.runs
        ]
        dependency = array.dependency(ids)
        keys = [run.key for run in array.runs]
        with _undisturbed():
            tasks = jobs.submit(array, dependency, submission.path / "jobs" / array.name, calls)
            ids.append(tasks[0].partition("_")[0])
            submission.add_array(array.name, ids[-1], dependency, dict(zip(keys, tasks, strict=True)))
        say(
            f"{array.name}: job {ids[-1]}, {plural(len(tasks), 'run')}, {array.shape}"
            + (f", {dependency}" if dependency else "")
        )
    log = submission.path / "collect.log"
    # The configurations of the copy too, if they are all in it; the words say where things are here. The data
    # root stays as it is: keys are of places below it.
    lacking = needs_folder(plan, code) if here == CLONE else str(here)
    if profile.snapshot and lacking:
        say(f"snapshot: {lacking} is not in it; the tables will be made with the configurations as they are then")
    place = code if profile.snapshot and not lacking else here
    collect = collect_command(
        [_from_here(grid) for grid in grids], overrides, options.seeds, here / runs, folder, data_root()
    )
    with _undisturbed():
        last = jobs.submit_last(
            Command((str(code / collect[0]), *collect[1:]), place, log),
            "afterany:" + ":".join(ids),
            submission.path / "jobs" / "collect",
        )
        submission.note(collector=last)
    say(f"collect: job {last}, after all of them; its log {log}")
    say(f"submitted {plural(len(selection.chosen), 'run')} ({submission.path}); watch: python slurm/status.py")
    return 0


def _show(plan: Plan, grids: Sequence[Grid], profile: Profile, runs: Path, options: argparse.Namespace) -> Selection:
    """Print the plan; the runs that would be started."""
    from hpcdistill.sweep.jobs.arrays import make_arrays
    from hpcdistill.sweep.jobs.cluster_jobs import JobMaker, largest_array
    from hpcdistill.sweep.jobs.plan_view import show_arrays, show_cells
    from hpcdistill.sweep.jobs.submission import CLONE

    statuses = known_statuses(plan, options.folder, runs, ask=False)
    selection = _selected(plan, statuses, options)
    show_cells(plan, statuses)
    arrays = make_arrays(selection, profile, largest_array(profile), options.parallel or profile.parallel)
    maker = JobMaker(profile, options.cluster or "default", CLONE, "hpcdistill")
    place = options.folder.absolute() / "submissions" / "TIME-GRIDS" / "jobs"
    numbers = [f"<{array.name}>" for array in arrays]
    scripts = [maker.script(array, array.dependency(numbers), place / array.name) for array in arrays[:1]]
    out.print("States: as of the files; SLURM was not asked for jobs.", soft_wrap=True)
    show_arrays(plan, selection, [] if options.local else arrays, [] if options.local else scripts)
    return selection


def _from_here(grid: str) -> str:
    """A grid's name, or its file from the root of the file system."""
    return str(user_path(grid).absolute()) if user_path(grid).is_file() else grid


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a job that sbatch has taken is written down; sbatch itself is not cut off either."""
    pressed: list[int] = []
    # The mask is for sbatch, which inherits it; another thread of this process may take the signal all the same.
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if pressed and handler is not signal.SIG_IGN:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two submissions at once would both submit what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".submit.lock") as held:
        if held is False:
            raise UserError(f"{folder}: another submission is being made there; wait for it to end")
        yield
