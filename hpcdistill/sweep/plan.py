"""The plan of a sweep: the run of each cell, each run once, and the teacher that a run waits for.

A plan needs no data and builds no network, so that a login node makes it in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from hpcdistill.config import COMMAND_LINE, ConfigFiles, RunConfig, is_override
from hpcdistill.console import warn
from hpcdistill.errors import UserError, nearest
from hpcdistill.methods.settings import role_key
from hpcdistill.metrics.config import BACKWARDS
from hpcdistill.metrics.measured_cost import COST, COUNTS, TIMES, is_cost
from hpcdistill.run import Run, Runs
from hpcdistill.storage import user_path
from hpcdistill.sweep.estimates import Estimates, load_estimates
from hpcdistill.sweep.grid import Cell, Grid
from hpcdistill.sweep.grid_file import SUFFIXES, GridFile
from hpcdistill.yaml_values import load_yaml

Use = tuple[str, int, int]  # grid's name, cell's number in it, seed
RUN_KEYS = (*RunConfig.model_fields, "extends")


@dataclass(frozen=True)
class Words:
    """What was named, each in the order of the command line."""

    grids: tuple[str, ...]  # names, or files
    overrides: tuple[str, ...]  # key=value, and overlay files


def sort_words(words: Sequence[str]) -> Words:
    """`words` as grids and overrides. UserError, in one line, for a YAML file that could be both or is neither."""
    over = {word for word in words if ("=" in word and not user_path(word).is_file()) or is_overlay(user_path(word))}
    return Words(tuple(word for word in words if word not in over), tuple(word for word in words if word in over))


def is_overlay(file: Path) -> bool:
    """Whether `file` holds values of runs, and not a grid: by its keys, wherever it lies.

    What is no YAML file of keys is left to the reader of grids, which says what is wrong with it.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        return False
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or not values:
        return False
    keys = [str(key) for key in values]
    of_a_grid, of_a_run = ([key for key in keys if key in known] for known in (GridFile.model_fields, RUN_KEYS))
    if of_a_grid and of_a_run:
        raise UserError(
            f"{file}: {of_a_run[0]}: is a key of a run, {of_a_grid[0]} one of a grid; make two files of it, or put "
            f"what the grid's runs share under `set:` ({of_a_run[0]}.KEY=VALUE)"
        )
    if not of_a_grid and not of_a_run:
        raise UserError(
            f"{file}: {keys[0]}: no key of a grid or of a run; {nearest(keys[0], [*GridFile.model_fields, *RUN_KEYS])}"
        )
    return bool(of_a_run)


@dataclass
class PlannedRun:
    """A run to be had: a student, a teacher, or a network alone."""

    key: str
    name: str  # the run folder's name before its digits
    arguments: tuple[str, ...]  # of `hpcdistill train`, which makes the same run
    loaded: Run
    seed: int
    teacher: str | None  # key of the run that is needed first
    stage: int  # 0 = needs no other run, 1 = needs one of stage 0
    steps: int | None  # optimizer steps; None = unknown before its data are there
    hours: float | None  # GPU hours, an estimate; None = unknown
    uses: list[Use] = field(default_factory=list)  # cells that show it; of a teacher, those of its students


@dataclass
class Plan:
    """Everything that some grids need."""

    grids: list[Grid]
    runs: dict[str, PlannedRun]  # by key, teachers first
    cells: dict[Use, str | None]  # the run of a cell at a seed; None = reported
    seeds: dict[str, tuple[int, ...]]  # of each grid
    overrides: tuple[str, ...] = ()  # key=value and files that were laid over every cell
    given_seeds: tuple[int, ...] | None = None  # in the place of the grids' own

    @property
    def stages(self) -> list[list[PlannedRun]]:
        """The runs by stage."""
        last = max((run.stage for run in self.runs.values()), default=-1)
        return [[run for run in self.runs.values() if run.stage == stage] for stage in range(last + 1)]


def make_plan(
    grids: Sequence[Grid],
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    estimates: Estimates | None = None,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """The plan of `grids`, each cell with `seeds` (None = the grid's own) and with `overrides` laid over it.

    `overrides` are key=value and files, as on train's command line. A student gets the seed; the teacher it shares
    with others keeps its own. `origins`: where an override is from, for messages, when that is not the command line.
    Raises UserError, naming the grid's file and the cell, for what cannot be run.
    """
    for override in overrides:
        _check_for_all(override)
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32):
        raise UserError(f"seeds: expected different whole numbers from 0 to 2^32 - 1, got {list(seeds)}")
    planner = _Planner(overrides, origins, estimates or load_estimates())
    chosen = {grid.name: tuple(seeds) if seeds is not None else grid.seeds for grid in grids}
    cells: dict[Use, str | None] = {}
    for grid in grids:
        shown: dict[str, str] = {}
        for number, cell in enumerate(grid.cells):
            if cell.kind == "reported":
                cells |= {(grid.name, number, seed): None for seed in chosen[grid.name]}
                continue
            keys = planner.plan_cell(grid, number, cell, chosen[grid.name])
            cells |= {(grid.name, number, seed): key for seed, key in keys.items()}
            first = next(iter(keys.values()))
            if first in shown:
                warn(f"{grid.path}: ({cell.title}) and ({shown[first]}) are the same run; do they differ in anything?")
            shown.setdefault(first, cell.title)
    runs = sorted(planner.runs.values(), key=lambda run: run.stage)  # stable: otherwise in the grids' order
    given = None if seeds is None else tuple(seeds)
    return Plan(list(grids), {run.key: run for run in runs}, cells, chosen, tuple(overrides), given)


def _check_for_all(override: str) -> None:
    """UserError when `override`, or an overlay file of that name, says what cannot hold for every run of a sweep."""
    if is_override(override):
        if override.startswith("seed="):
            raise UserError(f"{override}: the seed is not an override here; give --seeds 0 1 2")
        return
    for origin, layer in ConfigFiles().layers(user_path(override)):
        if "seed" in layer:
            raise UserError(f"{origin}: seed: not for every run of a sweep; give --seeds 0 1 2")
        method = layer.get("method")
        if isinstance(method, Mapping) and "name" in method:
            raise UserError(
                f"{origin}: method.name: a run's whole configuration is not laid over those of a sweep; "
                "name it as the `base:` of a grid, or give a file with only what is different"
            )


class _Planner:
    def __init__(self, overrides: Sequence[str], origins: Mapping[str, str], estimates: Estimates) -> None:
        self.overrides = tuple(overrides)
        self.origins = {override: origins.get(override, COMMAND_LINE) for override in overrides}
        self.estimates = estimates
        self.configs = Runs()
        self.runs: dict[str, PlannedRun] = {}
        self.warned: set[str] = set()

    def plan_cell(self, grid: Grid, number: int, cell: Cell, seeds: Sequence[int]) -> dict[int, str]:
        """The keys of the cell's runs by seed; the runs and their teachers are added to the plan."""
        arguments = _files_first((*cell.arguments, *self.overrides))
        keys = {}
        try:
            # What the grid says itself is named so: its file stands before every message.
            loaded = self.configs.load(arguments, dict.fromkeys(cell.arguments, "set") | self.origins)
            self._check_metrics(grid, cell, loaded)
            for seed in seeds:
                seeded = with_seed(loaded, seed)
                keys[seed] = self._add(seeded, arguments + seeded.overrides[len(loaded.overrides) :])
                self._use(keys[seed], (grid.name, number, seed))
        except UserError as error:
            raise UserError(f"{grid.path}: ({cell.title}): {error}") from None
        return keys

    def _check_metrics(self, grid: Grid, cell: Cell, loaded: Run) -> None:
        for name, measured in cell.of.items():
            if reason := missing_metric(measured, loaded.config):
                line = f"metric {name}: no run of this cell can have '{measured}': {reason}"
                if not self.overrides:
                    raise UserError(line)
                # The overrides are the user's; a toy sweep on another test set still is one.
                if grid.name not in self.warned:
                    warn(f"{grid.path}: ({cell.title}): {line}; it will be shown as missing")
                self.warned.add(grid.name)

    def _add(self, loaded: Run, arguments: tuple[str, ...]) -> str:
        config = loaded.config
        key = loaded.key
        if key in self.runs:
            self._join_test_sets(self.runs[key], loaded)
            return key
        teacher = None
        if (taught := _teacher_to_train(loaded)) is not None:
            teacher = self._add(taught, self._command(taught))
        stage = 0 if teacher is None else self.runs[teacher].stage + 1
        steps, hours = self.estimates.of(config)
        self.runs[key] = PlannedRun(key, config.name, arguments, loaded, config.seed, teacher, stage, steps, hours)
        return key

    def _use(self, key: str | None, use: Use) -> None:
        while key is not None:
            run = self.runs[key]
            if use not in run.uses:
                run.uses.append(use)
            key = run.teacher

    def _join_test_sets(self, run: PlannedRun, other: Run) -> None:
        """A cell's run that is there already is evaluated on the cell's test sets as well."""
        mine, wanted = run.loaded.config.data.eval, other.config.data.eval
        added = {name: place for name, place in wanted.items() if name not in mine}
        for name in mine.keys() & wanted.keys():
            if mine[name] != wanted[name]:
                raise UserError(
                    f"data.eval.{name}: {wanted[name]} here and {mine[name]} in another cell of the same run; "
                    "call them by two names"
                )
        if added:
            data = run.loaded.config.data.model_copy(update={"eval": {**mine, **added}})
            config = run.loaded.config.model_copy(update={"data": data})
            more = tuple(f"data.eval.{name}={place}" for name, place in added.items())
            run.loaded = replace(run.loaded, config=config, overrides=(*run.loaded.overrides, *more))
            run.arguments += more

    def _command(self, teacher: Run) -> tuple[str, ...]:
        """A command line of the teacher alone: its file, and what its student's overlays and overrides make of it."""
        file = str(teacher.files[0])
        plain = self.configs.load([file]).config.dump()
        return (file, *_differences(plain, teacher.config.dump()))


def missing_metric(metric: str, config: RunConfig) -> str | None:
    """Why a run of `config` cannot have `metric` (generator/test set/name); None when nothing speaks against it."""
    parts = metric.split("/")
    if len(parts) != 3:
        return "expected generator/test set/metric, e.g. student/set5/psnr"
    generator, test_set, name = parts
    known = _generators(config)
    if test_set == COST and test_set not in config.data.eval:
        if generator not in known:
            return f"{config.method.name} has no generator '{generator}'; {nearest(generator, known)}"
        return None if is_cost(metric) else f"'{name}' is not measured; {nearest(name, (*TIMES, *COUNTS))}"
    if not config.data.eval:
        return "data.eval is empty"
    if test_set not in config.data.eval:
        return f"it is not evaluated on '{test_set}'; {nearest(test_set, config.data.eval)}"
    if generator not in known:
        return f"{config.method.name} has no generator '{generator}'; {nearest(generator, known)}"
    names = config.eval.metrics(config.method.kind())
    return None if name in names else f"'{name}' is not measured; {nearest(name, names)}"


def _generators(config: RunConfig) -> list[str]:
    names = list(config.method.GENERATORS)
    if config.eval.both_directions and config.method.kind() == "unpaired":
        names += [f"{name}{BACKWARDS}" for name in names]
    return names


def with_seed(loaded: Run, seed: int) -> Run:
    """The same run with another seed of its own; its teachers keep the one they have."""
    if loaded.config.seed == seed:
        return loaded
    update: dict[str, Any] = {"seed": seed}
    overrides: tuple[str, ...] = (f"seed={seed}",)
    roles = dict(loaded.config.roles)
    for role, teacher in loaded.teachers.items():
        if teacher.run is not None:
            kept = teacher.run.config.seed
            overrides += (f"{role_key(role)}.overrides.seed={kept}",)
            given = {**teacher.settings.overrides, "seed": kept}
            roles[role] = teacher.settings.model_copy(update={"overrides": given})
    update["teacher"] = roles.pop("teacher", None)
    update["teachers"] = roles
    return replace(loaded, config=loaded.config.model_copy(update=update), overrides=loaded.overrides + overrides)


def _teacher_to_train(loaded: Run) -> Run | None:
    """The run that has to finish before `loaded` begins; UserError for a chain that a sweep does not plan."""
    for role, wanted in loaded.config.method.roles().items():
        if not wanted.needed:
            continue
        if role not in loaded.teachers:
            key, who = f"{role_key(role)}.config", "a teacher" if role == "teacher" else f"the teacher {role}"
            raise UserError(f"{loaded.config.method.name}: needs {who}; name its config under `{key}`")
    # Several roles may be filled by networks of one run: a CycleGAN teaches both directions.
    trained = {teacher.run.key: teacher.run for teacher in loaded.teachers.values() if teacher.run is not None}
    teacher = next(iter(trained.values()), None)
    chained = teacher is not None and teacher.config.method.learns() and any(t.run for t in teacher.teachers.values())
    if len(trained) > 1 or chained:
        raise UserError(
            "a sweep trains one run before another; name the other teachers by a finished run's folder "
            "(teachers.<role>.run)"
        )
    return teacher if loaded.config.method.learns() else None


def _files_first(arguments: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(arguments, key=is_override))


def _differences(plain: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key=value` for each value that differs from `plain`'s."""
    found = []
    for key, value in values.items():
        name, before = f"{prefix}{key}", plain.get(key)
        if value == before and key in plain:
            continue
        if isinstance(value, dict) and isinstance(before, dict) and name != "data.eval" and value and before:
            found += _differences(before, value, f"{name}.")
        else:
            found.append(f"{name}={json.dumps(value)}")
    return found
