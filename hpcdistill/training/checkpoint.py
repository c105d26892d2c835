"""Checkpoints that are whole or absent, in one layout whatever the number of ranks.

`step-00001000/` holds safetensors files (`networks/<group>`, `optimizers/<group>`, `averages/<generator>`,
`memory/<name>`, and `best/<generator>`, the best saved so far), `state.json`, and `manifest.json` with every file's
sha256, written last. The folder is filled under a temporary name, synced and renamed; the one before it goes only
afterwards. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hpcdistill.console import warn
from hpcdistill.storage import sync_file, sync_folder

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # "networks/student" -> name -> tensor, on the CPU
    files: dict[str, bytes]  # every file by name, as it is


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the checkpoint of `step`; `files` go in as they are.

        An error (a full disk, say) leaves the earlier ones as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{target.name}.{os.getpid()}.tmp"
        temporary.mkdir()
        try:
            contents = {f"{name}.safetensors": save_tensors(values) for name, values in tensors.items()}
            contents |= files or {}
            contents["state.json"] = json.dumps({"step": step, **state}, indent=1).encode()
            digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
            contents[MANIFEST] = json.dumps(digests, indent=1).encode()
            for name, content in contents.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_bytes(content)
                sync_file(temporary / name)
            for folder in {(temporary / name).parent for name in contents}:
                sync_folder(folder)
            if target.exists():  # the same step again, after a resume: replace it as a whole
                shutil.rmtree(target)
            temporary.rename(target)
            sync_folder(self.folder)
        except OSError as error:
            error.filename = error.filename or str(target)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # Later ones than this are damaged, or the run would have gone on from there: they count for nothing.
        kept = [path for path in self._folders() if path <= target][: self.keep]
        for old in self._folders():
            if old not in kept:
                shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose digests hold; a damaged one is named and the one before it is taken."""
        folders = self._folders()
        for path, older in zip(folders, [*folders, None][1:], strict=True):
            try:
                return self._read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                instead = f"taking {older.name}" if older else "no checkpoint is whole: starting again from step 0"
                warn(f"{path}: damaged ({type(error).__name__}: {error}); {instead}")
        return None

    def _read(self, path: Path) -> Checkpoint:
        digests = json.loads((path / MANIFEST).read_bytes())
        contents = {name: (path / name).read_bytes() for name in digests}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != digests[name]:
                raise ValueError(f"{name} does not have the digest that {MANIFEST} gives")
        state = json.loads(contents["state.json"])
        tensors = {
            name.removesuffix(".safetensors"): load_tensors(content)
            for name, content in contents.items()
            if name.endswith(".safetensors")
        }
        return Checkpoint(path, state["step"], state, tensors, contents)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _clean(self) -> None:
        """Remove what a killed save left behind."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
