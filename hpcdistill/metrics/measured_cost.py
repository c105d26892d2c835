"""latency.json of a run folder: what its networks take, by the papers' protocols, on each device that was tried.

`hpcdistill benchmark latency RUN --protocol paper` writes it, the tables of a sweep read it. Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpcdistill.storage import Damaged, json_object, read_json, write_json

LATENCY = "latency.json"
COST = "cost"  # in the place of a test set in a metric's name: student/cost/latency_ms
Column = Literal["latency_ms", "runtime_ms"]  # what FESD and DSSD call a time
TIMES: tuple[Column, ...] = ("latency_ms", "runtime_ms")
COUNTS = ("macs_G", "params_M", "params_k")
_REMEDY = "remove it, and measure the run again with `hpcdistill benchmark latency RUN --protocol paper`"
_TEXTS, _NUMBERS = ("metric", "kind", "time"), ("mean_ms", "median_ms", "p95_ms")  # of an entry
_LONGEST = 1e10  # milliseconds: four months


@dataclass(frozen=True)
class MeasuredCost:
    """A run's latency.json for the tables."""

    values: Mapping[str, float] = field(default_factory=dict)  # by the metric's name, e.g. student/cost/macs_G
    devices: Mapping[str, str] = field(default_factory=dict)  # of the times among them
    damage: str = ""  # one line, where the file is there and cannot be used


def is_cost(metric: str) -> bool:
    """Whether a metric is measured of the network, whatever its weights are."""
    generator, _, rest = metric.partition("/")
    test_set, _, name = rest.partition("/")
    return bool(generator) and test_set == COST and name in (*TIMES, *COUNTS)


def is_time(metric: str) -> bool:
    """Whether it depends on the device too, so that no paper's number can be compared with it."""
    return is_cost(metric) and metric.rpartition("/")[2] in TIMES


def measured_cost(folder: Path) -> MeasuredCost:
    """What the tables take of the run in `folder`: of several devices a GPU's number, else the newest."""
    try:
        found = read_latency(folder)
    except (Damaged, OSError) as error:
        return MeasuredCost(damage=" ".join(str(error).split()))
    values: dict[str, float] = {}
    devices: dict[str, str] = {}
    for generator, measured in found.items():
        values[f"{generator}/{COST}/macs_G"] = measured["macs"] / 1e9
        values[f"{generator}/{COST}/params_M"] = measured["params"] / 1e6
        values[f"{generator}/{COST}/params_k"] = measured["params"] / 1e3
        for column in TIMES:
            tried = {name: entry for name, entry in measured["devices"].items() if entry["metric"] == column}
            if tried:
                device = max(tried, key=lambda name: (tried[name]["kind"] != "cpu", tried[name]["time"], name))
                values[f"{generator}/{COST}/{column}"] = float(tried[device]["mean_ms"])
                devices[f"{generator}/{COST}/{column}"] = device
    return MeasuredCost(values, devices)


def read_latency(folder: Path) -> dict[str, Any]:
    """What latency.json holds by generator; empty where there is none. Raises Damaged."""
    file = folder / LATENCY
    return read_json(file, _checked, _REMEDY) if file.is_file() else {}


def save_latency(folder: Path, generator: str, about: Mapping[str, Any], device: str, entry: Mapping[str, Any]) -> Path:
    """Put `entry`, measured on `device`, beside what other devices have given for the same network.

    `about`: `params`, `macs` and whatever else is said of the network. Raises Damaged: nobody's file is written over.
    """
    found = read_latency(folder)
    devices = found.get(generator, {}).get("devices", {})
    found[generator] = {**about, "devices": {**devices, device: dict(entry)}}
    write_json(folder / LATENCY, _checked(found))
    return folder / LATENCY


def _checked(found: Any) -> dict[str, Any]:
    for generator, measured in json_object(found).items():
        for key in ("params", "macs"):
            value = json_object(measured).get(key)
            if type(value) is not int or not 0 <= value < 1 << 80:
                raise ValueError(f"{generator}: {key}: expected a whole number, got {value!r:.60}")
        for device, entry in json_object(measured.get("devices")).items():
            for key in _TEXTS:
                if not isinstance(json_object(entry).get(key), str):
                    raise ValueError(f"{generator}: {device}: {key}: expected a text, got {entry.get(key)!r:.60}")
            for key in _NUMBERS:
                number = entry.get(key)
                if type(number) not in (int, float) or not 0 < number < _LONGEST:
                    raise ValueError(f"{generator}: {device}: {key}: expected milliseconds, got {number!r:.60}")
    return json_object(found)
