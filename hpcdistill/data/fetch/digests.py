"""sha256 of downloaded files: remembered, so that gigabytes are not hashed at every start, and recorded.

`.NAME.verified.json` holds a file's digest with the size and time it belongs to. `recorded.json` holds the digests of
files for which nobody published one: what came at the first fetch, to be compared from then on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpcdistill.data.fetch.disk import exclusive
from hpcdistill.errors import UserError
from hpcdistill.storage import sha256_file, write_json

RECORDED = "recorded.json"


def file_digest(path: Path, *, keep: bool = True) -> str:
    """Hex sha256 of `path`, from the sidecar if size and modification time are still the same.

    `keep` writes the sidecar when there is none; not for a folder that is the user's own.
    """
    state = path.stat()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        if (known["bytes"], known["mtime_ns"]) == (state.st_size, state.st_mtime_ns):
            return str(known["sha256"])
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
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise ValueError("a sha256 is not text")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"damaged ({type(error).__name__}); restore it, or remove it to have the digests recorded again"
        raise UserError(f"{path}: {problem}") from None
    return dict(entries)


def record(folder: Path, name: str, digest: Mapping[str, Any]) -> None:
    """Add {bytes, sha256, address} and today's date as `name`; an entry that is there already stays."""
    with exclusive(folder / f".{RECORDED}.lock", f"{folder / RECORDED}: another process is writing it; waiting"):
        entries = recorded(folder)
        if name not in entries:
            entries[name] = {**digest, "date": datetime.now(UTC).date().isoformat()}
            write_json(folder / RECORDED, entries)
