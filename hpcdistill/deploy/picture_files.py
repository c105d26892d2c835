"""Which pictures a command is to make of which, and where they go: never over anything that was there before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.console import warn
from hpcdistill.data.folders import SUFFIXES, entries, left_out, list_images
from hpcdistill.data.index import INDEX_NAME
from hpcdistill.data.outputs import is_ours
from hpcdistill.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """A picture, and the file that will be made of it."""

    source: Path
    out: Path


def conversions(words: Sequence[Path], out: Path) -> tuple[list[Conversion], list[str]]:
    """One for each picture that `words` (files and folders) name, below the folder `out`; all are PNG files.

    And the names of those in folders that cannot be used: links to nothing, names that are no text. A warning says why.

    A folder's folders are kept below `out`. UserError, before anything is written, for a word that names no picture,
    two pictures of one name, and a file that is in the way: an input, or one that was not written here.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    unusable: list[str] = []
    places: dict[Path, list[Path]] = {}  # a picture's name below `out`, without its suffix -> the pictures
    for word in words:
        for source in _pictures(word, out, unusable):
            below = source.relative_to(word) if word.is_dir() else Path(source.name)
            places.setdefault(below.with_suffix(""), []).append(source)
    found = []
    for below, sources in places.items():
        # a.jpg and a.png of one folder are two pictures; so they keep their suffixes.
        for source in dict.fromkeys(sources):
            name = below.name if len(sources) == 1 else source.name
            found.append(Conversion(source, out / below.with_name(f"{name}.png")))
    _check(found)
    return found, unusable


def packed_set(words: Sequence[Path]) -> Path | None:
    """The packed set that is to be translated; None for pictures. UserError for a set beside anything else.

    What is made of it has folders of its own below `out`.
    """
    found = next((word for word in words if (word / INDEX_NAME).is_file()), None)
    if found is not None and len(words) > 1:
        raise UserError(f"{found}: is a packed set; translate it by itself, as A/ and B/ in --out are its own")
    return found


def _pictures(word: Path, out: Path, unusable: list[str]) -> list[Path]:
    """The pictures that one word of the command line names; others that have such a name join `unusable`."""
    if not word.exists():
        raise UserError(f"{word}: no such picture or folder; check the path")
    if not word.is_dir():
        if word.suffix.lower() not in SUFFIXES:
            raise UserError(f"{word}: not a suffix that is read ({', '.join(SUFFIXES)}); convert it to PNG")
        if not word.is_file():
            raise UserError(f"{word}: is neither a file nor a folder; give a picture")
        return [word]
    if os.path.realpath(word) == os.path.realpath(out):
        raise UserError(f"--out {out}: is where the pictures are; name another folder, nothing is written there")
    if line := left_out(word, "name it by itself", recursive=True):
        warn(line)
    # What an earlier run has written into a folder inside is no picture of the user's.
    inside = os.path.realpath(out)
    named = [path for path in entries(word, recursive=True) if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    named = [path for path in named if not _is_below(path, inside)]
    if not named:
        list_images(word, recursive=True)  # says why
        raise UserError(f"{word}: no pictures in this folder but those in {out}; name another")
    found = []
    for path in sorted(named):
        below = str(path.relative_to(word))
        if not path.is_file():
            warn(f"skipped {path!s}: is no file, or a link to one that is not there; mend or remove it")
        elif not below.isprintable():
            warn(f"skipped {below!a} in {word}: such a name cannot be written as text; rename the file")
        else:
            found.append(path)
            continue
        unusable.append(repr(below))
    return found


def _is_below(path: Path, folder: str) -> bool:
    return os.path.realpath(path).startswith(folder + os.sep)


def _check(found: Sequence[Conversion]) -> None:
    by_out: dict[Path, Path] = {}
    inputs = {os.path.realpath(one.source) for one in found}
    for one in found:
        if one.out in by_out:
            raise UserError(
                f"{by_out[one.out]} and {one.source} would both become {one.out}; give one of them another --out"
            )
        by_out[one.out] = one.source
        if os.path.realpath(one.out) in inputs:
            raise UserError(f"{one.out}: is one of the pictures that are read; name another --out")
        if one.out.exists() and not is_ours(one.out):
            raise UserError(f"{one.out}: is there, and was not written by hpcdistill; name another --out")
