"""The results that lie in a folder of runs: each result.json, read and checked, by the key of its run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hpcdistill.errors import UserError
from hpcdistill.metrics.measured_cost import MeasuredCost, measured_cost
from hpcdistill.metrics.reference import bicubic_value
from hpcdistill.storage import Damaged
from hpcdistill.training.records import RESULT, count_evaluations, read_environment, read_result

Which = Literal["best", "last"]  # of a run's weights
WHICH: tuple[Which, ...] = ("best", "last")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    key: str | None  # None: its configuration no longer loads or means what it did, so it belongs to no grid
    result: Mapping[str, Any]  # result.json

    @cached_property
    def data(self) -> dict[str, tuple[str, ...]]:
        """Digests of its training sets and of the set that chose its best weights."""
        identity = _identity(self.folder)
        data = identity.get("data", ())
        if not identity or not isinstance(data, list | tuple):
            return {}
        digests = {"training data": tuple(map(str, data))}
        if identity.get("selection"):
            digests["test set that selects"] = (str(identity["selection"]),)
        return digests

    @property
    def revision(self) -> str:
        """The code it was trained with."""
        return str(self.result.get("revision") or "unknown")

    def metrics(self, which: Which) -> dict[str, float]:
        """The metrics of its best or last weights; NaN where the file has null, which JSON has no number for.

        Among them is what the networks take, where that was measured: the same for both.
        """
        measured = (self.result.get(which) or {}).get("metrics", {})
        return {
            **{name: math.nan if value is None else float(value) for name, value in measured.items()},
            **self.cost.values,
        }

    @cached_property
    def cost(self) -> MeasuredCost:
        """Its latency.json: times, multiply-accumulates, parameters."""
        return measured_cost(self.folder)

    @cached_property
    def evaluations(self) -> int | None:
        """How many evaluations its best weights were chosen from; None where that is not known."""
        if (said := self.result.get("evaluations")) is not None:
            return int(said)
        selects = (self.result.get("protocol") or {}).get("selects")
        return (count_evaluations(self.folder / "metrics.jsonl", str(selects)) if selects else 0) or None

    def bicubic(self, metric: str) -> float | None:
        """Bicubic enlargement's number for one of the metrics; None where that was not measured."""
        return bicubic_value(self.result, metric)

    def step(self, which: Which) -> int | None:
        """The step that those weights are of."""
        return (self.result.get(which) or {}).get("step")


@dataclass(frozen=True)
class Unreadable:
    """A run whose result.json is damaged."""

    folder: Path
    key: str | None
    reason: str

    @property
    def line(self) -> str:
        """The file, what is wrong with it and the remedy, as status and the tables alike say it."""
        healed = "it is set aside, and the run writes it again from its last checkpoint"
        return f"{self.folder / RESULT}: damaged ({self.reason:.100}); submit again with --retry failed: {healed}"


@dataclass
class Found:
    """What lies in a folder of runs."""

    runs: list[RunResult] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # a line for each run that is there more than once
    by_key: dict[str, RunResult] = field(default_factory=dict)


def find_results(*folders: Path, by_configuration: bool = True) -> Found:
    """Read */result.json of each folder. Of two runs with one key the one that finished last counts.

    `by_configuration`: say by its configuration which run a result without a key is of; without, it has none.
    Raises UserError when there is no such folder. A damaged file is not an error: it is in `unreadable`.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder that the runs are in")
    found = Found()
    times: dict[str, float] = {}
    for file in (file for folder in folders for file in sorted(folder.glob(f"*/{RESULT}"))):
        run_folder = file.parent
        if run_folder.name.startswith("."):
            continue
        try:
            result = read_result(run_folder)
        except (OSError, ValueError) as error:
            reason = error.why if isinstance(error, Damaged) else " ".join(str(error).split())
            key = key_of(run_folder) if by_configuration else None
            found.unreadable.append(Unreadable(run_folder, key, reason))
            continue
        if result is None:  # removed just now
            continue
        key = str(result["key"]) if result.get("key") else key_of(run_folder) if by_configuration else None
        run = RunResult(run_folder, key, result)
        found.runs.append(run)
        if key is None:
            continue
        time = file.stat().st_mtime
        if (other := found.by_key.get(key)) is not None:
            kept, left = (run, other) if time >= times[key] else (other, run)
            found.twice.append(f"{left.folder.name} and {kept.folder.name} are the same run; the later one is shown")
            if kept is other:
                continue
        found.by_key[key], times[key] = run, time
    return found


def key_of(folder: Path) -> str | None:
    """The key by the run's configuration, for results from before they had one.

    None when it cannot be said: the configuration no longer loads, or its method computes something else by now.
    """
    from hpcdistill.run import load_run  # half of the time that status takes to start, which does without

    try:
        run = load_run([str(folder / "config.yaml")])
        version = _identity(folder).get("version")
        if version is not None and version != run.config.method.version:
            return None
        return run.key
    except Exception:  # a method from outside the package may raise anything when it is imported
        return None


def _identity(folder: Path) -> dict[str, Any]:
    """What the run's folder is named after; empty where that is not known."""
    try:
        identity: dict[str, Any] = read_environment(folder)["identity"]
    except (Damaged, OSError):
        return {}
    return identity


def finished_run(runs: Path, key: str, name: str = "") -> Path | None:
    """The folder of the finished run with this key, by result.json; those called `name` are looked at first."""
    named = sorted(runs.glob(f"{name}-*/result.json")) if name else []
    for file in [*named, *sorted(set(runs.glob("*/result.json")) - set(named))]:
        try:
            if (read_result(file.parent) or {}).get("key") == key:
                return file.parent
        except (OSError, ValueError):  # damaged: status and collect say so
            continue
    return None


def started_run(runs: Path, config: Path, since: float) -> Path | None:
    """The folder of the run that was started as `train <config>` after `since` (of time.time())."""
    for file in runs.glob("*/environment.json"):
        try:
            if file.stat().st_mtime < since - 2:  # clocks of file servers
                continue
            sessions = read_environment(file.parent)["sessions"]
            if sessions and str(config) in (sessions[-1].get("command") or ""):
                return file.parent
        except (OSError, ValueError):
            continue
    return None
