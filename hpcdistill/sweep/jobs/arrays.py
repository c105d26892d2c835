"""The job arrays of a sweep: which runs go together, what waits for what, and what of it has to be run at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hpcdistill.sweep.grids.plan import Plan, PlannedRun
from hpcdistill.sweep.jobs.profile import Profile, Shape

Retry = Literal["missing", "failed", "all"]
RETRIED: dict[Retry, frozenset[str]] = {
    "missing": frozenset({"missing", "stopped", "blocked"}),
    "failed": frozenset({"failed", "blocked"}),
    "all": frozenset({"missing", "stopped", "blocked", "failed"}),
}
UNDER_WAY = ("finished", "running", "queued")


class Status(Protocol):
    """What is to be known of a run here; `status.TaskStatus` is one."""

    @property
    def key(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def job(self) -> str | None: ...


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

    def dependency(self, ids: Sequence[str]) -> str | None:
        """sbatch's --dependency, `ids` being the jobs of the arrays so far."""
        waits = [*(ids[number] for number in self.after), *self.jobs]
        return f"{'aftercorr' if self.paired else 'afterany'}:{':'.join(waits)}" if waits else None


def select(plan: Plan, statuses: Mapping[str, Status], retry: Retry) -> Selection:
    """What `retry` asks to be started. A run whose teacher neither has finished nor will be started is left."""
    found = Selection()
    needed = {key for key in plan.cells.values() if key is not None}
    chosen: set[str] = set()
    for run in plan.runs.values():
        if statuses[run.key].state in RETRIED[retry]:
            chosen.add(run.key)
    # A teacher that is only there for others is wanted when one of them is.
    needed |= {run.teacher for run in plan.runs.values() if run.key in chosen and run.teacher}
    for run in plan.runs.values():
        state = statuses[run.key].state
        if run.key not in chosen or run.key not in needed:
            chosen.discard(run.key)
            found.left[run.key] = state
            continue
        if run.teacher and run.teacher not in chosen:
            teacher = statuses[run.teacher]
            if teacher.state not in UNDER_WAY:
                chosen.discard(run.key)
                found.left[run.key] = f"its teacher {plan.runs[run.teacher].name} is {teacher.state}"
                continue
            if teacher.state != "finished":
                found.waits_for[run.teacher] = teacher.job
        found.chosen.append(run)
    return found


def make_arrays(selection: Selection, profile: Profile, most: int, parallel: int) -> list[Array]:
    """The arrays of a selection, each after those that it waits for; `most` is the cluster's MaxArraySize."""
    runs = {run.key: run for run in selection.chosen}
    first_use: dict[str, int] = {}
    level: dict[str, int] = {}
    for number, run in enumerate(selection.chosen):  # teachers first
        level[run.key] = level[run.teacher] + 1 if run.teacher in runs else 0
        if run.teacher is not None:
            first_use.setdefault(run.teacher, number)
    groups: dict[tuple[int, str, bool], list[PlannedRun]] = defaultdict(list)
    shapes: dict[str, Shape] = {}
    for run in selection.chosen:
        shape = profile.shape_of(run.name)
        shapes[str(shape.model_dump())] = shape
        groups[level[run.key], str(shape.model_dump()), run.teacher in selection.waits_for].append(run)
    arrays: list[Array] = []
    place: dict[str, tuple[int, int]] = {}  # run -> its array and its number in it
    for (stage, shape_text, _), members in sorted(groups.items(), key=lambda item: item[0][0]):
        # Teachers in the order of their students: then the tasks of two stages can be paired.
        members.sort(key=lambda run: first_use.get(run.key, len(runs)))
        together = sum(len(group) for (other, *_), group in groups.items() if other == stage)
        for begin in range(0, len(members), most):
            part = members[begin : begin + most]
            teachers = [run.teacher for run in part if run.teacher in place]
            after = sorted({place[teacher][0] for teacher in teachers if teacher})
            jobs = {selection.waits_for[run.teacher] for run in part if run.teacher in selection.waits_for}
            array = Array(
                f"stage{stage}-{sum(other.name.startswith(f'stage{stage}-') for other in arrays)}",
                part,
                shapes[shape_text],
                max(1, parallel * len(part) // together),
                after,
                _shortened([job for job in jobs if job]),
            )
            array.paired = (
                len(after) == 1
                and not array.jobs
                and len(part) > 1
                and len(arrays[after[0]].runs) > 1  # one alone is not an array
                and all(run.teacher and place.get(run.teacher) == (after[0], i) for i, run in enumerate(part))
            )
            place |= {run.key: (len(arrays), number) for number, run in enumerate(part)}
            arrays.append(array)
    return arrays


def _shortened(jobs: Sequence[str], most: int = 20) -> list[str]:
    """Many tasks of arrays as the arrays: sbatch's line is limited."""
    if len(jobs) <= most:
        return sorted(jobs)
    return sorted({job.partition("_")[0] for job in jobs})
