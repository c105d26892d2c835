"""Checkpoints that are whole or absent, in one layout whatever the number of ranks.

`step-00001000/` holds safetensors files (`networks/<group>`, `optimizers/<group>`, `averages/<generator>`,
`memory/<name>`, and `best/<generator>`, the best saved so far), `state.json`, and `manifest.json` with every file's
sha256, written last. The folder is filled under a temporary name, synced, read back, compared and renamed; the one
before it goes only afterwards, and by way of a rename too. Nothing is pickled.

Names: `step-*` counts; `.step-*.replaced` is what a newer save of the same step takes the place of, and counts while
that one is missing or damaged; `.step-*.tmp` never counts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hpcdistill.console import warn
from hpcdistill.errors import UserError
from hpcdistill.storage import json_object, json_texts, parse_json, sync_file, sync_folder

MANIFEST = "manifest.json"
LONGEST_SAVE_S = 10.0  # that an error waits for a checkpoint which is being saved
_NAME = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.replaced")
_FILE = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*/)?[A-Za-z0-9_][\w.+-]*")  # nothing outside the checkpoint
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
# These say that the checkpoint is damaged. Others (no permission, too many open files, a stale handle) say nothing
# about it: to pass over a good checkpoint because of them would lose it.
_DAMAGE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ELOOP, errno.EINVAL}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # "networks/student" -> name -> tensor, on the CPU
    files: dict[str, bytes]  # every file by name, as it is

    def part(self, prefix: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of the files whose names begin with `prefix`."""
        return {name: tensors for name, tensors in self.tensors.items() if name.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay. One process writes them."""

    def __init__(self, folder: Path, keep: int = 2, confirm: Callable[[], None] = lambda: None) -> None:
        """`confirm` raises when another process has taken the run over: it is asked before anything counts or goes."""
        self.folder = folder
        self.keep = keep
        self.confirm = confirm
        self._damaged: set[Path] = set()
        self._saving: Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the checkpoint of `step`; `files` go in as they are.

        An OSError (a full disk, say, or a file that reads back differently) leaves the earlier ones as they were.
        """
        try:
            self.wait()
        except OSError as error:  # the disk may have room again, and this one is newer
            warn(f"{error.filename}: was not written ({error.strerror}); trying again")
        self._save(step, tensors, _encoded(step, state), files or {})

    def start(
        self,
        step: int,
        tensors: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """`save` in a thread, after the one before has ended. Nobody may change `tensors` until `wait` returns.

        What goes wrong is raised by the next `start`, `save` or `wait`.
        """
        self.wait()
        encoded = _encoded(step, state)  # now: the caller goes on changing it

        def work() -> None:
            try:
                self._save(step, tensors, encoded, files or {})
            except Exception as error:  # whatever it is, it belongs to the thread that waits
                self._error = error

        self._saving = Thread(target=work, name=f"checkpoint of step {step}")
        self._saving.start()

    def wait(self) -> None:
        """Return when no save is under way; raise what the last one raised, once."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def closing(self, ranks: int) -> Iterator[None]:
        """`wait` at the end; after an error not for long where there are other ranks, which wait for its words."""
        try:
            yield
        except BaseException:
            waiting = Thread(target=self._wait_quietly, daemon=True)
            waiting.start()
            waiting.join(LONGEST_SAVE_S if ranks > 1 else None)
            raise
        self.wait()

    def _wait_quietly(self) -> None:
        with contextlib.suppress(UserError, OSError):  # an error that came before it counts
            self.wait()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose digests hold; a damaged one is named and the one before it is taken.

        For rank 0, which decides; the others then `read` the same step. Raises OSError where it cannot be known
        whether a checkpoint is damaged (no permission, say).
        """
        folders = self._folders()
        for path, older in zip(folders, [*folders, None][1:], strict=True):
            try:
                return self._read(path)
            except _UNREADABLE as error:
                _raise_unless_damage(error)
                self._damaged.add(path)
                instead = f"taking {older.name}" if older else "no checkpoint is whole: starting again from step 0"
                warn(f"{path}: damaged ({type(error).__name__}: {error}); {instead}")
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, which another rank has found whole; UserError when this one cannot read it."""
        reason = "it is not there"
        for path in (path for path in self._folders() if _step(path) == step):
            try:
                return self._read(path)
            except _UNREADABLE as error:
                reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{self._path(step)}: rank 0 has read this checkpoint, this rank cannot ({reason}); "
            "let every host see the same `runs` folder, then run the same command again"
        )

    def _save(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], state: bytes, files: Mapping[str, bytes]
    ) -> None:
        target = self._path(step)
        temporary = self._temporary(target)
        try:
            self.confirm()  # before the folder of a run that was removed is made again
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            temporary.mkdir()
            self._fill(temporary, tensors, state, files)
            self.confirm()  # it may have been taken over since this was begun
            self._put(temporary, target)
            self.confirm()
            self._prune(target)
        except OSError as error:
            error.filename = error.filename or str(target)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fill(
        self, folder: Path, tensors: Mapping[str, dict[str, Tensor]], state: bytes, files: Mapping[str, bytes]
    ) -> None:
        """Write and sync everything, then read it back and compare."""
        digests: dict[str, str] = {}

        def write(name: str, content: bytes) -> None:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            sync_file(path)
            digests[name] = hashlib.sha256(content).hexdigest()

        for name, values in tensors.items():  # one at a time: only one is in memory twice
            write(f"{name}.safetensors", save_tensors(values))
        for name, content in files.items():
            write(name, content)
        write("state.json", state)
        write(MANIFEST, json.dumps(digests, indent=1).encode())
        for inner in sorted({(folder / name).parent for name in digests}):
            sync_folder(inner)
        for name, digest in digests.items():
            if _digest_on_disk(folder / name) != digest:
                raise OSError(errno.EIO, "reads back differently from what was written", str(folder / name))

    def _put(self, temporary: Path, target: Path) -> None:
        """Give a filled folder its name; of two of the same step one is there at every moment."""
        replaced = self.folder / f".{target.name}.replaced"
        if again := target.exists():  # the same step again, after a resume
            target.rename(replaced)
        temporary.rename(target)  # when this fails the other one is found by its new name, until the next save
        sync_folder(self.folder)
        if again:
            self._remove(replaced)

    def _prune(self, target: Path) -> None:
        """Keep `target` and the whole ones before it."""
        self._damaged.discard(target)
        if not target.exists():  # whoever removed it knows better what counts
            return
        # Later ones than this are damaged, or the run would have gone on from there: they count for nothing.
        good = [path for path in self._folders() if _step(path) <= _step(target) and path not in self._damaged]
        for old in self._folders():
            if old not in good[: self.keep]:
                self._remove(old)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint: by its name first, so that half of one is never taken for a damaged one."""
        trash = self._temporary(path)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)  # what stays (somebody reads it over NFS) goes at a later save

    def _tidy(self) -> None:
        """Remove what a killed save left behind; one killed while replacing a checkpoint is undone or completed."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for replaced in (path for path in self._folders() if path.name.startswith(".")):
            target = self._path(_step(replaced))
            if target.exists():
                if self._is_intact(target) or not self._is_intact(replaced):
                    self._remove(replaced)
                    continue
                self._remove(target)
            replaced.rename(target)
            (self._damaged.add if replaced in self._damaged else self._damaged.discard)(target)

    def _is_intact(self, path: Path) -> bool:
        try:
            self._read(path)
        except _UNREADABLE as error:
            _raise_unless_damage(error)
            return False
        return True

    def _read(self, path: Path) -> Checkpoint:
        digests = parse_json((path / MANIFEST).read_bytes(), json_texts)
        for name in digests:
            if not _FILE.fullmatch(name):
                raise ValueError(f"{MANIFEST}: {name!r:.60} is no file of a checkpoint")
        contents = {name: (path / name).read_bytes() for name in digests}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != digests[name]:
                raise ValueError(f"{name} does not have the digest that {MANIFEST} gives")
        for file in path.rglob("*.safetensors"):
            if (name := str(file.relative_to(path))) not in digests:
                raise ValueError(f"{name} is not in {MANIFEST}")
        state = parse_json(contents["state.json"], json_object)
        if state["step"] != _step(path):
            raise ValueError(f"state.json is of step {state['step']}")
        tensors = {
            name.removesuffix(".safetensors"): load_tensors(content)
            for name, content in contents.items()
            if name.endswith(".safetensors")
        }
        return Checkpoint(path, state["step"], state, tensors, contents)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first; of two of the same step the one that was replaced is the second."""
        found = (path for path in self.folder.glob("*step-*") if _NAME.fullmatch(path.name))
        return sorted(found, key=lambda path: (-_step(path), path.name.startswith(".")))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self, path: Path) -> Path:
        return self.folder / f".{path.name.removeprefix('.')}.{os.getpid()}.tmp"


def _raise_unless_damage(error: Exception) -> None:
    """Pass on what says nothing about the checkpoint itself."""
    if isinstance(error, OSError) and error.errno not in _DAMAGE:
        raise error


def _encoded(step: int, state: Mapping[str, Any]) -> bytes:
    return json.dumps({"step": step, **state}, indent=1).encode()


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1] or match[2])


def _digest_on_disk(path: Path) -> str:
    """The sha256 of what a synced file holds on the disk, not in the page cache, where the system lets us."""
    with path.open("rb") as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
