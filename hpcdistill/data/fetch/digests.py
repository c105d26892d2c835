"""sha256 of downloaded files: remembered, so that gigabytes are not hashed at every start, and recorded.

`.NAME.verified.json` holds a file's digest with the size and time it belongs to. `recorded.json` holds the digests of
files for which nobody published one: what came at the first fetch, to be compared from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter

from hpcdistill.data.fetch.disk import exclusive
from hpcdistill.storage import parse_json, read_json, sha256_file, write_json

RECORDED = "recorded.json"


@dataclass(frozen=True)
class _Verified:
    """What `.NAME.verified.json` says."""

    bytes: int
    mtime_ns: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _with_digest(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not all(isinstance(entry.get("sha256"), str) for entry in entries.values()):
        raise ValueError("a sha256 is not text")
    return entries


_VERIFIED: TypeAdapter[_Verified] = TypeAdapter(_Verified)
_RECORDED: TypeAdapter[dict[str, dict[str, Any]]] = TypeAdapter(
    Annotated[dict[str, dict[str, Any]], AfterValidator(_with_digest)]
)


def file_digest(path: Path, *, keep: bool = True) -> str:
    """Hex sha256 of `path`, from the sidecar if size and modification time are still the same.

    `keep` writes the sidecar when there is none; not for a folder that is the user's own.
    """
    state = path.stat()
    with contextlib.suppress(OSError, ValueError):
        known = parse_json(_sidecar(path).read_bytes(), _VERIFIED)
        if (known.bytes, known.mtime_ns) == (state.st_size, state.st_mtime_ns):
            return known.sha256
    digest = sha256_file(path)
    if keep:
        remember(path, digest)
    return digest


def remember(path: Path, digest: str) -> None:
    """Keep the digest of `path` as it is now; in a read-only folder it is hashed each time instead."""
    state = path.stat()
    with contextlib.suppress(OSError):
        write_json(_sidecar(path), {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest})


def _sidecar(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified.json")


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> what was recorded of it in `folder`; UserError when recorded.json is damaged."""
    path = folder / RECORDED
    try:
        return read_json(path, _RECORDED, "restore it, or remove it to have the digests recorded again")
    except FileNotFoundError:
        return {}


def record(folder: Path, name: str, digest: Mapping[str, Any]) -> None:
    """Add {bytes, sha256, address} and today's date as `name`; an entry that is there already stays."""
    with exclusive(folder / f".{RECORDED}.lock", f"{folder / RECORDED}: another process is writing it; waiting"):
        entries = recorded(folder)
        if name not in entries:
            entries[name] = {**digest, "date": datetime.now(UTC).date().isoformat()}
            write_json(folder / RECORDED, entries)
