"""index.json: what a packed data set holds and where each byte of it lies.

A packed data set is a folder of `*.tar` shards in webdataset's layout (`<key>.hr.png`, `<key>.lr4.png`, ...)
and this index. The index has no path and no date of the machine that made it: the same input gives the same bytes.

The part of a member's suffix before the first dot is its role:

- `lr-hr`: `hr` and `lr2`, `lr3`, `lr4` (down-sampled by 2, 3, 4), all in each sample;
- `paired`: `a` and `b` in each sample, or `ab`, one image whose left half is `a` and whose right half is `b`;
- `unpaired`: `a` or `b`; a shard holds one of the two only, and those of `a` come first.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hpcdistill.data.index_check import check_index
from hpcdistill.errors import UserError
from hpcdistill.storage import write_json

SCHEMA = 1
INDEX_NAME = "index.json"

Kind = Literal["lr-hr", "paired", "unpaired"]


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

    def member(self, role: str) -> Member | None:
        """The member of a role ("hr", "lr4", "a"), None when the sample has none."""
        return next((member for suffix, member in self.members.items() if role_of(suffix) == role), None)


@dataclass(frozen=True)
class Shard:
    name: str
    length: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    recipe: str
    split: str  # "train", "test", ... or "all"
    kind: Kind
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


def role_of(suffix: str) -> str:
    """The role of a member's suffix: "hr" of "hr.png"."""
    return suffix.partition(".")[0]


def load_index(folder: Path) -> Index:
    """Read `folder/index.json`; UserError when it is missing, damaged or of another schema."""
    path = folder / INDEX_NAME
    if not path.is_file():
        inside = sorted(entry.parent.name for entry in folder.glob(f"*/{INDEX_NAME}"))
        if inside:
            raise UserError(f"{folder}: has the splits {', '.join(inside)}; name one, e.g. {folder / inside[0]}")
        state = "is not a packed data set (no index.json)" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder}: {state}; pack one with `{_packing(folder)}`")
    return parse_index(path.read_bytes(), str(path))


def _packing(folder: Path) -> str:
    """The command that packs what belongs in `folder`: into another, where that holds something already."""
    if not folder.is_dir() or not any(not path.name.startswith(".") for path in folder.iterdir()):
        return f"python shards/pack.py RECIPE --source DIR --out {shlex.quote(str(folder))}"
    packed = folder.absolute().with_name(f"{folder.absolute().name}-packed")
    return f"python shards/pack.py RECIPE --source {shlex.quote(str(folder))} --out {shlex.quote(str(packed))}"


def parse_index(content: bytes, name: str) -> Index:
    """The index that `content` is, every value checked; see `index_check`.

    UserError when it is damaged or of another schema. Messages call it `name`.
    """
    try:
        raw = json.loads(content.decode())
        if raw.pop("schema") != SCHEMA:
            raise UserError(f"{name}: made by another version of hpcdistill; pack the data set again")
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        samples = tuple(
            Sample(
                members={name: Member(**member) for name, member in sample.pop("members").items()},
                **sample,
            )
            for sample in raw.pop("samples")
        )
        scales, skipped = tuple(raw.pop("scales")), tuple(raw.pop("skipped"))
        index = Index(shards=shards, samples=samples, scales=scales, skipped=skipped, **raw)
        if index.kind not in get_args(Kind):
            raise UserError(f"{name}: holds {index.kind!a:.60} samples, which this version of hpcdistill does not know")
        check_index(index, name)
        return index
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: damaged ({why:.200}); copy it again, or pack the data set again") from None


def index_digest(folder: Path) -> str:
    """Hex sha256 of what the packed data set holds; part of a run's identity."""
    load_index(folder)  # a clear error for what is no index
    return hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
