"""Files that are whole or absent: written under a temporary name, synced, then renamed.

And our own JSON read back: disks, copies and editors damage it, so what it says is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hpcdistill.errors import UserError

T = TypeVar("T")
JSON_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class Damaged(UserError):
    """A file of ours that is not what was written there: one line with the file, `why` and the remedy."""

    def __init__(self, path: Path, why: str, remedy: str) -> None:
        self.why = " ".join(why.split())
        super().__init__(f"{path}: damaged ({self.why:.200}); {remedy}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # write and fsync do not say which file the disk had no room for
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (UTF-8, sorted as given) through `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, kind: TypeAdapter[T], remedy: str) -> T:
    """The JSON in a file of ours, of the type `kind`: Damaged when it is anything else. OSErrors are passed on."""
    try:
        return parse_json(path.read_bytes(), kind)
    except ValueError as error:
        raise Damaged(path, str(error), remedy) from None


def parse_json(content: bytes, kind: TypeAdapter[T]) -> T:
    """The JSON value that `content` is; ValueError, with a few words, when it is none or not strictly a `kind`."""
    try:
        json.loads(content)  # for its words: they say what is missing, and where
        return kind.validate_json(content, strict=True)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from None


def parse_yaml(text: str, loader: Any = None) -> Any:
    """The value of a YAML file, by `loader` (default: the safe one); yaml.YAMLError also for what has no end."""
    import yaml  # not for those who read JSON alone

    try:
        value = yaml.load(text, Loader=loader or yaml.SafeLoader)
        endless = _holds_itself(value, set(), set())
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    if endless:
        raise yaml.YAMLError("an alias (*name) stands inside what it names; write it out")
    return value


def _holds_itself(value: Any, above: set[int], seen: set[int]) -> bool:
    """Whether a list or mapping is inside itself; `above` are those that it is in, `seen` those without such a loop."""
    if not isinstance(value, dict | list | tuple) or id(value) in seen:
        return False
    if id(value) in above:
        return True
    above.add(id(value))
    inside = value.values() if isinstance(value, dict) else value
    loops = any(_holds_itself(item, above, seen) for item in inside)
    above.remove(id(value))
    seen.add(id(value))
    return loops


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"])
    what = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if fault["type"] == "missing":
        what = "missing"
    elif fault["type"] not in ("value_error", "json_invalid"):
        what += f", got {fault['input']!r:.60}"
    return f"{key}: {what}" if key else what


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
