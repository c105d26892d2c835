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
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hpcdistill.errors import UserError
from hpcdistill.storage import write_json

SCHEMA = 1
INDEX_NAME = "index.json"

Kind = Literal["lr-hr", "paired", "unpaired"]
LR_RULES = {  # how the LR images of a set were made; the first three are `ops.downsampling.ResizeRule`
    "newer": "MATLAB's imresize as of about 2018: 8 bits after each pass, mirrored at the border",
    "older": "MATLAB's imresize as of 2015: 8 bits after each pass, the last pixel repeated at the border",
    "exact": "MATLAB's kernel, rounded once at the end: how this package packed before",
    "official": "files that came with the set",
}

# What an index may say before anything is read or written by it: types, ranges, and names that stay in the folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a recipe or split; becomes part of a folder's name
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")
_KEY = re.compile(r"[^./\\\0\ud800-\udfff][^/\\\0\ud800-\udfff]*")  # names a file where enlarged images are saved
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # can be neither printed nor part of a path
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_PIXELS = 1 << 31  # of a side


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
        why = _fault(index)
        if why is None:
            return index
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
    raise UserError(f"{name}: damaged ({why}); copy it again, or pack the data set again")


def index_digest(folder: Path) -> str:
    """Hex sha256 of what the packed data set holds; part of a run's identity."""
    load_index(folder)  # a clear error for what is no index
    return hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()


def may_be_whole(shard: Shard, samples: Iterable[Sample]) -> bool:
    """Whether the values of a shard and its samples are of the right kind, as in an index."""
    return _shard_fault(shard) is None and not any(_sample_fault(sample) for sample in samples)


def _fault(index: Index) -> str | None:
    """The first value of `index` that has another type, is out of range, or is a path that leads elsewhere."""
    for key in ("recipe", "split"):
        value = getattr(index, key)
        if not (isinstance(value, str) and _NAME.fullmatch(value)):
            return f"the {key} {value!a:.60} is no name"
    if not all(_is_count(scale, 1) for scale in index.scales):
        return f"the scales {index.scales!a:.60} are no factors"
    texts = (index.licence, index.origin, *index.skipped)
    notes_fit = isinstance(index.notes, dict) and _is_text(index.notes.get("lr", ""))
    if not (all(map(_is_text, texts)) and notes_fit):
        return "the licence, the origin, what was skipped or the notes are of another kind"
    names = set()
    for shard in index.shards:
        fault = _shard_fault(shard)
        if fault:
            return fault
        if shard.name in names:
            return f"shard {shard.name!a:.60} is listed twice"
        names.add(shard.name)
    if fault := next(filter(None, (_sample_fault(sample, len(index.shards)) for sample in index.samples)), None):
        return fault
    # Two samples of one key are one to webdataset, and their images would be saved under one name.
    if len({(sample.shard, sample.key) for sample in index.samples}) < len(index.samples):
        return "a sample is listed twice"
    return None


def _shard_fault(shard: Shard) -> str | None:
    if not (isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name)):
        return f"the shard name {shard.name!a:.60} is no file name ending in .tar"
    if not _is_count(shard.length):
        return f"{shard.name}: the length {shard.length!a:.60} is no number of bytes"
    if not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
        return f"{shard.name}: {shard.sha256!a:.60} is no sha256"
    return None


def _sample_fault(sample: Sample, shards: int | None = None) -> str | None:
    if not (isinstance(sample.key, str) and _KEY.fullmatch(sample.key) and _is_text(sample.source)):
        return f"the sample {sample.key!a:.60} of {sample.source!a:.60} has no names"
    if not _is_count(sample.shard):
        return f"sample {sample.key!a:.60}: its shard {sample.shard!a:.60} is no number"
    if shards is not None and sample.shard >= shards:
        return f"sample {sample.key!a:.60}: it lies in shard {sample.shard} of {shards}, counted from 0"
    for suffix, member in sample.members.items():
        place, size = (member.offset, member.length), (member.height, member.width)
        if not all(map(_is_count, place)) or not all(_is_count(side, 1) and side < _MOST_PIXELS for side in size):
            return f"{sample.key!a:.60} {suffix!a:.60}: the place {place!a:.60} or size {size!a:.60} is no such thing"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _NO_TEXT.search(value)


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63
