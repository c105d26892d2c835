"""What finished runs say of themselves on a set: beside their pictures, the distance of best and last weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdistill.data.index import INDEX_NAME
from hpcdistill.data.test_sets import test_set_digest
from hpcdistill.deploy.candidates import Candidate
from hpcdistill.errors import UserError
from hpcdistill.sweep.results import RunResult
from hpcdistill.training.records import read_environment, read_result, run_of, run_values

# Words, and what is by the names that a run gives its test sets.
_NOT_COMPARED = ("note", "selects", "chosen_by", "test_sets", "real_images")
_LABELS = {"fid": "FID", "kid": "KID", "psnr": "PSNR [dB]"}


@dataclass(frozen=True)
class Score:
    """What chose a run's best weights, of one of its networks on one test set; None where that was not measured."""

    metric: str  # as tables call it
    best: float | None
    last: float | None
    evaluations: int | None  # that the best weights were chosen from
    protocol: str  # how it was measured, in words
    basis: str  # the same, of what must be alike where numbers are compared

    @property
    def numbers(self) -> str:
        """`61.21 best of 20, 65.02 last`."""
        of = f" of {self.evaluations}" if self.evaluations else ""
        parts = [] if self.best is None else [f"{self.best:.2f} best{of}"]
        return ", ".join(parts if self.last is None else [*parts, f"{self.last:.2f} last"])


def score_of(file: Path, digest: str) -> Score | None:
    """What the finished run of the network `file` has measured of it on the test set with this `digest`.

    None for a file outside a run, a run that has not finished, and a set that it has not measured. Damaged, a
    UserError, for a result.json that cannot be read.
    """
    folder = run_of(file)
    result = read_result(folder) if folder else None
    if folder is None or result is None:
        return None
    protocol = result.get("protocol") or {}
    selects = str(protocol.get("selects") or "")
    name, metric = _measured_as(folder, selects, digest), selects.rpartition("/")[2]
    run = RunResult(folder, None, result)
    best, last = (run.metrics(which).get(f"{file.stem}/{name}/{metric}") for which in ("best", "last"))
    if best is None and last is None:
        return None
    said = _LABELS.get(metric, metric.replace("_", " "))
    basis = {part: value for part, value in protocol.items() if part not in _NOT_COMPARED}
    basis["real_images"] = (protocol.get("real_images") or {}).get(name)
    note = str(protocol.get("note") or "")
    return Score(said, best, last, run.evaluations, note, json.dumps(basis, sort_keys=True))


def check_one_data_set(candidates: Sequence[Candidate]) -> None:
    """UserError when two are runs of different data sets: neither the training nor the test set is the same."""
    known: list[tuple[Candidate, dict[str, Any]]] = []
    for candidate in candidates:
        folder = run_of(candidate.path)
        identity = read_environment(folder)["identity"] if folder else {}
        if identity.get("data"):
            known.append((candidate, identity))
    for candidate, identity in known[1:]:
        first, of_first = known[0]
        if all(identity.get(part) != of_first.get(part) for part in ("data", "selection")):
            raise UserError(
                f"{first.label} is of {_trained_on(first)} and {candidate.label} of {_trained_on(candidate)}: networks "
                "of different data sets have no images to compare; name runs of one"
            )


def _trained_on(candidate: Candidate) -> str:
    places = (run_values(candidate.path).get("data") or {}).get("train") or "another set"
    return places if isinstance(places, str) else "+".join(map(str, places))


def _measured_as(folder: Path, selects: str, digest: str) -> str | None:
    """What the run calls the test set with this digest."""
    if read_environment(folder)["identity"].get("selection") == digest:
        return selects.split("/")[1] if selects.count("/") == 2 else None
    sets = (run_values(folder / "generators" / "last" / "any").get("data") or {}).get("eval") or {}
    for name, place in sets.items():
        if (Path(place) / INDEX_NAME).is_file() and test_set_digest(Path(place)) == digest:
            return str(name)
    return None
