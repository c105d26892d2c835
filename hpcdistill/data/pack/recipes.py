"""Recipes: where the images of a data set come from, how many there are, and under which licence.

A recipe is a YAML file in shards/recipes of the clone, or anybody's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpcdistill.data.fetch.download import Download
from hpcdistill.data.index import Kind
from hpcdistill.errors import UserError, nearest
from hpcdistill.settings import LONGEST_NAME, Section, load_section
from hpcdistill.storage import user_path
from hpcdistill.yaml_values import Word

RECIPES = Path(__file__).resolve().parents[3] / "shards" / "recipes"
UNSPLIT = "all"
RESERVED = ("downloads", "sources", "weights", "features")  # see data.places
# Recipes for the images of one's own, by kind.
OWN: dict[Kind, str] = {"lr-hr": "folder", "paired": "paired", "unpaired": "unpaired"}

Split = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=LONGEST_NAME)]
Role = Literal["hr", "lr2", "lr3", "lr4", "a", "b", "ab"]
_Names = Annotated[tuple[str, ...], Field(min_length=1)]
Folders = dict[Role, _Names]  # below the root; several are joined in this order

_ROLES: dict[Kind, tuple[tuple[Role, ...], ...]] = {  # what a split may consist of, apart from official LRs
    "lr-hr": (("hr",),),
    "paired": (("ab",), ("a", "b")),
    "unpaired": (("a", "b"),),
}


class Recipe(Section):
    """One data set: what it is, where it comes from, and how its folders are laid out."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        max_length=LONGEST_NAME,
        description="what reports and the index call the data set",
    )
    title: str = Field(description="one line for --help")
    kind: Kind = Field("lr-hr", description="lr-hr: single images; paired: A and B of the same scene; unpaired: A, B")
    licence: str = Field(description="what the images may be used for")
    origin: str = Field(description="who made them")
    builtin: Literal["scikit-image"] | None = Field(None, description="a package that ships the images")
    downloads: tuple[Download, ...] = Field((), description="the archives, with their mirrors, sizes and checksums")
    members: tuple[str, ...] = Field((), description="beginnings of the paths to unpack of the archives; () = all")
    roots: tuple[str, ...] = Field((".",), min_length=1, description="folders below the source that may be the set's")
    layouts: tuple[Annotated[dict[Split, Folders], Field(min_length=1)], ...] = Field(
        min_length=1,
        description="split -> role -> folder; the first alternative whose folders all have images is taken",
    )
    images: dict[Split, dict[Role, int]] = Field({}, description="the number of images there must be")
    files: dict[Split, tuple[str, ...]] = Field(
        {}, description="the names of the images, where a folder has others too"
    )

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value in RESERVED:
            raise ValueError(f"'{value}' is a folder of the data root; choose another name")
        return value

    @field_validator("roots", "members", mode="before")
    @classmethod
    def _lists_of_names(cls, value: Any) -> Any:
        """A name alone stands for a list of one."""
        return (value,) if isinstance(value, Word) else value

    @field_validator("layouts", mode="before")
    @classmethod
    def _lists_of_folders(cls, value: Any) -> Any:
        """A folder alone stands for a list of one."""
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(
            {split: _lists(folders) for split, folders in layout.items()} if isinstance(layout, Mapping) else layout
            for layout in value
        )

    @model_validator(mode="after")
    def _roles_fit(self) -> Recipe:
        for layout in self.layouts:
            for split, folders in layout.items():
                roles = tuple(role for role in folders if not role.startswith("lr"))
                official = len(roles) < len(folders)
                if roles not in _ROLES[self.kind] or (official and self.kind != "lr-hr"):
                    allowed = " or ".join("+".join(roles) for roles in _ROLES[self.kind])
                    raise ValueError(f"{self.kind} splits consist of {allowed}; {split} has {'+'.join(folders)}")
                if UNSPLIT in layout and len(layout) > 1:
                    raise ValueError(f"'{UNSPLIT}' stands for a set without splits; rename it or the others")
        places = [
            name for layout in self.layouts for roles in layout.values() for names in roles.values() for name in names
        ]
        files = [name for names in self.files.values() for name in names]
        for path in (*self.roots, *self.members, *places, *files):
            if path.startswith(("/", "~")) or ".." in path.split("/"):
                raise ValueError(f"'{path}' leads out of the source's folder; name a folder or file in it")
        known = {split for layout in self.layouts for split in layout}
        for split in (*self.images, *self.files):
            if split not in known:
                raise ValueError(
                    f"no layout has the split '{split}' that images or files name; {nearest(split, known)}"
                )
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the first, the official layout."""
        return tuple(self.layouts[0])

    @property
    def parts(self) -> tuple[str, ...]:
        """The optional parts that may be downloaded beside the set itself."""
        return tuple(dict.fromkeys(download.optional for download in self.downloads if download.optional))


def recipe_names() -> list[str]:
    """The recipes that come with the clone."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a YAML file; UserError when there is none or it is wrong."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = user_path(name)
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file; {nearest(name, recipe_names())}")
    else:
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"no recipe '{name}'; {nearest(name, recipe_names())}")
    return load_section(path, Recipe, str(RECIPES / "folder.yaml"))


def _lists(folders: Any) -> Any:
    if not isinstance(folders, Mapping):
        return folders
    return {role: (names,) if isinstance(names, Word) else names for role, names in folders.items()}
