"""The shards of a data set that is still being packed, each with a sidecar that says what went into it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hpcdistill.data.index import Member, Sample, Shard
from hpcdistill.data.pack.packed_image import PackedImage, padded
from hpcdistill.data.pack.sources import Digest
from hpcdistill.storage import parse_json, replacing, sha256_file, write_bytes


@dataclass(frozen=True)
class PackedSource:
    """What became of one source: `packed` is None for an image that was skipped."""

    position: int  # in the list of sources
    digest: Digest
    packed: PackedImage | None


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


_FINISHED: TypeAdapter[FinishedShard] = TypeAdapter(FinishedShard)


def write_shard(
    folder: Path,
    number: int,
    settings: dict[str, Any],
    max_pixels: int,
    taken: Sequence[PackedSource],
    following: Digest | None,
) -> FinishedShard:
    """Write shard `number` of `folder` and its sidecar: the packed ones of the sources `taken`, in their order."""
    path = folder / shard_name(number)
    samples = []
    with replacing(path) as temporary:
        # USTAR with every field fixed: the bytes depend on names and contents alone.
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            position = 0
            for source in taken:
                if source.packed is None:
                    continue
                key, members = f"{source.position:06d}", {}
                for suffix, content, height, width in source.packed.members:
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size, header.mode = len(content), 0o644
                    tar.addfile(header, io.BytesIO(content))
                    if suffix != "json":
                        members[suffix] = Member(position + tarfile.BLOCKSIZE, len(content), height, width)
                    position += tarfile.BLOCKSIZE + padded(len(content))
                samples.append(Sample(key, source.digest[0], number, members))
        finished = FinishedShard(
            settings=settings,
            max_pixels=max_pixels,
            shard=Shard(path.name, temporary.stat().st_size, sha256_file(temporary)),
            samples=tuple(samples),
            digests=tuple(source.digest for source in taken),
            skipped=tuple(source.digest[0] for source in taken if source.packed is None),
            following=following,
        )
        # Before the shard has its name: a shard without a sidecar is then never one of ours.
        write_sidecar(folder, finished)
    return finished


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:05d}.tar"


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
        finished = parse_json(path.read_bytes(), _FINISHED)
    except (OSError, ValueError):
        return None
    return finished if {"recipe", "split"} <= finished.settings.keys() else None
