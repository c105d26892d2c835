"""From a recipe to its images: download, check, unpack; or take them from a local archive or folder."""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from hpcdistill.console import say
from hpcdistill.data.fetch.download import Download, check_file, fetch_file
from hpcdistill.data.fetch.unpacking import unpack
from hpcdistill.data.images import read_rgb
from hpcdistill.data.index import INDEX_NAME, load_index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import RECIPES, UNSPLIT, Recipe, load_recipe, recipe_names
from hpcdistill.data.pack.sources import find_sources
from hpcdistill.data.places import downloads_folder, sources_folder
from hpcdistill.errors import UserError, nearest
from hpcdistill.ops.downsampling import ResizeRule, downsample_uint8


@dataclass(frozen=True)
class Wanted:
    """A packed set that a path names: `<out>` or, for a recipe with splits, `<out>/<split>`."""

    recipe: Recipe
    out: Path  # what `pack` is to be given


def fetch(
    recipe: Recipe,
    *,
    origin: Path | None = None,
    mirror: str | None = None,
    parts: Sequence[str] = (),
    recursive: bool = False,
) -> Path | None:
    """The folder of the recipe's images, complete; None for a recipe that ships inside a package.

    Archives go to `places.downloads_folder()`, their content to `places.sources_folder(name)`; what is there and whole
    is left alone. `origin` is an archive, a folder of the archives, or a folder of the images themselves (which is
    used where it is). `mirror` is an address to try first, the file's name is added to it. `parts` names optional
    downloads; `recursive` counts the images in folders below too. Raises UserError for what cannot be had, is not what
    the recipe says, or is incomplete.
    """
    for part in parts:
        if part not in recipe.parts:
            valid = nearest(part, recipe.parts) if recipe.parts else "it has none"
            raise UserError(f"the recipe {recipe.name} has no optional part '{part}'; {valid}")
    if recipe.builtin:
        if origin is not None or mirror is not None:
            raise UserError(f"the recipe {recipe.name} ships inside {recipe.builtin}; leave --from and --mirror out")
        return None
    wanted = [download for download in recipe.downloads if download.optional in (None, *parts)]
    if origin is not None:
        source = _from_origin(recipe, wanted, origin)
    else:
        if not wanted:
            raise UserError(
                f"the recipe {recipe.name} has no public address; give your copy of it with --from FILE_OR_FOLDER"
            )
        archives = [fetch_file(download, downloads_folder(), mirror=mirror) for download in wanted]
        source = _unpacked(recipe, archives)
    found = find_sources(recipe, source, official_lr="lr" in parts, recursive=recursive)
    counts = ", ".join(
        f"{len(samples)}" if split == UNSPLIT else f"{split} {len(samples)}" for split, samples in found.items()
    )
    say(f"{source}: {recipe.name}, complete ({counts}); licence: {recipe.licence}")
    return source


def obtain(
    recipe: Recipe,
    out: Path,
    *,
    origin: Path | None = None,
    mirror: str | None = None,
    parts: Sequence[str] = (),
    recursive: bool = False,
    **packing: Any,
) -> None:
    """`fetch` the recipe's images and `pack` them into `out`; with official LR images when the part `lr` is asked for.

    `packing` goes to `pack`.
    """
    source = fetch(recipe, origin=origin, mirror=mirror, parts=parts, recursive=recursive)
    pack(recipe, source, out, official_lr="lr" in parts, recursive=recursive, **packing)


def refetch(folder: Path) -> None:
    """Fetch and pack again, into the same folder, the packed set that lies damaged in `folder`."""
    index = load_index(folder)
    if not (RECIPES / f"{index.recipe}.yaml").is_file():
        raise UserError(f"{folder}: packed from '{index.recipe}', which is no recipe here; mend it with --from COPY")
    recipe = load_recipe(index.recipe)
    official = index.notes.get("resize") == "official"
    out = folder if index.split == UNSPLIT else folder.parent
    if not recipe.downloads and not recipe.builtin:
        lr = f" --lr {index.lr}" if index.lr and index.lr != "newer" else ""
        raise UserError(
            f"{folder}: the recipe {recipe.name} has no public address; mend it with --from PACKED_COPY, "
            f"or pack it again: `python shards/pack.py {recipe.name} --source IMAGES "
            f"--out {shlex.quote(str(out))}{lr} --overwrite`"
        )
    obtain(recipe, out, parts=recipe.parts if official else ())


def refetch_named(folder: Path) -> bool:
    """Fetch and pack what `folder` should hold by its name, whose index is damaged; False when no recipe gives it."""
    wanted = wanted_at(folder)
    if wanted is None or not (wanted.recipe.downloads or wanted.recipe.builtin):
        return False
    obtain(wanted.recipe, wanted.out, overwrite=True, resize=_rule_in_shards(folder))
    return True


def _rule_in_shards(folder: Path) -> ResizeRule | None:
    """The rule by which a packed set's LR images were made, found in its first readable shard; None for none of ours.

    For a set whose index is damaged: packed again by another rule it would be another set to the runs that use it.
    """
    for shard in sorted(folder.glob("shard-*.tar")):
        with suppress(tarfile.TarError, OSError, KeyError, AttributeError, UserError), tarfile.open(shard) as tar:
            key = tar.getnames()[0].partition(".")[0]
            hr, lr = (read_rgb(tar.extractfile(f"{key}.{role}.png").read(), key) for role in ("hr", "lr2"))  # type: ignore[union-attr]
            cropped = hr[: 2 * len(lr), : 2 * lr.shape[1]]
            for rule in get_args(ResizeRule):
                if np.array_equal(downsample_uint8(cropped, 2, rule), lr):
                    return cast(ResizeRule, rule)
    return None


def pack_missing(folders: Iterable[str]) -> None:
    """Pack each missing `.../<recipe>/<split>` in `folders` whose recipe ships inside an installed package.

    A first run of such a recipe needs no preparation.
    """
    for folder in map(Path, folders):
        if (folder / INDEX_NAME).exists() or folder.parent.name not in recipe_names():
            continue
        recipe = load_recipe(folder.parent.name)
        if recipe.builtin and folder.name in recipe.splits:
            say(f"{folder}: packing the built-in recipe '{recipe.name}' first")
            pack(recipe, None, folder.parent, processes=1)  # the process that trains has threads of its own


def wanted_at(folder: Path) -> Wanted | None:
    """What `folder` would hold by its name, `.../<recipe>` or `.../<recipe>/<split>`; None when no recipe gives it."""
    names = recipe_names()
    if folder.parent.name in names:
        recipe = load_recipe(folder.parent.name)
        if folder.name in recipe.splits:
            return Wanted(recipe, folder.parent)
    if folder.name in names:
        recipe = load_recipe(folder.name)
        if recipe.splits == (UNSPLIT,):
            return Wanted(recipe, folder)
    return None


def is_packed(folder: Path) -> bool:
    """True when a complete packed set lies in `folder`."""
    return (folder / INDEX_NAME).is_file()


def _from_origin(recipe: Recipe, wanted: list[Download], origin: Path) -> Path:
    """The images of a local archive, of a folder of archives, or the folder itself."""
    if not origin.exists():
        raise UserError(f"--from {origin}: there is no such file or folder")
    if origin.is_dir():
        archives = [origin / download.file for download in wanted]
        there = [archive for archive in archives if archive.is_file()]
        if not there:
            return origin
        missing = [archive.name for archive in archives if not archive.is_file()]
        if missing:
            raise UserError(f"--from {origin}: has {there[0].name}, but not {', '.join(missing)}")
    else:
        known = [download for download in wanted if download.file == origin.name]
        if len(wanted) > 1:
            names = ", ".join(download.file for download in wanted)
            raise UserError(f"--from {origin}: {recipe.name} consists of {names}; give the folder that holds them")
        wanted = known or wanted
        archives = [origin]
    for download, archive in zip(wanted, archives, strict=bool(wanted)):
        check_file(download, archive, downloads_folder())
    return _unpacked(recipe, archives)


def _unpacked(recipe: Recipe, archives: list[Path]) -> Path:
    folder = sources_folder(recipe.name)
    for archive in archives:
        unpack(archive, folder, wanted=(lambda name: name.startswith(recipe.members)) if recipe.members else None)
    return folder
