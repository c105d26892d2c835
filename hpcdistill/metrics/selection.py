"""Which set chose a run's best weights, in words: a number chosen on the images that it is shown for flatters.

Nothing here imports torch: tables of finished runs ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcdistill.data.config import DataConfig
from hpcdistill.data.held_out import NAME
from hpcdistill.data.index import INDEX_NAME, load_index
from hpcdistill.errors import plural

_VALIDATION = ("val", "valid", "validation")  # splits that are neither trained on nor reported


def describe_choice(selects: str | None, data: DataConfig) -> str | None:
    """What the metric `selects` ("student/set5/psnr") of a run with `data` is measured on, for result.json.

    E.g. "PSNR on set5, a test set"; None where nothing chooses.
    """
    if selects is None:
        return None
    name = selects.split("/")[1]
    if name == NAME and data.held_out:
        return f"{_measured(selects)}, {plural(data.held_out, 'training image')} held out"
    folder = Path(data.eval[name])
    validates = (folder / INDEX_NAME).is_file() and load_index(folder).split in _VALIDATION
    return f"{_measured(selects)}, {'a validation set' if validates else 'a test set'}"


def choice_of(result: Mapping[str, Any]) -> str | None:
    """What chose the best weights of a result.json; of one from before that was said, the metric and the set."""
    protocol = result.get("protocol") or {}
    if said := protocol.get("chosen_by"):
        return str(said)
    selects = protocol.get("selects")
    return _measured(str(selects)) if selects else None


def _measured(selects: str) -> str:
    """ "PSNR on set5" of "student/set5/psnr"."""
    _, _, rest = selects.partition("/")
    name, _, metric = rest.rpartition("/")
    if not name:
        return selects
    return f"{metric.upper() if metric in ('psnr', 'fid') else metric} on {name}"
