"""Test sets: the files that are measured, the training images that FID compares with as well, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.folders import list_images
from hpcdistill.data.index import INDEX_NAME, Kind, index_digest, load_index
from hpcdistill.errors import UserError
from hpcdistill.storage import sha256_file

Real = Literal["train+test", "test"]  # whose target images outputs are compared with as a set


def hr_files(folder: Path) -> list[Path]:
    """The HR images of a test set's folder, in natural order: of `folder/HR` where there is one."""
    inner = folder / "HR"
    return list_images(inner if inner.is_dir() else folder)


def test_set_digest(folder: Path) -> str:
    """Digest of a packed set's index, or of a plain folder's file names and contents."""
    if (folder / INDEX_NAME).is_file():
        return index_digest(folder)
    listing = [(path.name, sha256_file(path)) for path in hr_files(folder)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def real_side(kind: Kind, chosen: Real | None) -> Real:
    """The real side of FID for a kind of set: what is chosen, or what the literature does (fesd.md, section 7)."""
    return chosen or ("test" if kind == "paired" else "train+test")


def real_folders(folder: Path, real: Real, train: Sequence[str]) -> list[Path]:
    """The packed sets whose target images are the real side of the test set `folder`, that set last.

    The training images are those of the split `train` beside it or, where there is none, those that the run trains on.
    """
    if real == "test":
        return [folder]
    beside = folder.parent / "train"
    if (beside / INDEX_NAME).is_file():
        others = [beside]
    else:
        others = [Path(place) for place in train if not is_remote(place)]
        if not others or len(others) < len(train):
            raise UserError(
                f"{folder}: eval.real=train+test needs the training images on this machine, and there is no {beside}; "
                "pack it, or set eval.real=test (of `evaluate`: --real test)"
            )
    return [*(other for other in others if other.resolve() != folder.resolve()), folder]


def real_digests(folder: Path, real: Real | None, train: Sequence[str]) -> list[str]:
    """Digests of the training images that FID compares with besides the test set's (it chooses the best weights)."""
    if not (folder / INDEX_NAME).is_file() or (kind := load_index(folder).kind) == "lr-hr":
        return []
    try:
        folders = real_folders(folder, real_side(kind, real), train)
    except UserError:  # an evaluator that needs these images says so itself
        return []
    return [index_digest(other) for other in folders if other != folder]


def statistics_digest(file: Path) -> str:
    """Digest of the file that `eval.real_stats` names; UserError when it is not there."""
    if not file.is_file():
        raise UserError(
            f"eval.real_stats={file}: no such file; give the .npz file with mu and sigma of the real images"
        )
    return sha256_file(file)
