"""The folders of one data root: packed sets, what they were made of, and published weights.

`$HPCDISTILL_DATA` (default data/packed) holds `<recipe>/` packed, `sources/<recipe>/` unpacked, `downloads/`,
`weights/` and `features/` (of metrics). One folder on a shared file system serves a whole cluster.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpcdistill.storage import user_path

VARIABLE = "HPCDISTILL_DATA"


def data_root() -> Path:
    """The folder that everything lies in. The configurations read the same variable: empty it would be the root `/`."""
    return user_path(os.environ.get(VARIABLE, "data/packed"), VARIABLE)


def sources_folder(recipe: str) -> Path:
    """Where the unpacked archives of a recipe lie."""
    return data_root() / "sources" / recipe


def downloads_folder() -> Path:
    """Where archives lie, and the checksums recorded of them."""
    return data_root() / "downloads"


def weights_folder() -> Path:
    """Where published weights lie."""
    return data_root() / "weights"
