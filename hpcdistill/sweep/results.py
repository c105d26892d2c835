"""The results that lie in a folder of runs: each result.json, read and checked, by the key of its run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpcdistill.errors import UserError
from hpcdistill.metrics.reference import bicubic_value
from hpcdistill.run import load_run
from hpcdistill.storage import Damaged
from hpcdistill.sweep.task_files import damage
from hpcdistill.training.records import RESULT, read_environment, read_result

Which = Literal["best", "last"]  # of a run's weights
WHICH: tuple[Which, ...] = ("best", "last")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    key: str | None  # None: its configuration no longer loads or means what it did, so it belongs to no grid
    result: Mapping[str, Any]  # result.json
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # digests of what it trained and chose on

    @property
    def revision(self) -> str:
        """The code it was trained with."""
        return str(self.result.get("revision") or "unknown")

    def metrics(self, which: Which) -> dict[str, float]:
        """What was measured of its best or last weights; NaN for what JSON could not say."""
        measured = (self.result.get(which) or {}).get("metrics", {})
        return {name: math.nan if value is None else float(value) for name, value in measured.items()}

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
        """The file, what is wrong with it and the remedy."""
        return damage(self.folder / RESULT, self.reason)


@dataclass
class Found:
    """What lies in a folder of runs."""

    runs: list[RunResult] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # a line for each run that is there more than once
    by_key: dict[str, RunResult] = field(default_factory=dict)


def find_results(*folders: Path) -> Found:
    """Read */result.json of each folder. Of two runs with one key the one that finished last counts.

    Raises UserError when there is no such folder. A damaged file is not an error: it is in `unreadable`.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder that the runs are in")
    found = Found()
    times: dict[str, float] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*/result.json"))):
        try:
            result = read_result(file.parent)
        except (Damaged, OSError) as error:
            reason = error.why if isinstance(error, Damaged) else " ".join(str(error).split())
            found.unreadable.append(Unreadable(file.parent, key_of(file.parent), reason))
            continue
        if result is None:  # removed just now
            continue
        key = str(result["key"]) if result.get("key") else key_of(file.parent)
        run = RunResult(file.parent, key, result, _digests(file.parent))
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
    try:
        run = load_run([str(folder / "config.yaml")])
        version = _identity(folder).get("version")
        if version is not None and version != run.config.method.VERSION:
            return None
        return run.key
    except (UserError, OSError):
        return None


def _identity(folder: Path) -> dict[str, Any]:
    """What the run's folder is named after; empty where that is not known."""
    try:
        identity: dict[str, Any] = read_environment(folder)["identity"]
    except (Damaged, OSError):
        return {}
    return identity


def _digests(folder: Path) -> dict[str, tuple[str, ...]]:
    """Digests of the run's training sets and of the set that chose its best weights."""
    identity = _identity(folder)
    data = identity.get("data", ())
    if not identity or not isinstance(data, list | tuple):
        return {}
    digests = {"training data": tuple(map(str, data))}
    if identity.get("selection"):
        digests["test set that selects"] = (str(identity["selection"]),)
    return digests
