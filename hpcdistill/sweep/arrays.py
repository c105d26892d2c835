"""Which runs of a plan are started, and the job arrays that they are submitted as.

An array holds runs that ask for the same resources; students' arrays wait for the arrays that train their teachers.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hpcdistill.sweep.plan import Plan, PlannedRun
from hpcdistill.sweep.profile import Profile, Shape
from hpcdistill.sweep.status import TaskStatus

Retry = Literal["missing", "failed", "all"]
RETRIED: dict[Retry, frozenset[str]] = {
    "missing": frozenset({"missing", "stopped", "blocked"}),
    "failed": frozenset({"failed", "blocked"}),
    "all": frozenset({"missing", "stopped", "blocked", "failed"}),
}
UNDER_WAY = ("finished", "running", "queued")
_Group = tuple[int, bool, Shape, bool]  # stage, whether nothing waits for its runs, shape, whether they wait for jobs


@dataclass
class Selection:
    """The runs to be started, and the others with their state."""

    chosen: list[PlannedRun] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # key -> state, or why it cannot be started
    waits_for: dict[str, str | None] = field(default_factory=dict)  # teacher under way -> its job


@dataclass
class Array:
    """Runs that are submitted with one call."""

    name: str
    runs: list[PlannedRun]
    shape: Shape
    parallel: int
    after: list[int] = field(default_factory=list)  # numbers of the arrays whose end it waits for
    jobs: list[str] = field(default_factory=list)  # jobs of earlier submissions that it waits for
    paired: bool = False  # each task waits for the task with its number in the one array of `after`
    behind: int | None = None  # number of the array whose end it waits for: more than `parallel` at a time otherwise

    def dependency(self, ids: Sequence[str]) -> str | None:
        """sbatch's --dependency, `ids` being the jobs of the arrays so far."""
        waits = {"aftercorr" if self.paired else "afterany": [*(ids[number] for number in self.after), *self.jobs]}
        if self.behind is not None:
            waits["afterany"] = list(dict.fromkeys([*waits.get("afterany", []), ids[self.behind]]))
        return ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in waits.items() if jobs) or None


def select(plan: Plan, statuses: Mapping[str, TaskStatus], retry: Retry, local: bool = False) -> Selection:
    """The runs that `retry` asks to be started. A run is left alone if its teacher is neither finished nor started.

    `local`: the runs are started on this machine, where a run can also wait for a teacher that is no SLURM job.
    """
    found = Selection()
    needed = {key for key in plan.cells.values() if key is not None}
    chosen = {key for key in plan.runs if statuses[key].state in RETRIED[retry]}
    # A teacher that is only there for others is wanted when one of them is to be started, or waits in the queue for it.
    needed |= {
        run.teacher
        for run in plan.runs.values()
        if run.teacher and (run.key in chosen or statuses[run.key].state not in ("finished", "running", "failed"))
    }
    needed |= {key for key in chosen if statuses[key].damaged}  # its result is written again, whoever has used it
    for run in plan.runs.values():
        left = None if run.key in chosen and run.key in needed else str(statuses[run.key].state)
        if left is None and run.teacher and run.teacher not in chosen:
            teacher, name = statuses[run.teacher], plan.runs[run.teacher].name
            if teacher.state not in UNDER_WAY:
                left = f"its teacher {name} is {teacher.state}"
            elif teacher.state != "finished" and teacher.job is None and not local:
                left = f"its teacher {name} is {teacher.state} outside SLURM: submit again when it has ended"
            elif teacher.state != "finished":
                found.waits_for[run.teacher] = teacher.job
        if left is None:
            found.chosen.append(run)
        else:
            chosen.discard(run.key)
            found.left[run.key] = left
    return found


def make_arrays(selection: Selection, profile: Profile, most: int, parallel: int) -> list[Array]:
    """The arrays of a selection, each after those that it waits for; `most` is the largest array that SLURM takes."""
    runs = {run.key: run for run in selection.chosen}
    first_use: dict[str, int] = {}
    level: dict[str, int] = {}
    for number, run in enumerate(selection.chosen):  # teachers first
        level[run.key] = level[run.teacher] + 1 if run.teacher in runs else 0
        if run.teacher is not None:
            first_use.setdefault(run.teacher, number)
    # Teachers apart from the runs that nothing waits for: students wait for the whole array of their teachers.
    groups: dict[_Group, list[PlannedRun]] = defaultdict(list)
    for run in selection.chosen:
        last, waits = run.key not in first_use, run.teacher in selection.waits_for
        groups[level[run.key], last, profile.shape_of(run.name), waits].append(run)
    stages: dict[int, list[Array]] = defaultdict(list)
    arrays: list[Array] = []
    tasks: dict[str, tuple[int, int]] = {}  # run -> its array and its number in it
    shares = _shares({group: len(members) for group, members in groups.items()}, parallel)
    for group, members in sorted(groups.items(), key=lambda item: item[0][:2]):
        stage, _, shape, _ = group
        # Teachers in the order of their students: then the tasks of two stages can be paired.
        members.sort(key=lambda run: first_use.get(run.key, len(runs)))
        for begin in range(0, len(members), most):
            part = members[begin : begin + most]
            name, share = f"stage{stage}-{len(stages[stage])}", max(1, shares[group] * len(part) // len(members))
            array = Array(name, part, shape, share)
            _wait_for_teachers(array, selection, arrays, tasks)
            tasks |= {run.key: (len(arrays), number) for number, run in enumerate(part)}
            stages[stage].append(array)
            arrays.append(array)
    numbers = {array.name: number for number, array in enumerate(arrays)}
    for together in stages.values():
        _keep_to(parallel, together, numbers)
    return arrays


def _wait_for_teachers(
    array: Array, selection: Selection, arrays: Sequence[Array], tasks: Mapping[str, tuple[int, int]]
) -> None:
    """Let `array` wait for the arrays, and the jobs of earlier submissions, that train its runs' teachers."""
    part = array.runs
    after = sorted({tasks[run.teacher][0] for run in part if run.teacher and run.teacher in tasks})
    jobs = {selection.waits_for[run.teacher] for run in part if run.teacher in selection.waits_for}
    array.after, array.jobs = after, _shortened([job for job in jobs if job])
    array.paired = (
        len(after) == 1
        and not array.jobs
        and len(part) > 1
        and len(arrays[after[0]].runs) > 1  # one alone is not an array
        and all(run.teacher and tasks.get(run.teacher) == (after[0], i) for i, run in enumerate(part))
    )


def _keep_to(parallel: int, arrays: Sequence[Array], numbers: Mapping[str, int]) -> None:
    """Where the arrays of a stage would run more than `parallel` runs at a time, let some wait for others.

    The arrays are put into rows. Each row may run its share of `parallel` at a time, and an array begins when the one
    before it in its row has ended.
    """
    if sum(min(array.parallel, len(array.runs)) for array in arrays) <= parallel:
        return
    sizes = [len(array.runs) for array in arrays]
    counts = range(1, min(len(arrays), parallel) + 1)
    _, rows, widths = min((_in_rows(sizes, parallel, count) for count in counts), key=lambda found: found[0])
    for row, width in zip(rows, widths, strict=True):
        for before, number in zip([None, *row], row, strict=False):
            arrays[number].parallel = width
            arrays[number].behind = None if before is None else numbers[arrays[before].name]


def _in_rows(sizes: Sequence[int], parallel: int, count: int) -> tuple[int, list[list[int]], list[int]]:
    """Put arrays of these sizes, in their order, into `count` rows: each into the row that is free first.

    Returns how many runs one after the other the longest row is, the rows, and how many runs each has at a time.
    """
    widths = [parallel // count + (row < parallel % count) for row in range(count)]
    rows: list[list[int]] = [[] for _ in widths]
    free = [(0, row) for row in range(count)]  # a heap: after so many runs, which row
    for number, size in enumerate(sizes):
        begin, row = free[0]
        heapq.heapreplace(free, (begin - (-size // widths[row]), row))
        rows[row].append(number)
    return max(free)[0], rows, widths


def _shares(sizes: Mapping[_Group, int], parallel: int) -> dict[_Group, int]:
    """How many runs of each group may run at a time: `parallel` of a stage together, but at least one of a group.

    Teachers have the first claim, because students wait for them; each other group keeps one. Where there are more
    groups than `parallel`, `_keep_to` lets them run one after the other.
    """
    shares: dict[_Group, int] = {}
    for stage in {group[0] for group in sizes}:
        first = {group: size for group, size in sizes.items() if group[:2] == (stage, False)}
        last = {group: size for group, size in sizes.items() if group[:2] == (stage, True)}
        for_first = min(sum(first.values()), max(1, parallel - len(last)))
        for part, share in ((first, for_first), (last, parallel - (for_first if first else 0))):
            shares |= {group: max(1, share * size // sum(part.values())) for group, size in part.items()}
    return shares


def _shortened(jobs: Sequence[str], most: int = 20) -> list[str]:
    """Many tasks of arrays as the arrays: sbatch's line is limited."""
    if len(jobs) <= most:
        return sorted(jobs)
    return sorted({job.partition("_")[0] for job in jobs})
