"""result.json, environment.json and metrics.jsonl of a run folder, read for training, sweeps, status and the tables.

What one of them calls damaged, all do. Nothing here imports torch: status asks about a thousand runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcdistill.storage import json_object, parse_json, read_json

RESULT, ENVIRONMENT = "result.json", "environment.json"


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of the run in `folder`; None while it has not finished.

    Raises Damaged, with how to have it written again, when it is not what training writes.
    """
    file = folder / RESULT
    if not file.is_file():
        return None
    if any(folder.glob("checkpoints/step-*")):
        remedy = "remove it, and the same command writes it again from the run's last checkpoint, without training"
    else:
        remedy = "copy it again; the run has no checkpoint left: without this file it is trained again from step 0"
    return read_json(file, _checked_result, remedy)


def run_of(file: Path) -> Path | None:
    """The folder of the run that a generator's file lies in; None for a file elsewhere."""
    return file.parents[2] if file.parent.parent.name == "generators" else None


def run_values(file: Path) -> dict[str, Any]:
    """The sections of the configuration of the run that the generator's file lies in; empty for a file elsewhere."""
    folder = run_of(file)
    if folder is None:
        return {}
    import yaml  # status uses the rest of this file without it

    from hpcdistill.yaml_values import load_yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        values = load_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return {name: section for name, section in values.items() if isinstance(section, dict)}
    return {}


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has a result that can be read."""
    try:
        return read_result(folder) is not None
    except (OSError, ValueError):
        return False


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json: `identity`, an object, and `sessions`, a list of objects; empty where it is not there yet.

    Raises Damaged. The file is a record of where a run was trained: no result depends on it.
    """
    file = folder / ENVIRONMENT
    empty: dict[str, Any] = {"identity": {}, "sessions": []}
    if not file.is_file():
        return empty
    found = read_json(file, _checked_environment, "remove it; the next session of the run writes it again")
    return empty | found


def read_row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for half a line, or one that has no step."""
    try:
        row = parse_json(line, json_object)
    except ValueError:
        return None
    return row if type(row.get("step")) is int else None


def count_evaluations(log: Path, selects: str) -> int:
    """How often `selects`, the metric that chooses the best weights, was measured by metrics.jsonl; 0 without one."""
    name = json.dumps(selects).encode()
    steps = set()
    with contextlib.suppress(OSError), log.open("rb") as lines:
        # A long log has few such lines; only they are parsed.
        rows = (read_row(line) for line in lines if name in line)
        steps = {row["step"] for row in rows if row is not None and selects in row}
    return len(steps)


def _checked_result(result: Any) -> dict[str, Any]:
    """`result` if it is what train.py writes, as far as anybody uses it; else ValueError.

    Keys that older versions did not write may be missing.
    """
    if not isinstance(result, dict):
        raise ValueError("expected a JSON object")
    for which in ("best", "last"):
        _check_measured(which, result.get(which))
    if not isinstance(result.get("name"), str):
        raise ValueError("name: missing")
    for key, kinds in _KINDS.items():
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"{key}: another kind of value was expected, got {value!r:.60}")
    protocol = result.get("protocol")
    if protocol is not None and not isinstance(protocol, dict):
        raise ValueError("protocol: expected a JSON object")
    for key, kind in _PROTOCOL.items():
        if (value := (protocol or {}).get(key)) is not None and not isinstance(value, kind):
            raise ValueError(f"protocol: {key}: another kind of value was expected, got {value!r:.60}")
    return result


def _check_measured(which: str, part: Any) -> None:
    if part is None:
        return
    if not isinstance(part, Mapping) or not isinstance(part.get("metrics"), Mapping):
        raise ValueError(f"{which}: expected a step and metrics")
    if part.get("step") is not None and type(part["step"]) is not int:
        raise ValueError(f"{which}: step: expected a whole number, got {part['step']!r:.60}")
    for name, value in part["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{which}: {name}: expected a number, got {value!r:.60}")
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError(f"{which}: {name}: a number of {len(str(value))} digits")


def _checked_environment(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    if not isinstance(found.get("identity", {}), dict):
        raise ValueError("identity: expected a JSON object")
    sessions = found.get("sessions", [])
    if not (isinstance(sessions, list) and all(isinstance(session, dict) for session in sessions)):
        raise ValueError("sessions: expected a list of JSON objects")
    for key, kinds in (("revision", str | None), ("command", str | None)):
        if not all(isinstance(session.get(key), kinds) for session in sessions):
            raise ValueError(f"sessions: {key}: expected text")
    return found


_LARGEST = 1 << 1000  # a float holds no larger one
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("key", "identity", "method", "precision", "device", "teacher", "revision"), str),
    **dict.fromkeys(("steps", "batch_size", "images", "seed", "processes", "evaluations"), int),
    **dict.fromkeys(("seconds", "images_per_second"), (int, float)),
}
_PROTOCOL: dict[str, type] = {
    **dict.fromkeys(("selects", "chosen_by", "note"), str),
    **dict.fromkeys(("test_sets", "lr", "gray"), dict),
}
