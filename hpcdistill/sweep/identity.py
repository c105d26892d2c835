"""The identity of a run: a hash of all that its result depends on, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdistill.config import Loaded, RunConfig
from hpcdistill.data.fetch.location import digest_at
from hpcdistill.data.index import INDEX_NAME, index_digest, load_index
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.metrics.real_side import real_folders, real_side
from hpcdistill.metrics.sr_evaluation import hr_files
from hpcdistill.models.weights_file import refuse_other_kinds
from hpcdistill.settings import identity_values
from hpcdistill.storage import sha256_file


@dataclass(frozen=True)
class Identity:
    """`record` says what went into the hash; `short` (8 hex digits) names the run folder."""

    record: dict[str, Any]

    @property
    def short(self) -> str:
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:8]


def identify(loaded: Loaded) -> Identity:
    """The identity of the run that `loaded` describes. Reads the packed sets' indexes and hashes initial weights."""
    config = loaded.config
    record: dict[str, Any] = {
        "method": config.method.name,
        "values": identity_values(config),
        "version": METHODS[config.method.name].version,
        "data": [digest_at(place) for place in config.data.train],
    }
    if selected := selected_set(config):
        folder = Path(config.data.eval[selected])
        record["selection"] = test_set_digest(folder)
        if real := _real_digests(folder, config):
            record["real"] = real
    if config.init:
        record["init"] = {name: sha256_file(weights_file(Path(path), name)) for name, path in config.init.items()}
    if loaded.teacher and config.teacher:
        record["teacher"] = [identify(loaded.teacher).short, config.teacher.checkpoint]
    return Identity(record)


def run_folder(loaded: Loaded) -> Path:
    """`runs/<name>-<8 hex>`; an existing run of the same identity under another name is found and used."""
    runs, short = Path(loaded.config.runs), identify(loaded).short
    wanted = runs / f"{loaded.config.name}-{short}"
    if wanted.is_dir():
        return wanted
    same = sorted(runs.glob(f"*-{short}"))
    return same[0] if same else wanted


def of_another_length(loaded: Loaded, identity: Identity) -> list[Path]:
    """Folders of runs of this name that differ from the run in nothing but their length, the newest last.

    A teacher may be of another length, too: what a command line says of steps, it says to both.
    """
    config = loaded.config
    teachers: list[Any] = [None]
    if loaded.teacher and config.teacher:
        own = identify(loaded.teacher)
        shorts = [own.short, *(folder.name[-8:] for folder in of_another_length(loaded.teacher, own))]
        teachers = [[short, config.teacher.checkpoint] for short in shorts]
    wanted = _without_length(json.loads(json.dumps(identity.record)))
    found = []
    for file in Path(config.runs).glob(f"{config.name}-{'[0-9a-f]' * 8}/environment.json"):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))["identity"]
            if record.get("teacher") in teachers and _without_length(record) == wanted:
                found.append((file.stat().st_mtime, file.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # whoever asks for that run is told what is wrong with it
    return [folder for _, folder in sorted(found)]


def _without_length(record: dict[str, Any]) -> dict[str, Any]:
    """The identity's record without what says how long the run is, and without its teacher."""
    values = dict(record["values"])
    train = {key: value for key, value in values.pop("train", {}).items() if key not in ("steps", "epochs")}
    rest = {key: value for key, value in record.items() if key not in ("short", "teacher", "values")}
    return rest | {"values": values | ({"train": train} if train else {})}


def selected_set(config: RunConfig) -> str | None:
    """The test set whose metric chooses the best weights; None when nothing is evaluated."""
    names = list(config.data.eval)
    if config.eval.select is not None and config.eval.select not in names:
        raise UserError(f"eval.select: '{config.eval.select}' is not one of data.eval ({', '.join(names) or 'empty'})")
    return config.eval.select or (names[0] if names else None)


def test_set_digest(folder: Path) -> str:
    """Digest of a packed set's index, or of a plain folder's file names and contents."""
    if (folder / INDEX_NAME).is_file():
        return index_digest(folder)
    listing = [(path.name, sha256_file(path)) for path in hr_files(folder)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _real_digests(folder: Path, config: RunConfig) -> list[str]:
    """Digests of the training images that FID compares with besides the test set's (it chooses the best weights)."""
    if not (folder / INDEX_NAME).is_file() or (kind := load_index(folder).kind) == "lr-hr":
        return []
    try:
        folders = real_folders(folder, real_side(kind, config.eval.real), config.data.train)
    except UserError:  # an evaluator that needs these images says so itself
        return []
    return [index_digest(other) for other in folders if other != folder]


def weights_file(path: Path, generator: str) -> Path:
    """A generator's weights: `path` itself, or the last ones of the run folder `path`."""
    file = path / "generators" / "last" / f"{generator}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"init.{generator}: {file} does not exist; give a .safetensors file or a finished run's folder")
    refuse_other_kinds(file)
    return file
