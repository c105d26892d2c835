"""What is known of how a finished network was trained and measured: of its run, or of the notes beside a shipped file.

Nothing is guessed: what was not written down is not here. Nobody's folders are named: of a path its last name stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdistill.data.index import LR_RULES
from hpcdistill.data.pack.recipes import OWN, load_recipe, recipe_names
from hpcdistill.deploy.description import UNKNOWN, Description, training_sets
from hpcdistill.deploy.shipped import PRETRAINED
from hpcdistill.errors import plural
from hpcdistill.metrics.base import PAIR_METRICS, SR_METRICS
from hpcdistill.metrics.config import BACKWARDS
from hpcdistill.metrics.reference import bicubic_value
from hpcdistill.metrics.selection import choice_of
from hpcdistill.training.records import read_result, run_values
from hpcdistill.yaml_values import dump_yaml, load_yaml

RULES = {
    "pisr": "rule pisr (outputs rounded to 8 bits, references not, gray images made RGB)",
    "matlab": "rule matlab (outputs and references rounded to 8 bits, gray images taken as they are)",
}
_LABELS = {metric.name: metric.label.partition(" ")[0] for metric in (*PAIR_METRICS, *SR_METRICS)}
_FOLDERS = re.compile(r"(?<![\w:/.~])(?:~|[A-Za-z]:[\\/]|\w+://|/)[^\s,'\"\[\]()=]*[/\\](?=[^\s/\\])")
_SHIPPED_ROW = re.compile(r"^\| (\w[\w ]*) \| (.+) \|$", re.MULTILINE)
_SHIPPED_NUMBERS = re.compile(r"(\w+) (\d+\.\d+)(?: dB)? / (0\.\d+)")


@dataclass(frozen=True)
class Score:
    """One number, and all that one has to know to compare it."""

    test_set: str
    metric: str
    value: float
    protocol: str
    chosen: str  # how the weights were, that it is of
    bicubic: float | None = None  # the same of bicubic enlargement

    @property
    def label(self) -> str:
        return _LABELS.get(self.metric, self.metric)


@dataclass(frozen=True)
class Provenance:
    """`rows`: what was written down, by what it is about; `config`: the run's, as YAML, empty where there is none."""

    rows: dict[str, str]
    datasets: tuple[str, ...] = ()
    measured: tuple[Score, ...] = ()
    config: str = ""
    finished: bool = True
    distilled: bool = False


def provenance(file: Path, about: Description) -> Provenance:
    """What the run of the generator's `file` says, else the notes beside it, else `about`. UserError: damaged."""
    if values := run_values(file):
        return _of_run(file, about, values)
    notes = file.with_suffix(".md")
    if file.parent == PRETRAINED and notes.is_file():
        return _of_notes(notes.read_text(encoding="utf-8"), about)
    return Provenance(_rows(about), _known(about.data))


def without_folders(text: str) -> str:
    """`text`, in which of a path from the root, of a home or of an address the last name alone is left."""
    return _FOLDERS.sub("", text)


def _of_run(file: Path, about: Description, values: Mapping[str, Any]) -> Provenance:
    result = read_result(file.parents[2])
    rows = {"Network of its run": f"{file.stem}, {file.parent.name} weights"} | _rows(about)
    if direction := (values.get("data") or {}).get("direction") if about.task == "translation" else None:
        rows["Domains"] = f"data.direction {direction}" + (", backwards" if file.stem.endswith(BACKWARDS) else "")
    if result is not None:
        seconds = result.get("seconds") or 0
        rows |= {
            "Steps": f"{result.get('steps'):,}, each a batch of {result.get('batch_size')}; seed {result.get('seed')}",
            "Taught by": str(result["teacher"]) if result.get("teacher") else "no teacher",
            "Trained on": f"{result.get('device')}, {plural(result.get('processes') or 1, 'process', 'processes')}, "
            f"{result.get('precision')}, {seconds:,.0f} s",
            "Code": f"hpcdistill, revision {result['revision']}" if result.get("revision") else UNKNOWN,
        }
    return Provenance(
        rows,
        tuple(dict.fromkeys(name for _, name in training_sets(values, file) if name)),
        () if result is None else tuple(_measured(file, result)),
        _config(file.parents[2] / "config.yaml"),
        finished=result is not None,
        distilled=file.stem.startswith("student") and bool(re.search("student|distill", about.method)),
    )


def _config(file: Path) -> str:
    """The run's configuration as it is, but for folders."""
    values = load_yaml(file.read_text(encoding="utf-8"))  # `run_values` has read it
    return dump_yaml(_plain({key: value for key, value in values.items() if key != "runs"}))


def _of_notes(text: str, about: Description) -> Provenance:
    """The table beside a shipped file; the row of its numbers is read, the others stay as they are."""
    rows = dict(_SHIPPED_ROW.findall(text))
    printed = rows.pop("Measured", "")
    numbers, _, protocol = printed.partition(" (")
    protocol, _, bicubic = protocol.partition(")")
    chosen = "the last weights, which no test set chose" if "the last weights" in rows.get("Training", "") else UNKNOWN
    names = [name for name, _, _ in _SHIPPED_NUMBERS.findall(numbers)]
    of_bicubic = dict(zip(names, map(float, re.findall(r"\d+\.\d+", bicubic)), strict=False))
    measured = []
    for name, *pair in _SHIPPED_NUMBERS.findall(numbers):
        for metric, value in zip(("psnr", "ssim"), pair, strict=True):
            reference = of_bicubic.get(name) if metric == "psnr" else None
            measured.append(Score(name.lower(), metric, float(value), protocol, chosen, reference))
    return Provenance(rows or _rows(about), _known(about.data), tuple(measured))


def _rows(about: Description) -> dict[str, str]:
    return {
        "Training data": without_folders(about.data),
        "Method": about.method,
        "Steps": UNKNOWN if about.steps is None else f"{about.steps:,}",
    }


def _known(data: str) -> tuple[str, ...]:
    """The data sets among those that `data` lists which a recipe is named or titled after: the first word of each."""
    names = (part.split()[0].lower() for part in data.split(",") if part.strip())
    titles = {load_recipe(recipe).title.split()[0].lower() for recipe in recipe_names() if recipe not in OWN.values()}
    return tuple(dict.fromkeys(name for name in names if name in titles | set(recipe_names())))


def _plain(value: Any) -> Any:
    """The values of a configuration, as they are written, without anybody's folders."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        foreign = value.startswith(("/", "~")) or "://" in value
        return Path(value).name if foreign else without_folders(value)
    if value is None or isinstance(value, bool):
        return value
    return int(value) if isinstance(value, int) else float(value)


def _measured(file: Path, result: Mapping[str, Any]) -> list[Score]:
    """The numbers of a result.json that are of the network in `file`, generators/<which>/<name>.safetensors."""
    which = file.parent.name
    part, protocol = result.get(which) or {}, result.get("protocol") or {}
    found = []
    for key, value in (part.get("metrics") or {}).items():
        network, _, rest = key.partition("/")
        test_set, _, metric = rest.rpartition("/")
        if network == file.stem and test_set and value is not None and math.isfinite(value):
            chosen = _chosen(which, part.get("step"), result, test_set)
            how = without_folders(_protocol(protocol, test_set, metric))
            found.append(Score(test_set, metric, float(value), how, chosen, bicubic_value(result, key)))
    return found


def _chosen(which: str, step: int | None, result: Mapping[str, Any], test_set: str) -> str:
    if which == "last":
        return "the last weights, which no test set chose"
    choice = choice_of(result)
    if choice is None:
        return f"the weights of step {step}; how they were chosen was {UNKNOWN}"
    itself = f" on {test_set}, " in choice  # a test set, or images held out
    return f"the best weights (step {step}), chosen by {choice}{': this number flatters' if itself else ''}"


def _protocol(protocol: Mapping[str, Any], test_set: str, metric: str) -> str:
    count = (protocol.get("test_sets") or {}).get(test_set)
    parts = [plural(count, "image")] if isinstance(count, int) else []
    if "rule" in protocol:
        parts.append(f"luma, border of {protocol.get('scale')} pixels cut off")
        parts.append(RULES.get(protocol["rule"], f"rule {protocol['rule']}"))
        lr = (protocol.get("lr") or {}).get(test_set)
        parts.append(f"LR images {UNKNOWN}" if lr is None else f"LR images {lr} ({LR_RULES.get(lr, 'another rule')})")
        if gray := (protocol.get("gray") or {}).get(test_set):
            parts.append(f"taken as gray: {', '.join(gray)}")
    else:
        if isinstance(protocol.get(metric), str):
            parts.append(protocol[metric])
        parts.append(str(protocol.get("note") or f"protocol {UNKNOWN}"))
    return "; ".join(parts)
