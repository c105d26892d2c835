"""The images of a recipe below a folder: found, matched, counted and named before anything is packed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpcdistill.data.folders import has_images, left_out, list_images
from hpcdistill.data.images import Colour
from hpcdistill.data.pack.recipes import OWN, UNSPLIT, Folders, Recipe, Role
from hpcdistill.errors import UserError
from hpcdistill.storage import sha256_file

Digest = tuple[str, int, str]  # a source's name, length and sha256
FileDigest = tuple[str, int, str]  # role, length and sha256 of one of its files


@dataclass(frozen=True)
class _Image:
    name: str  # in the index
    path: Path
    stem: str  # its path below its role's folder, without the suffix: what its partners are found by


_Images = list[_Image]
_Listed = dict[Role, _Images]


@dataclass(frozen=True)
class Source:
    """What one sample is made of."""

    name: str  # what the index calls it: a path below the source, without anything of the machine
    files: tuple[tuple[str, Path], ...]  # role -> file; one, or the two of a pair, or HR and its official LRs
    background: Colour | None = None  # that transparent pixels are laid over; None: they are refused

    @property
    def path(self) -> Path:
        """The file that messages name."""
        return self.files[0][1]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the files, in their order."""
        return tuple(role for role, _ in self.files)


def source_digest(source: Source) -> Digest:
    """Name, length and sha256 of a source; of one that cannot be read, which may be skipped, the name alone."""
    try:
        return digest_of_files(
            source.name, [(role, path.stat().st_size, sha256_file(path)) for role, path in source.files]
        )
    except OSError:
        return source.name, -1, ""


def digest_of_files(name: str, files: Sequence[FileDigest]) -> Digest:
    """The digest of a source from those of its files: of several, the total length and a sha256 over the list."""
    if len(files) == 1:
        _, length, sha256 = files[0]
        return name, length, sha256
    listing = json.dumps(files).encode()
    return name, sum(length for _, length, _ in files), hashlib.sha256(listing).hexdigest()


def find_sources(
    recipe: Recipe,
    source: Path | None,
    *,
    official_lr: bool = False,
    recursive: bool = False,
    background: Colour | None = None,
) -> dict[str, list[Source]]:
    """The samples of `recipe` by split (`UNSPLIT` when it has none), in the order they are packed in.

    `official_lr` asks for the LR images that came with the set, beside its HR; `recursive` for the images in folders
    below the layout's, too. An unpaired split lists all of A, then all of B. Raises
    UserError when a folder, an image, the other half of a pair or the expected number is not there.
    """
    root, layout = _layout(recipe, source, recursive)
    found = {}
    for split, roles in layout.items():
        official = any(map(_is_lr, roles))
        if official_lr and not official:
            raise UserError(f"the recipe {recipe.name} has no official LR images; leave them out (--lr, --with lr)")
        # HR before its LRs, however the recipe lists them.
        wanted = {role: roles[role] for role in sorted(roles, key=_is_lr) if official_lr or not _is_lr(role)}
        listed = {role: _images(root, role, folders, recipe, split, recursive) for role, folders in wanted.items()}
        _check_counts(recipe, root, split, wanted, listed)
        found[split] = _samples(recipe, listed, background)
    return found


def of_two_folders(recipe: Recipe, a: Path, b: Path, *, recursive: bool = False) -> Recipe:
    """`recipe`, of pairs, with the images of two folders: `a` are translated, `b` what they become.

    UserError when one of them has no images, or both are one.
    """
    for folder in (a, b):
        list_images(folder, recursive=recursive)
    if a.resolve() == b.resolve():
        raise UserError(f"{b}: is the folder of the images A too; name that of their partners")
    # Not checked again, as the folders of a recipe lie below its source: these may lie anywhere.
    folders = {"a": (str(a.absolute()),), "b": (str(b.absolute()),)}
    return recipe.model_copy(update={"layouts": ({UNSPLIT: folders},), "roots": (".",)})


def image_folders(recipe: Recipe, source: Path | None, *, recursive: bool = False) -> tuple[Path, list[Path]]:
    """Where the recipe's images are: the folder that its layout begins in, and each that it reads images of."""
    root, layout = _layout(recipe, source, recursive)
    return root, [root / folder for roles in layout.values() for folders in roles.values() for folder in folders]


def unread(recipe: Recipe, source: Path | None, *, recursive: bool = False) -> list[str]:
    """A line for each folder of the recipe's images that has others, which are not packed: what and why."""
    root, folders = image_folders(recipe, source, recursive=recursive)
    if recipe.files:
        return []
    lines = [
        left_out(folder, "take folders too with --recursive", recursive=recursive, apart=folders)
        for folder in dict.fromkeys(folders)
        if folder.is_dir()
    ]
    if root not in folders:
        beside = f"folders that {recipe.name} does not know take a recipe of your own, see docs/data.md"
        lines.append(left_out(root, beside, apart=folders))
    return [line for line in lines if line]


def _samples(recipe: Recipe, listed: _Listed, background: Colour | None) -> list[Source]:
    if recipe.kind == "unpaired":
        return [
            Source(image.name, ((role, image.path),), background) for role, images in listed.items() for image in images
        ]
    main, *others = listed
    matched = [_matched(main, listed[main], role, listed[role]) for role in others]
    return [
        Source(
            image.name,
            ((main, image.path), *((role, files[number]) for role, files in zip(others, matched, strict=True))),
            background,
        )
        for number, image in enumerate(listed[main])
    ]


def _matched(main: str, images: _Images, role: str, partners: _Images) -> list[Path]:
    """The partner of each image: the file of the same name without its suffix; of LR images see `_tail`."""
    _by_stem(images)  # refuses two of the same name
    by_stem = _by_stem(partners)
    tail = _tail(role, images, by_stem) if _is_lr(role) else ""
    partner_of = {image.stem: by_stem.pop(image.stem + tail, None) for image in images}
    if alone := [image.path for image in images if partner_of[image.stem] is None]:
        wanted = f"{alone[0].stem}{tail}"
        raise UserError(_without_partner(alone, images, wanted, partners, (main, role)))
    if by_stem:
        alone = list(by_stem.values())
        wanted = alone[0].stem.removesuffix(tail)
        raise UserError(_without_partner(alone, partners, wanted, images, (main, role)))
    return [partner for partner in partner_of.values() if partner is not None]


def _without_partner(alone: list[Path], of: _Images, wanted: str, partners: _Images, roles: tuple[str, str]) -> str:
    """What is wrong with the images that have none: the first, and how many there are."""
    several = f"; {len(alone)} of {len(of)} images have none" if len(alone) > 1 else ""
    remedy = "add them, or take the images out" if several else "add it, or take the image out"
    return (
        f"{alone[0]}: has no partner {wanted}.* in {partners[0].path.parent} ({' and '.join(roles)} belong "
        f"together{several}); {remedy}"
    )


def _tail(role: str, images: _Images, partners: dict[str, Path]) -> str:
    """What the names of LR images have behind those of their HR: for `lr4` "x4", as DIV2K's, "_x4", or nothing."""
    usual = f"x{role.removeprefix('lr')}"
    found = (tail for tail in (usual, f"_{usual}", "") if any(image.stem + tail in partners for image in images))
    return next(found, usual)


def _by_stem(images: _Images) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for image in images:
        other = found.setdefault(image.stem, image.path)
        if other is not image.path:
            raise UserError(f"{image.path}: has the same name as {other}, so its partner cannot be told; take one out")
    return found


def _layout(recipe: Recipe, source: Path | None, recursive: bool) -> tuple[Path, dict[str, Folders]]:
    """The root and the layout that fit what is below `source`."""
    if recipe.builtin:
        if source is not None:
            raise UserError(f"the recipe {recipe.name} brings its images along; leave --source out")
        return _scikit_image_folder(), recipe.layouts[0]
    if source is None:
        fetch = f", or `python shards/fetch.py {shlex.quote(recipe.name)}`" if recipe.downloads else ""
        raise UserError(f"the recipe {recipe.name} needs the folder of its images: --source DIR{fetch}")
    if not source.is_dir():
        list_images(source)  # says what is wrong with it
    for deep in (False, True) if recursive else (False,):
        for name in recipe.roots:
            for layout in recipe.layouts:
                if all(has_images(source / name / folder, recursive=deep) for folder in _folders(layout)):
                    _check_left_out(recipe, source / name, layout)
                    return source / name, layout
    raise UserError(_not_found(recipe, source))


def _folders(layout: dict[str, Folders]) -> list[str]:
    """The folders that must have images: official LRs are optional, a set is there when its HR is."""
    return [
        folder for roles in layout.values() for role, folders in roles.items() if not _is_lr(role) for folder in folders
    ]


def _check_left_out(recipe: Recipe, root: Path, chosen: dict[str, Folders]) -> None:
    """Refuse a split that is there by half, which another layout would have taken whole."""
    taken = set(_folders(chosen))
    taken |= {str(above) for folder in taken for above in PurePosixPath(folder).parents}  # val of val/A
    for layout in recipe.layouts:
        for split, roles in layout.items():
            folders = _folders({split: roles})
            if split in chosen or split == UNSPLIT or taken & set(folders):
                continue
            there = any((root / folder).is_dir() for folder in folders)
            if there and not all(has_images(root / folder) for folder in folders):
                raise UserError(_half(root, folders, f"the split '{split}'"))


def _not_found(recipe: Recipe, source: Path) -> str:
    """What was expected below `source`; the folder that is wrong, when all others are right."""
    candidates = [(source / root, layout) for root in recipe.roots for layout in recipe.layouts]
    if len(recipe.layouts) == 1 and _folders(recipe.layouts[0]) == ["."] and recipe.roots == (".",):
        try:
            list_images(source)
        except UserError as error:
            return str(error)
    for root, layout in candidates:  # all folders are there
        folders = _folders(layout)
        if "." not in folders and all((root / folder).is_dir() for folder in folders):
            return _half(root, folders, f"the recipe {recipe.name}")
    for root, layout in candidates:  # some are
        for split, roles in layout.items():
            folders = _folders({split: roles})
            if len(folders) > 1 and any(has_images(root / folder) for folder in folders):
                what = f"the recipe {recipe.name}" if split == UNSPLIT else f"the split '{split}' of {recipe.name}"
                if not all(has_images(root / folder) for folder in folders):
                    return _half(root, folders, what)
    families: dict[tuple[str, ...], dict[str, Folders]] = {}  # one layout for each form of a first split
    for layout in recipe.layouts:
        families.setdefault(tuple(_folders(dict([next(iter(layout.items()))]))), layout)
    known = "; or ".join(
        " and ".join("itself" if folder == "." else folder for folder in _folders(layout))
        for layout in families.values()
    )
    roots = " or ".join(root for root in recipe.roots if root != ".")
    inside = f", or the same in its folder {roots}" if roots else ""
    return f"{source}: no images of {recipe.name}; expected them in the folder's {known}{inside}; check the folder"


def _half(root: Path, folders: list[str], what: str) -> str:
    """Which of the folders of a split has no images, or is not there."""
    wrong = next(folder for folder in folders if not has_images(root / folder))
    if (root / wrong).is_dir():
        if deep := sorted(entry.name for entry in (root / wrong).iterdir() if has_images(entry)):
            return (
                f"{root / wrong}: no images in this folder, only in its folders {', '.join(deep[:5])}; {what} needs "
                f"{' and '.join(folders)}: call them train, val, test, or take all as one set with --recursive"
            )
        try:
            list_images(root / wrong)
        except UserError as error:  # names the suffixes that it found in place of images
            return f"{error}; {what} needs it"
    with_images = [folder for folder in folders if has_images(root / folder)]
    beside = f", but {root / with_images[0]} has images" if with_images else ""
    return f"{root / wrong}: no such folder{beside}; {what} needs {' and '.join(folders)}"


def _images(root: Path, role: str, folders: tuple[str, ...], recipe: Recipe, split: str, recursive: bool) -> _Images:
    """The images of one role."""
    if split in recipe.files:
        return [_Image(name, _named(root / folders[0], name, recipe), _stem(name)) for name in recipe.files[split]]
    # Where several folders are read, an image is called by its folder too.
    several = len(folders) > 1 or recipe.kind == "unpaired"
    if _is_lr(role) and not all(has_images(root / folder) for folder in folders):
        fetch = f"fetch them with `python shards/fetch.py {recipe.name} --with lr`, or " if recipe.parts else ""
        raise UserError(f"{root / folders[0]}: no official LR images; {fetch}leave them out")
    images = []
    for folder in folders:
        # A/train and B/train would both be called train.
        called = folder if folder.startswith(("A/", "B/")) and recipe.name in OWN.values() else (root / folder).name
        for path in list_images(root / folder, recursive=recursive):
            below = path.relative_to(root / folder).as_posix()
            images.append(_Image(f"{called}/{below}" if several else below, path, _stem(below)))
    return images


def _check_counts(recipe: Recipe, root: Path, split: str, folders: Folders, listed: _Listed) -> None:
    counts = recipe.images.get(split, {})
    if recipe.kind == "paired":  # a pair counts once, however its two images are stored
        pairs = counts.get("ab", counts.get("a"))
        counts = dict.fromkeys(folders, pairs) if pairs is not None else {}
    for role, roles_folders in folders.items():
        expected, found = counts.get(role), len(listed[role])
        if expected is not None and found != expected:
            where = " + ".join(str(root / name) for name in roles_folders)
            raise UserError(
                f"{where}: found {found} images, the recipe {recipe.name} expects {expected}; complete the folder, "
                f"or pack what is there with the recipe {OWN[recipe.kind]}"
            )


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _is_lr(role: str) -> bool:
    return role.startswith("lr")


def _scikit_image_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("scikit-image is not installed; run `pip install scikit-image`")
    return Path(spec.submodule_search_locations[0]) / "data"


def _named(folder: Path, name: str, recipe: Recipe) -> Path:
    if (folder / name).is_file():
        return folder / name
    remedy = "install scikit-image again" if recipe.builtin else "complete the folder"
    raise UserError(f"{folder / name}: missing, the recipe {recipe.name} names it; {remedy}")
