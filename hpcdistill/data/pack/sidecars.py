"""Sidecars: what went into each finished shard of a data set that is still being packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdistill.data.index import Member, Sample, Shard, may_be_whole
from hpcdistill.data.pack.sources import Source
from hpcdistill.storage import sha256_file, write_bytes

Digest = tuple[str, int, str]  # a source's name, length and sha256
FileDigest = tuple[str, int, str]  # role, length and sha256 of one of its files


@dataclass(frozen=True)
class FinishedShard:
    """One shard and all that its bytes depend on."""

    settings: dict[str, Any]  # of the packer
    max_pixels: int  # matters only for what was skipped
    shard: Shard
    samples: tuple[Sample, ...]
    digests: tuple[Digest, ...]  # of every source looked at since the shard before, skipped ones too
    skipped: tuple[str, ...]
    following: Digest | None  # the next image that was packed, which did not fit; None: the list ended here


def digest(source: Source) -> Digest:
    """Name, length and sha256 of a source; of one that cannot be read, which may be skipped, the name alone."""
    try:
        return joined(source.name, [(role, path.stat().st_size, sha256_file(path)) for role, path in source.files])
    except OSError:
        return source.name, -1, ""


def joined(name: str, files: Sequence[FileDigest]) -> Digest:
    """The digest of a source from those of its files: of several, the total length and a sha256 over the list."""
    if len(files) == 1:
        _, length, sha256 = files[0]
        return name, length, sha256
    listing = json.dumps(files).encode()
    return name, sum(length for _, length, _ in files), hashlib.sha256(listing).hexdigest()


def write_sidecar(folder: Path, finished: FinishedShard) -> None:
    """Write the sidecar of a shard atomically."""
    # Neither indented nor through `asdict`: a shard of small images would take half as long as its images.
    content = json.dumps(vars(finished), default=vars, ensure_ascii=False)
    write_bytes(sidecar_path(folder, finished.shard.name), content.encode())


def read_sidecars(folder: Path) -> dict[str, FinishedShard | None]:
    """Shard name -> sidecar, in order; None for one that is damaged or of another version."""
    return {f"{path.stem[1:]}.tar": _read(path) for path in sorted(folder.glob(".shard-*.json"))}


def remove_sidecars(folder: Path) -> None:
    """Remove all sidecars: they have served once the index is written."""
    remove(folder.glob(".shard-*.json"))


def sidecar_path(folder: Path, shard_name: str) -> Path:
    """Where the sidecar of a shard lies; hidden, so that no glob for data finds it."""
    return folder / f".{Path(shard_name).stem}.json"


def remove(paths: Iterable[Path]) -> None:
    """Remove files, whether or not they are there."""
    for path in paths:
        path.unlink(missing_ok=True)


def _read(path: Path) -> FinishedShard | None:
    try:
        raw = json.loads(path.read_bytes())
        finished = FinishedShard(
            settings={"recipe": raw["settings"]["recipe"], "split": raw["settings"]["split"], **raw["settings"]},
            max_pixels=int(raw["max_pixels"]),
            shard=Shard(**raw["shard"]),
            samples=tuple(
                Sample(**{**sample, "members": {name: Member(**member) for name, member in sample["members"].items()}})
                for sample in raw["samples"]
            ),
            digests=tuple(map(_digest, raw["digests"])),
            skipped=tuple(raw["skipped"]),
            following=_digest(raw["following"]) if raw["following"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # The shard's name becomes a path, and the samples go into the index as they are.
    return finished if may_be_whole(finished.shard, finished.samples) else None


def _digest(raw: Any) -> Digest:
    name, length, sha256 = raw
    return str(name), int(length), str(sha256)
