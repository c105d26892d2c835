"""Recipes: where the images of a data set come from, how many there are, and under which licence.

A recipe is a YAML file in shards/recipes of the clone, or anybody's own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from hpcdistill.data.images import list_images
from hpcdistill.errors import UserError, nearest
from hpcdistill.settings import Section

RECIPES = Path(__file__).resolve().parents[2] / "shards" / "recipes"
UNSPLIT = "all"


class Recipe(Section):
    """One data set of single images."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="what reports and the index call the data set")
    title: str = Field(description="one line for --help")
    licence: str = Field(description="what the images may be used for")
    origin: str = Field(description="who made them")
    builtin: Literal["scikit-image"] | None = Field(None, description="a package that ships the images")
    images: int | None = Field(None, ge=1, description="the number of images there must be")
    places: tuple[tuple[str, ...], ...] = Field(
        ((".",),),
        min_length=1,
        description="where below --source the images lie: the first entry whose folders all have images is taken",
    )
    splits: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], tuple[str, ...]] = Field(
        default_factory=dict, description="split -> file names; without splits all images are packed together"
    )


@dataclass(frozen=True)
class Source:
    """One image to be packed."""

    path: Path
    name: str  # what the index calls it: its path below the source, without anything of the machine


def recipe_names() -> list[str]:
    """The recipes that come with the clone."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a YAML file; UserError when there is none or it is wrong."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file; {nearest(name, recipe_names())}")
    else:
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"no recipe '{name}'; {nearest(name, recipe_names())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a recipe; it needs the keys name, title, licence and origin")
    try:
        return Recipe(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = nearest(key, Recipe.model_fields) if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{path}: {key}: {hint}") from None


def find_sources(recipe: Recipe, source: Path | None) -> dict[str, list[Source]]:
    """The images of `recipe` by split (`UNSPLIT` when it has none), in the order they are packed in.

    Raises UserError when the folder, one of its images or the expected number of images is not there.
    """
    folders = _folders(recipe, source)
    if recipe.splits:
        found = {split: [_named(folders, name, recipe) for name in names] for split, names in recipe.splits.items()}
    elif len(folders) == 1:
        found = {UNSPLIT: [Source(path, path.name) for path in list_images(folders[0])]}
    else:
        found = {
            UNSPLIT: [Source(path, f"{folder.name}/{path.name}") for folder in folders for path in list_images(folder)]
        }
    count = sum(map(len, found.values()))
    if recipe.images is not None and count != recipe.images:
        where = " + ".join(map(str, folders))
        raise UserError(
            f"{where}: found {count} images, the recipe {recipe.name} expects {recipe.images}; "
            "complete the folder, or pack what is there with the recipe folder"
        )
    return found


def _folders(recipe: Recipe, source: Path | None) -> list[Path]:
    if recipe.builtin:
        if source is not None:
            raise UserError(f"the recipe {recipe.name} brings its images along; leave --source out")
        return [_scikit_image_folder()]
    if source is None:
        raise UserError(f"the recipe {recipe.name} needs the folder of its images: --source DIR")
    if not source.is_dir():
        list_images(source)  # says what is wrong with it
    for place in recipe.places:
        folders = [source if name == "." else source / name for name in place]
        if all(_has_images(folder) for folder in folders):
            return folders
    if recipe.places == ((".",),):
        list_images(source)
    wanted = ", or ".join(" and ".join("itself" if name == "." else name for name in place) for place in recipe.places)
    raise UserError(f"{source}: no images of {recipe.name}; expected them in the folder's {wanted}; check --source")


def _has_images(folder: Path) -> bool:
    try:
        return bool(list_images(folder))
    except UserError:
        return False


def _scikit_image_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("scikit-image is not installed; run `pip install scikit-image`")
    return Path(spec.submodule_search_locations[0]) / "data"


def _named(folders: list[Path], name: str, recipe: Recipe) -> Source:
    for folder in folders:
        if (folder / name).is_file():
            return Source(folder / name, name)
    remedy = "install scikit-image again" if recipe.builtin else "complete the folder"
    raise UserError(f"{folders[0] / name}: missing, the recipe {recipe.name} names it; {remedy}")
