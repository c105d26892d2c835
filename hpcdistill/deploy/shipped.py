"""The students that are shipped, and where what a user calls MODEL lies."""

from __future__ import annotations

from pathlib import Path

from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import user_path

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
PREFIX = "pretrained:"
DEFAULT = "pretrained:x4"


def model_path(text: str) -> Path:
    """The shipped file of `pretrained:NAME`; anything else is a path of the user's, which need not exist."""
    return pretrained_file(text) if text.startswith(PREFIX) else user_path(text)


def pretrained_file(name: str) -> Path:
    """The file of `pretrained:NAME`; x2, x3 and x4 are the students that are shipped."""
    wanted = name.removeprefix(PREFIX)
    files = {file.stem: file for file in sorted(PRETRAINED.glob("*.safetensors"))}
    short = {stem.split("-")[-3] if stem.count("-") >= 3 else stem: file for stem, file in files.items()}
    found = files.get(wanted) or short.get(wanted)
    if found is None:
        raise UserError(f"{name}: no such weights are shipped; {nearest(wanted, [*short, *files])}")
    return found
