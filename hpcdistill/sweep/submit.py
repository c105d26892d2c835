"""Submit the ablation grids: `python slurm/submit_ablations.py [GRID ...] [OVERLAY ...] [key=value ...]`.

With --local the runs are trained on this machine instead. The same command again leaves the runs alone that have
finished or are in the queue, and submits the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpcdistill.command import Parser, UserPath, positive, program, whole
from hpcdistill.console import out, say, warn
from hpcdistill.data.places import VARIABLE, data_root
from hpcdistill.errors import UserError
from hpcdistill.file_lock import locked
from hpcdistill.requirements import check_runs_apart, how_to_get, missing_for
from hpcdistill.storage import user_path
from hpcdistill.sweep.arrays import Selection, make_arrays, select
from hpcdistill.sweep.grid import EVERYTHING, grid_file, load_grids
from hpcdistill.sweep.local import Local
from hpcdistill.sweep.plan import Plan, PlannedRun, make_plan, sort_words
from hpcdistill.sweep.plan_view import say_left, show_arrays, show_cells
from hpcdistill.sweep.profile import Profile, load_profile
from hpcdistill.sweep.results import find_results
from hpcdistill.sweep.slurm_jobs import JobMaker, check_slurm, largest_array, submit_sweep
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import TaskStatus, task_statuses
from hpcdistill.sweep.submission_folder import SubmissionFolder
from hpcdistill.sweep.submissions import Submission, read_submissions, submitted_files, submitted_grids
from hpcdistill.training.records import RESULT

FOLDER = Path("sweeps")
REPORT = "report"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    words = sort_words(options.grid)
    profile = Profile() if options.local and not options.cluster else load_profile(options.cluster or "default")
    submissions = read_submissions(options.folder)[0]
    submitted = submitted_files(submissions)
    grids = load_grids(words.grids, submitted)
    if not (options.local or options.dry_run):
        check_slurm()
    if VARIABLE in profile.environment:  # the configurations are resolved here
        os.environ[VARIABLE] = os.path.expandvars(profile.environment[VARIABLE])
    overrides = [*profile.set, *words.overrides]
    origins = dict.fromkeys(profile.set, f"--cluster {options.cluster or 'default'}: set")
    plan = make_plan(grids, options.seeds, overrides, origins=origins)
    if not options.local:
        check_fits(plan, profile, options.cluster or "default")
    runs = runs_folder(plan)
    named = [str(grid_file(word, submitted)) if word in submitted else word for word in words.grids]
    prefetch = shlex.join(prefetch_command(named, overrides, profile))
    if options.dry_run:
        selection = _show(plan, profile, runs, options)
        if lacking := _lacking(selection, prefetch, options):
            warn(lacking)
        return 0
    with _alone(options.folder):
        statuses = known_statuses(plan, options.folder, runs)
        selection = select(plan, statuses, options.retry, options.local)
        if lacking := _lacking(selection, prefetch, options):
            raise UserError(lacking)
        set_aside_damaged(runs, selection.chosen, statuses)
        collect = collect_command(words.grids, overrides, options.seeds, runs, options.folder)
        command = _without_retry(arguments)
        if not selection.chosen and not are_noted(plan, submissions):
            # Status and the tables know grids by their submissions: also one all of whose runs are there already.
            SubmissionFolder(options.folder.absolute(), plan, profile={"name": "none"}, command=command).save()
        if not options.local:
            say_left(selection, options.retry)
            if not selection.chosen:
                say(f"nothing to submit; the tables: python {shlex.join(collect)}")
                return 0
            folder = options.folder.absolute()
            # By whole paths, as the job may work in a copy of the code; with the data root, which keys are made with.
            files = [str(user_path(grid).absolute()) if user_path(grid).is_file() else grid for grid in words.grids]
            collect = collect_command(files, overrides, options.seeds, Path.cwd() / runs, folder, data_root())
            jobs = JobMaker(profile, options.cluster or "default")
            submit_sweep(plan, selection, jobs, options.parallel or profile.parallel, folder, collect, command)
            return 0
        # What is written down is: another submission that starts now leaves these runs alone.
        cells = options.cells_per_device or profile.cells_per_device
        here = Local(plan, selection, options.folder, profile, options.parallel, collect, command, cells)
    return here.run()


def _parser() -> Parser:
    parser = Parser(
        prog=program("sweep"),
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
        "--cells-per-device",
        type=positive,
        metavar="K",
        help="with --local: so many runs of one kind side by side in a process (default: the profile's)",
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
    for run in plan.runs.values():
        check_runs_apart(run.loaded.config)
    folders = sorted({run.loaded.config.runs for run in plan.runs.values()})
    if len(folders) > 1:
        raise UserError(f"runs: the cells name different folders ({', '.join(folders)}); name one, e.g. runs=runs")
    return Path(folders[0]) if folders else Path("runs")


def known_statuses(plan: Plan, folder: Path, runs: Path, *, ask: bool = True) -> dict[str, TaskStatus]:
    """What is known of each run of the plan; without `ask` by the files alone."""
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
    return [*root, "hpcdistill", "prefetch", *overrides, "--grid", *(grids or [EVERYTHING])]


def _lacking(selection: Selection, prefetch: str, options: argparse.Namespace) -> str | None:
    """One line on data and weights that the chosen runs need and that are not here: each would say so by itself."""
    if options.no_data_check:
        return None
    places, weights = missing_for(run.loaded for run in selection.chosen)
    if not places and not weights:
        return None
    return f"{how_to_get(places, weights, prefetch)}; --no-data-check goes on without (the nodes may see more)"


def set_aside_damaged(runs: Path, started: Sequence[PlannedRun], statuses: Mapping[str, TaskStatus]) -> None:
    """Give the damaged result.json of each run that is to be started another name.

    Training asks for that file first and would refuse to go on; without it the run writes it again from its checkpoint.
    """
    if not (started and runs.is_dir()):
        return
    keys = {run.key for run in started}
    folders = {status.run.name for key in keys if (status := statuses[key]).run}
    for damaged in find_results(runs).unreadable:
        if damaged.key in keys or damaged.folder.name in folders:
            file = damaged.folder / RESULT
            file.replace(aside := file.with_name(f"{RESULT}.damaged"))
            warn(f"{file}: damaged ({damaged.reason}); now {aside.name}, and written again from the last checkpoint")


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


def _show(plan: Plan, profile: Profile, runs: Path, options: argparse.Namespace) -> Selection:
    """Print the plan; the runs that would be started."""
    statuses = known_statuses(plan, options.folder, runs, ask=False)
    selection = select(plan, statuses, options.retry, options.local)
    show_cells(plan, statuses)
    arrays, script = [], None
    if not options.local:
        arrays = make_arrays(selection, profile, largest_array(profile), options.parallel or profile.parallel)
        folder = options.folder.absolute() / "submissions" / "TIME-GRIDS" / "jobs"
        jobs = JobMaker(profile, options.cluster or "default")
        if arrays:  # the first waits for none of the others
            script = jobs.script(arrays[0], arrays[0].dependency(()), folder / arrays[0].name)
    out.print("States: as of the files; SLURM was not asked for jobs.", soft_wrap=True)
    show_arrays(plan, selection, arrays, script)
    return selection


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two submissions at once would both submit what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".submit.lock") as held:
        if held is False:
            raise UserError(f"{folder}: another submission is being made there; wait for it to end")
        yield
