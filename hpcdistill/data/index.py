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
import re
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from hpcdistill.errors import UserError
from hpcdistill.storage import parse_json, write_json

SCHEMA = 1
INDEX_NAME = "index.json"

Kind = Literal["lr-hr", "paired", "unpaired"]
LR_RULES = {  # how the LR images of a set were made; the first three are `ops.downsampling.ResizeRule`
    "newer": "MATLAB's imresize as of about 2018: 8 bits after each pass, mirrored at the border",
    "older": "MATLAB's imresize as of 2015: 8 bits after each pass, the last pixel repeated at the border",
    "exact": "MATLAB's kernel, rounded once at the end: how this package packed before",
    "official": "files that came with the set",
}

# What an index may say, in the types below: they are checked before anything is read or written by it.
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")  # stays in the folder
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # becomes part of a folder's name
_Key = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # names a file where enlarged images are saved
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Side = Annotated[int, Field(ge=1, lt=1 << 31)]  # pixels
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Member:
    """One file of a sample: its place in the shard and the size of the image it decodes to."""

    __pydantic_config__ = _STRICT

    offset: _Count  # of the file's first byte from the start of the tar
    length: _Count  # bytes
    height: _Side
    width: _Side


@dataclass(frozen=True)
class Sample:
    __pydantic_config__ = _STRICT

    key: _Key  # webdataset's `__key__`
    source: _Text  # the image's name in its source folder, for reports
    shard: _Count  # position in `Index.shards`
    members: dict[str, Member]  # suffix ("hr.png", "lr4.png") -> place

    def member(self, role: str) -> Member | None:
        """The member of a role ("hr", "lr4", "a"), None when the sample has none."""
        return next((member for suffix, member in self.members.items() if role_of(suffix) == role), None)


@dataclass(frozen=True)
class Shard:
    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")]
    length: _Count  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Index:
    __pydantic_config__ = _STRICT

    recipe: _Name
    split: _Name  # "train", "test", ... or "all"
    kind: Kind
    scales: tuple[Annotated[int, Field(ge=1, lt=1 << 63)], ...]  # of the down-sampled images, () for other kinds
    licence: _Text
    origin: _Text
    shards: tuple[Shard, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[_Text, ...] = ()  # sources left out under `--on-error skip`
    notes: dict[str, Any] = field(default_factory=dict)  # the packer's versions and settings

    @property
    def lr(self) -> str | None:
        """How its LR images were made: of `LR_RULES`, or what a later version calls it; None without LR images.

        Sets packed before there were rules have none in their notes: theirs is `exact`.
        """
        resize = self.notes.get("resize")
        if self.kind != "lr-hr" or resize is None:
            return None
        return "official" if resize == "official" else str(self.notes.get("lr", "exact"))

    def save(self, folder: Path) -> None:
        """Write `folder/index.json` atomically; its presence says that the data set is complete."""
        write_json(folder / INDEX_NAME, {"schema": SCHEMA, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class _File(Index):
    """What index.json says."""

    schema: int


_FILE: TypeAdapter[_File] = TypeAdapter(_File)


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
    """The index that `content` is, every value checked: a damaged index, or one from elsewhere, can hold anything.

    UserError when it is damaged or of another schema. Messages call it `name`.
    """
    try:
        found = parse_json(content, _FILE)
        _check_contents(found)
    except ValueError as error:
        raise UserError(f"{name}: damaged ({error!s:.200}); copy it again, or pack the data set again") from None
    if found.schema != SCHEMA:
        raise UserError(f"{name}: made by another version of hpcdistill; pack the data set again")
    return Index(**{one.name: getattr(found, one.name) for one in fields(Index)})


def _check_contents(index: Index) -> None:
    """ValueError when shards and samples do not belong together, or are listed twice, or the LRs' rule is no text."""
    rule = index.notes.get("lr", "")
    if not isinstance(rule, str) or "\0" in rule:
        raise ValueError(f"notes.lr: expected a text, got {rule!r:.60}")
    if len({shard.name for shard in index.shards}) < len(index.shards):
        raise ValueError("a shard is listed twice")
    # Two samples of one key are one to webdataset, and their images would be saved under one name.
    if len({(sample.shard, sample.key) for sample in index.samples}) < len(index.samples):
        raise ValueError("a sample is listed twice")
    for sample in index.samples:
        if sample.shard >= len(index.shards):
            raise ValueError(
                f"sample {sample.key!a:.60} lies in shard {sample.shard} of {len(index.shards)}, from 0 on"
            )


def index_digest(folder: Path) -> str:
    """Hex sha256 of what the packed data set holds; part of a run's identity."""
    load_index(folder)  # a clear error for what is no index
    return hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
