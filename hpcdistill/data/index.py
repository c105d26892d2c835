"""index.json: what a packed data set holds and where each byte of it lies.

A packed data set is a folder of `*.tar` shards in webdataset's layout (`<key>.hr.png`, `<key>.lr4.png`, ...)
and this index. The index has no path and no date of the machine that made it: the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpcdistill.errors import UserError
from hpcdistill.storage import write_json

SCHEMA = 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class Member:
    """One file of a sample: its place in the shard and the size of the image it decodes to."""

    offset: int  # of the file's first byte from the start of the tar
    length: int  # bytes
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    key: str  # webdataset's `__key__`
    source: str  # the image's name in its source folder, for reports
    shard: int  # position in `Index.shards`
    members: dict[str, Member]  # suffix ("hr.png", "lr4.png") -> place


@dataclass(frozen=True)
class Shard:
    name: str
    length: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    recipe: str
    split: str  # "train", "test", ... or "all"
    kind: str  # "lr-hr"
    scales: tuple[int, ...]  # of the down-sampled images, () for other kinds
    licence: str
    origin: str
    shards: tuple[Shard, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()  # sources left out under `--on-error skip`
    notes: dict[str, Any] = field(default_factory=dict)  # the packer's versions and settings

    def save(self, folder: Path) -> None:
        """Write `folder/index.json` atomically; its presence says that the data set is complete."""
        write_json(folder / INDEX_NAME, {"schema": SCHEMA, **asdict(self)})


def load_index(folder: Path) -> Index:
    """Read `folder/index.json`; UserError when it is missing, damaged or of another schema."""
    path = folder / INDEX_NAME
    if not path.is_file():
        inside = sorted(entry.parent.name for entry in folder.glob(f"*/{INDEX_NAME}"))
        if inside:
            raise UserError(f"{folder}: has the splits {', '.join(inside)}; name one, e.g. {folder / inside[0]}")
        state = "is not a packed data set (no index.json)" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder}: {state}; pack one with `python shards/pack.py RECIPE --source DIR --out {folder}`")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("schema") != SCHEMA:
            raise UserError(f"{path}: made by another version of hpcdistill; pack the data set again")
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        samples = tuple(
            Sample(
                members={name: Member(**member) for name, member in sample.pop("members").items()},
                **sample,
            )
            for sample in raw.pop("samples")
        )
        scales, skipped = tuple(raw.pop("scales")), tuple(raw.pop("skipped"))
        return Index(shards=shards, samples=samples, scales=scales, skipped=skipped, **raw)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); pack the data set again") from None


def index_digest(folder: Path) -> str:
    """Hex sha256 of what the packed data set holds; part of a run's identity."""
    load_index(folder)  # a clear error for what is no index
    return hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
