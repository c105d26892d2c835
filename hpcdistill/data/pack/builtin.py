"""Built-in data sets pack themselves: a first run needs no preparation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpcdistill.console import say
from hpcdistill.data.index import INDEX_NAME
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe, recipe_names


def pack_missing(folders: Iterable[str]) -> None:
    """Pack each missing `.../<recipe>/<split>` in `folders` whose recipe ships inside an installed package."""
    for folder in map(Path, folders):
        if (folder / INDEX_NAME).exists() or folder.parent.name not in recipe_names():
            continue
        recipe = load_recipe(folder.parent.name)
        if recipe.builtin and folder.name in recipe.splits:
            say(f"{folder}: packing the built-in recipe '{recipe.name}' first")
            pack(recipe, None, folder.parent, processes=1)  # the process that trains has threads of its own
