"""What `evaluate` and `figures` compare: runs, generators' files, exported files, pictures that any program has made.

Nothing here imports torch before a network is opened: a misspelt path is said at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdistill.console import warn
from hpcdistill.data.folders import has_images, other_suffixes
from hpcdistill.deploy.formats import format_of
from hpcdistill.deploy.shipped import PREFIX, pretrained_file
from hpcdistill.errors import UserError, plural
from hpcdistill.metrics.reference import BICUBIC
from hpcdistill.models.weights_file import generator_file
from hpcdistill.storage import user_path

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.data.images import Colour
    from hpcdistill.metrics.sr_test_sets import SRImages
    from hpcdistill.metrics.trained_super_resolution import Source

_RUN_ENTRIES = ("generators", "config.yaml", "manifest.json")  # of run folders and checkpoints
_NUMBER = re.compile("-[0-9a-f]{8}$")  # that ends the name of a run folder


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared. Without a `network` it is the folder of pictures `path`."""

    label: str
    origin: str  # as results name it
    path: Path  # the file of the network, or the folder
    network: nn.Module | None = None
    exported: bool = False  # the network runs elsewhere: nothing of it can be counted

    @property
    def scale(self) -> int | None:
        """By which it enlarges; None for pictures, and for what enlarges nothing."""
        found = getattr(self.network, "scale", None)
        return found if isinstance(found, int) else None

    @property
    def translates(self) -> bool:
        """Whether it is a network that translates images."""
        return getattr(self.network, "takes", None) == "image"


def open_candidates(words: Sequence[str], which: str = "best", generator: str | None = None) -> list[Candidate]:
    """What `words`, each `MODEL` or `LABEL=MODEL`, name: see the module; `pretrained:x4` are weights that are shipped.

    Of runs, the weights `which` of the network `generator`, or of the student. UserError for what is no such thing, and
    for labels that two have.
    """
    places = [split_label(word) for word in words]
    files: list[Path | None] = [_network_file(path, which, generator) for _, path in places]
    short = [label or _short_name(path) for label, path in places]
    labels = [
        label or (_full_name(path) if short.count(name) > 1 else name)
        for (label, path), name in zip(places, short, strict=True)
    ]
    check_labels(labels)
    return [_opened(*parts) for parts in zip(labels, [path for _, path in places], files, strict=True)]


def split_label(word: str) -> tuple[str | None, Path]:
    """The label and the path of `LABEL=MODEL`, or of a MODEL alone."""
    path = user_path(word)
    label, equals, rest = word.partition("=")
    if path.exists() or not equals or not label:
        return None, path
    return label, user_path(rest)


def check_labels(labels: Sequence[str]) -> None:
    """UserError when two are the same, or one is bicubic's."""
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two are called {twice}; call one otherwise: OTHER_LABEL=MODEL")
    if taken := next((label for label in labels if label.lower() == BICUBIC), None):
        raise UserError(f"{taken}: bicubic enlargement is called so, which stands beside; write OTHER_LABEL=MODEL")


def all_translate(candidates: Sequence[Candidate], data: Path) -> bool:
    """Whether the candidates translate images: as the networks do or, of pictures alone, as the packed set says.

    UserError where some translate and others enlarge.
    """
    networks = [candidate for candidate in candidates if candidate.network is not None]
    if not networks:
        from hpcdistill.data.index import INDEX_NAME, load_index

        return (data / INDEX_NAME).is_file() and load_index(data).kind != "lr-hr"
    other = next((one for one in networks if one.translates != networks[0].translates), None)
    if other is not None:
        one, two = (other, networks[0]) if other.translates else (networks[0], other)
        raise UserError(f"{one.label} translates images and {two.label} enlarges them; compare those of one kind")
    return networks[0].translates


def common_scale(candidates: Sequence[Candidate], asked: int | None) -> int:
    """The scale of all super-resolution candidates; UserError when they differ, or `asked` is another.

    Pictures have none of their own: theirs is the networks', or what is `asked`.
    """
    own: tuple[Candidate, int] | None = None
    for candidate in candidates:
        if candidate.network is None:
            continue
        scale = candidate.scale
        if scale is None:
            raise UserError(
                f"{candidate.origin}: a {type(candidate.network).__name__} is no super-resolution network; give one "
                "that enlarges"
            )
        if asked not in (None, scale):
            raise UserError(
                f"--scale {asked}: {candidate.origin} enlarges x{scale}; leave --scale out or use a network of x{asked}"
            )
        if own is not None and own[1] != scale:
            raise UserError(
                f"{candidate.label} enlarges x{scale}, {own[0].label} x{own[1]}; compare those of one scale"
            )
        own = candidate, scale
    found = asked if own is None else own[1]
    if found is None:
        raise UserError(f"{candidates[0].path}: a folder of pictures has no scale of its own; add --scale 2, 3 or 4")
    return found


def sources_of(
    candidates: Sequence[Candidate], images: SRImages, background: Colour | None = None
) -> dict[str, Source]:
    """What is measured of each candidate, by its label.

    UserError for a folder that lacks a picture of one of the `images`, or is theirs. What is gray there, and in colour
    in the set, is said.
    """
    from hpcdistill.metrics.pictures import Pictures

    sources: dict[str, Source] = {}
    for candidate in candidates:
        if candidate.network is not None:
            sources[candidate.label] = candidate.network
            continue
        if candidate.path.resolve() in (images.path.resolve(), (images.path / "HR").resolve()):
            raise UserError(f"{candidate.path}: are the test images themselves; name a folder of pictures made of them")
        pictures = Pictures(candidate.path, images.names, background)
        gray = [name for number, name in enumerate(images.names) if pictures.is_gray(number)]
        gray = [name for name in gray if not images.is_gray(images.names.index(name))]
        if gray:
            warn(
                f"{candidate.path}: gray pictures of colour images are measured as RGB of equal channels, here "
                f"{plural(len(gray), 'picture')}: {', '.join(gray)}"
            )
        sources[candidate.label] = pictures
    return sources


def _network_file(path: Path, which: str, generator: str | None) -> Path | None:
    """The file of a network; None for a folder of pictures."""
    if str(path).startswith(PREFIX) and not path.exists():
        path = pretrained_file(str(path))
    pictures = path.is_dir() and not any((path / entry).exists() for entry in _RUN_ENTRIES)
    if pictures and (has_images(path) or other_suffixes(path)):
        if generator is not None:
            raise UserError(f"--generator {generator}: {path} is a folder of pictures; leave --generator out")
        return None
    return generator_file(path, which, generator)


def _full_name(path: Path) -> str:
    return path.name or path.resolve().name


def _short_name(path: Path) -> str:
    """A file's name without its suffix, a run folder's without its number."""
    return path.stem if path.suffix and not path.is_dir() else _NUMBER.sub("", _full_name(path))


def _opened(label: str, path: Path, file: Path | None) -> Candidate:
    if file is None:
        return Candidate(label, str(path), path)
    if format_of(file) is not None:
        from hpcdistill.deploy.model import load
        from hpcdistill.deploy.session_network import SessionNetwork

        return Candidate(label, str(path), file, SessionNetwork(load(file)), exported=True)
    from hpcdistill.models import registry

    network = registry.load_generator(file)[0]
    return Candidate(label, str(file), file, network)
