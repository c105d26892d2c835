"""The key of a run in a plan: what it will be, said before its data are there.

`identity.identify` hashes what the data contain; the key has where they lie instead, relative to the data root. So a
plan can be made on a login node, and a sweep that was moved with its data keeps its keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hpcdistill.config import Loaded
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.places import data_root
from hpcdistill.settings import identity_values
from hpcdistill.sweep.identity import selected_set

KEY_DIGITS = 12


def plan_key(loaded: Loaded) -> str:
    """12 hex digits of the run that `loaded` describes; two configurations with one key are one run.

    Like the identity it leaves out what does not change a result: names, workers, test sets beside the selected one.
    """
    config = loaded.config
    record: dict[str, Any] = {
        "method": config.method.name,
        "version": config.method.VERSION,
        "values": {**identity_values(config), "seed": config.seed},
        "data": [relative_place(place) for place in config.data.train],
    }
    if selected := selected_set(config):
        record["selection"] = relative_place(config.data.eval[selected])
    if config.init:
        record["init"] = config.init
    if loaded.teacher and config.teacher:
        record["teacher"] = [plan_key(loaded.teacher), config.teacher.checkpoint]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def relative_place(place: str) -> str:
    """A data set's place below the data root; as it is given where it is elsewhere (its path in full) or remote."""
    if is_remote(place):
        return place
    full, root = _whole(Path(place)), _whole(data_root())
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(full)


def _whole(path: Path) -> Path:
    """`path` from the root of the file system, its links left as they are: a linked data set is in the data root."""
    return Path(os.path.normpath(path.absolute()))
