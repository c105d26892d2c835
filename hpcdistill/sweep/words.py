"""The words of a sweep's command line, told apart for every command alike: grids, and what lies over every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import user_path
from hpcdistill.sweep.grid_file import GridFile
from hpcdistill.yaml_values import load_yaml

SUFFIXES = (".yaml", ".yml")
# The top-level keys of a run's configuration: config.RunConfig's, which would load torch, and `extends`.
OF_A_RUN = ("name", "seed", "method", "teacher", "teachers", "init", "data", "train", "eval", "runs", "extends")


@dataclass(frozen=True)
class Words:
    """What was named, each in the order of the command line."""

    grids: tuple[str, ...]  # names, or files
    overrides: tuple[str, ...]  # key=value, and overlay files


def sort_words(words: Sequence[str]) -> Words:
    """`words` as grids and overrides. UserError, in one line, for a YAML file that could be both or is neither."""
    over = {word for word in words if ("=" in word and not user_path(word).is_file()) or is_overlay(user_path(word))}
    return Words(tuple(word for word in words if word not in over), tuple(word for word in words if word in over))


def is_overlay(file: Path) -> bool:
    """Whether `file` holds values of runs, and not a grid: by its keys, wherever it lies.

    What is no YAML file of keys is left to the reader of grids, which says what is wrong with it.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        return False
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or not values:
        return False
    keys = [str(key) for key in values]
    of_a_grid, of_a_run = ([key for key in keys if key in known] for known in (GridFile.model_fields, OF_A_RUN))
    if of_a_grid and of_a_run:
        raise UserError(
            f"{file}: {of_a_run[0]}: is a key of a run, {of_a_grid[0]} one of a grid; make two files of it, or put "
            f"what the grid's runs share under `set:` ({of_a_run[0]}.KEY=VALUE)"
        )
    if not of_a_grid and not of_a_run:
        raise UserError(
            f"{file}: {keys[0]}: no key of a grid or of a run; {nearest(keys[0], [*GridFile.model_fields, *OF_A_RUN])}"
        )
    return bool(of_a_run)
