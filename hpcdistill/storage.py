"""Paths as users write them, and files that are whole or absent: written aside, synced, then renamed.

And our own JSON read back: disks, copies and editors damage it, so what it says is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hpcdistill.errors import UserError

if TYPE_CHECKING:  # status, which checks with functions, would take twice as long to start
    from pydantic import TypeAdapter

T = TypeVar("T")
CLONE = Path(__file__).resolve().parents[1]  # that hpcdistill is used from


class Damaged(UserError):
    """A file of ours that is not what was written there: one line with the file, `why` and the remedy."""

    def __init__(self, path: Path, why: str, remedy: str) -> None:
        self.why = " ".join(why.split())
        super().__init__(f"{path}: damaged ({self.why:.200}); {remedy}")


def user_path(text: str | os.PathLike[str], name: str = "") -> Path:
    """The path that a user has written on a command line, in a file or in the environment; `~` is their home folder.

    A shell expands `~` only where a word begins with it; taken as it is, `runs=~/x` would make a folder named `~`.
    `name` is what messages call the setting. UserError for an empty text, a NUL character, a home that there is not.
    """
    return Path(user_place(os.fspath(text), name))


def user_place(text: str, name: str = "") -> str:
    """As `user_path` for what may be an address too; without a `~` at its beginning `text` stays as it is."""
    called = f"{name} {text!a}".strip()
    if not text:
        raise UserError(f"{name.removesuffix(':') or 'a path'}: is empty; name a file or folder")
    if "\0" in text:
        raise UserError(f"{called}: has a NUL character, which no path may have; write it again")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path would lose a slash at the end
    if expanded.startswith("~"):
        raise UserError(f"{called}: there is no such home folder; write the whole path, or ./{text} for that very name")
    return expanded


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure removed."""
    # Of the thread, not the process: runs side by side may write one file at once (features of real images, say).
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        # write and fsync do not say which file the disk had no room for; of the temporary one no user knows.
        if error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
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


def read_json(path: Path, kind: TypeAdapter[T] | Callable[[Any], T], remedy: str) -> T:
    """The JSON in a file of ours, as `parse_json` takes it: Damaged when it is not. OSErrors are passed on."""
    try:
        return parse_json(path.read_bytes(), kind)
    except ValueError as error:
        raise Damaged(path, str(error), remedy) from None


def parse_json(content: bytes, kind: TypeAdapter[T] | Callable[[Any], T]) -> T:
    """The JSON value that `content` (UTF-8) is; ValueError, with a few words, when it is none or not of this `kind`.

    `kind` is a type, taken strictly, or a function that returns the value it is given or raises ValueError.
    """
    try:
        value = json.loads(content.decode())
        if not callable(kind):
            return kind.validate_json(content, strict=True)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return kind(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        faults = getattr(error, "errors", None)  # of pydantic's ValidationError
        raise ValueError(_described(faults(include_url=False)[0]) if faults else str(error)) from None


def json_object(value: Any) -> dict[str, Any]:
    """A `kind` for `parse_json`: any JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r:.60}")
    return value


def json_texts(value: Any) -> dict[str, str]:
    """A `kind` for `parse_json`: an object of texts."""
    for key, text in json_object(value).items():
        if not isinstance(text, str):
            raise ValueError(f"{key}: expected a text, got {text!r:.60}")
    return json_object(value)


def _described(fault: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    what: str = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
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
