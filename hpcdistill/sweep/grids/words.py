"""The words of a sweep's command line, told apart for every command alike: grids, and what lies over every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpcdistill.sweep.grids.grid import GRIDS
from hpcdistill.sweep.grids.grid_file import GridFile

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Words:
    """What was named, each in the order of the command line."""

    grids: tuple[str, ...]  # names, or files; `grid.grid_file` finds them
    overrides: tuple[str, ...]  # key=value, and overlay files


def sort_words(words: Sequence[str]) -> Words:
    """`words` as grids and overrides: a YAML file without any of a grid's keys is an overlay."""
    over = [word for word in words if _is_assignment(word) or is_overlay(Path(word))]
    return Words(tuple(word for word in words if word not in over), tuple(over))


def is_overlay(file: Path) -> bool:
    """Whether `file` holds values of runs, and not a grid. What cannot be read is left to the reader of grids."""
    if file.suffix not in SUFFIXES or not file.is_file() or file.parent == GRIDS:
        return False
    try:
        values = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and bool(values) and not set(map(str, values)) & set(GridFile.model_fields)


def _is_assignment(word: str) -> bool:
    return "=" in word and not Path(word).is_file()
