"""Files that should hold a network's weights: which one of a run is meant, and what one is that holds none.

A kind is told by the first bytes, whatever the file is called; nothing is unpickled. Nothing here imports torch.
"""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path

from hpcdistill.errors import UserError, nearest
from hpcdistill.metrics.config import BACKWARDS

CARD_WEIGHTS = "model.safetensors"  # in a folder that is published: `deploy.card`
PYTORCH = "a PyTorch checkpoint"
_READS = (
    "weights here are .safetensors files. `hpcdistill convert {path} --out NAME.safetensors` makes one of a "
    "published generator; others: docs/training.md, 'Weights from elsewhere'"
)
_SAFETENSORS = re.compile(rb".{8}\{", re.DOTALL)  # the length of the header, any number, and the header
_KINDS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"version https://git-lfs\."), "a Git LFS pointer, not the file itself: `git lfs pull` fetches that"),
    (re.compile(rb"(\.\./|\.git/)*(/annex/objects/|annex/objects/)"), "a git-annex pointer, not the file itself"),
    (re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE), "a web page: the download went wrong"),
    (re.compile(rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x3a)"), "an ONNX model, of which no weights are read here"),
    (re.compile(rb"\x89HDF\r\n"), "an HDF5 file (of Keras, say), which is not read here"),
    (re.compile(rb"\x1f\x8b|\xfd7zXZ\x00|BZh[1-9]"), "a compressed file: unpack it first"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM"), "a picture"),
)


def kind_of(path: Path) -> str | None:
    """What the file `path` is, when it is certainly no .safetensors file; None for one, or where nobody can tell."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "an empty one: the copy or the download went wrong"
    if _SAFETENSORS.match(start):
        return None
    if start.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    # Any pickle of protocol 2 or later: who publishes weights as one has had PyTorch write it, or nearly so.
    if re.match(rb"\x80[\x02-\x05]", start):
        return PYTORCH
    return next((kind for pattern, kind in _KINDS if pattern.match(start)), None)


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a .safetensors file does."""
    with open(path, "rb") as file:
        return _SAFETENSORS.match(file.read(64)) is not None


def refuse_other_kinds(path: Path) -> None:
    """UserError, with what to do, for a file that is certainly no .safetensors file."""
    kind = kind_of(path)
    if kind == PYTORCH:
        raise UserError(f"{path}: is {kind}; {_READS.format(path=shlex.quote(str(path)))}")
    if kind:
        what = "a .safetensors file that hpcdistill saved, or a run folder"
        raise UserError(f"{path}: not a readable safetensors file but {kind}; give {what}")


def generator_file(model: Path, which: str = "best", name: str | None = None) -> Path:
    """The .safetensors file that `model` stands for: itself, or RUN/generators/<which>/<name>.safetensors.

    Of a folder that `hpcdistill card` made it is CARD_WEIGHTS. Without a name a run's student is meant, or its only
    network, or the only one that translates a to b. Raises UserError when there is no such file.
    """
    if not model.is_dir():
        if not model.exists():
            raise UserError(f"{model}: no such run folder or checkpoint; train one with `hpcdistill train`")
        if name is not None:
            raise UserError(f"--generator {name}: {model} is one network's file; leave --generator out")
        return model
    if (model / CARD_WEIGHTS).is_file() and not (model / "generators").is_dir():
        if name is not None:
            raise UserError(f"--generator {name}: {model} holds one network; leave --generator out")
        return model / CARD_WEIGHTS
    folder = model / "generators" / which
    files = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    if not files:
        other = "last" if which == "best" else "best"
        if any((model / "generators" / other).glob("*.safetensors")):
            raise UserError(f"{model}: has no {which} weights yet; use --which {other}, or train it further")
        if (model / "config.yaml").is_file():
            raise UserError(f"{model}: has no saved generator yet; train it until its first evaluation or its end")
        if (model / "manifest.json").is_file():
            raise UserError(f"{model}: is a training checkpoint; name its run folder, {model.parent.parent}")
        raise UserError(f"{model}: is not a run folder (no generators/); name a run folder or a .safetensors file")
    if name is None:
        forward = [stem for stem in files if not stem.endswith(BACKWARDS)]
        name = forward[0] if len(forward) == 1 else next(iter(files)) if len(files) == 1 else "student"
        if name not in files:
            raise UserError(f"{folder}: has several networks; choose one with --generator: {', '.join(files)}")
    if name not in files:
        raise UserError(f"--generator {name}: not in {folder}; {nearest(name, files)}")
    return files[name]


def chosen_file(model: Path) -> Path:
    """The file of the network that `model` stands for: itself or, of a run folder, `generator_file` of its best
    weights, else of its last.
    """
    rated = not model.is_dir() or any((model / "generators" / "best").glob("*.safetensors"))
    return generator_file(model, "best" if rated else "last")


def _of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip file (PyTorch checkpoints are such): copy or fetch it again"
    if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in names):
        return "a TorchScript program, of which no weights are read here"
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return PYTORCH
    return "a zip file: unpack it first"
