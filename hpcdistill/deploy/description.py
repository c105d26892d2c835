"""What a deployed network is and what it eats: the words that travel with it, whatever its format."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn

from hpcdistill.data.index import INDEX_NAME, load_index
from hpcdistill.data.pack.recipes import OWN
from hpcdistill.errors import UserError
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.storage import CLONE, user_path
from hpcdistill.training.records import run_values

METADATA_KEY = "hpcdistill"  # under which formats that have metadata keep it, as JSON
Task = Literal["super-resolution", "translation"]
Colour = Literal["luma", "rgb"]
UNKNOWN = "not recorded"
OWNERS = "yours"  # what the recipes for images of one's own call their licence
_SPLITS = ("train", "test", "val", "all")


@dataclass(frozen=True)
class Description:
    """A network for people and programs that have never seen its training.

    It takes `[B, channels, H, W]` float32 and gives `[B, channels, scale H, scale W]`, both in `low` .. `high`
    nominally: super-resolution does not clamp. Luma is BT.601's of studio swing, in [16/255, 235/255]; RGB is in this
    order. Height and width are multiples of `multiple` and no less than `smallest`.
    """

    task: Task
    network: str  # the class
    arguments: dict[str, Any] = field(default_factory=dict)  # that rebuild it
    scale: int = 1
    colour: Colour = "rgb"
    low: float = 0.0
    high: float = 1.0
    multiple: int = 1
    smallest: int = 1
    overlap: int | None = None  # LR pixels that an output reads to each side; None: no exact tiles, whole pictures only
    method: str = UNKNOWN
    steps: int | None = None
    run: str = ""  # the run folder's name
    data: str = UNKNOWN  # what it was trained on
    licence: str = UNKNOWN  # of that, and so of the weights

    @property
    def channels(self) -> int:
        """Of the images that it takes and gives."""
        return 1 if self.colour == "luma" else 3

    def tiled(self, overlap: int | None) -> Description:
        """The same, with how far its outputs see."""
        return replace(self, overlap=overlap)

    def to_json(self) -> str:
        """One line, the same for the same network."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Description:
        """UserError, naming `origin`, for anything that `to_json` did not write."""
        try:
            values = json.loads(text)
            known = {item.name for item in fields(cls)}
            found = cls(**{name: value for name, value in values.items() if name in known})
            numbers = (found.scale, found.multiple, found.smallest, found.overlap or 0)
            if not all(isinstance(number, int) and 0 <= number <= 4096 for number in numbers) or 0 in numbers[:3]:
                raise ValueError("a number is none")
            if found.task not in get_args(Task) or found.colour not in get_args(Colour) or not found.low < found.high:
                raise ValueError("a word is none of ours")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{origin}: its metadata is not hpcdistill's ({error}); export the network again") from None
        return found


def describe(network: nn.Module, notes: Mapping[str, Any], file: Path) -> Description:
    """`network`, which `file` holds with `notes` (see `models.registry.save_generator`).

    What the notes do not say is taken from the run folder that the file lies in. UserError for a network that makes no
    picture of a picture: a discriminator, a teacher that sees the HR image.
    """
    common = {
        "network": type(network).__name__,
        "arguments": dict(cast(Mapping[str, Any], network.arguments)),
        "steps": notes.get("steps", notes.get("step")),
        **_origin(notes, file),
    }
    channels = [getattr(network, name, None) for name in ("channels", "channels_in", "channels_out")]
    takes = cast(str, network.takes)
    if takes == "lr":
        if channels[0] not in (1, 3):
            raise UserError(f"{file}: takes {channels[0]} channels; pictures have 1 (luma) or 3 (RGB)")
        colour: Colour = "luma" if channels[0] == 1 else "rgb"
        return Description("super-resolution", scale=cast(int, network.scale), colour=colour, **common)
    if isinstance(network, PrivilegedTeacher):
        raise UserError(
            f"{file}: is a teacher that sees the high-resolution image, which is what you want to have; give its "
            "student, or a run of one"
        )
    if takes != "image" or not hasattr(network, "multiple"):
        raise UserError(f"{file}: a {type(network).__name__} makes no picture of a picture; give a generator")
    if channels[1:] != [3, 3]:
        raise UserError(f"{file}: makes {channels[2]} channels of {channels[1]}; only RGB to RGB is translated here")
    sizes: dict[str, Any] = {"multiple": cast(int, network.multiple), "smallest": cast(int, network.smallest)}
    return Description("translation", low=-1.0, high=1.0, **sizes, **common)


def _origin(notes: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Method, data and licence: as the notes say, else from the configuration of the run, and its packed sets."""
    config = run_values(file)
    method, data = config.get("method") or {}, config.get("data") or {}
    places = data.get("train") or ()
    sets = [str(place) for place in ([places] if isinstance(places, str) else places)]
    licences = [_licence(set_folder(place, file)) for place in sets]
    found = {
        "method": notes.get("method") or method.get("name"),
        "data": notes.get("data") or ", ".join(text for text, _ in training_sets(config, file)),
        "licence": notes.get("licence") or "; ".join(dict.fromkeys(filter(None, licences))),
        "run": file.parents[2].name if config else str(notes.get("run", "")),
    }
    return {key: str(value) for key, value in found.items() if value}


def set_folder(place: str, file: Path) -> Path:
    """Where a run's data set lies that its configuration calls `place`; `file`: RUN/generators/<which>/<name>.

    A run that was started in another folder than this one has its sets beside its runs.
    """
    folder = user_path(place)
    found = (base / folder for base in (*file.parents[4:5], CLONE) if (base / folder / INDEX_NAME).is_file())
    return next(found, folder)


def training_sets(values: Mapping[str, Any], file: Path) -> list[tuple[str, str]]:
    """The packed sets that the run of `file` was trained on, in words and by a published set's name (else empty).

    Of one that cannot be read any more its folder says it.
    """
    places = (values.get("data") or {}).get("train") or ()
    found = []
    for place in [places] if isinstance(places, str) else map(str, places):
        *_, above, name = ("", "", *Path(place).parts)
        recipe, split = (above, name) if name in _SPLITS and above.strip("/") else (name, "")
        with contextlib.suppress(UserError, OSError):
            index = load_index(set_folder(place, file))
            own = index.recipe in OWN.values()
            recipe, split = (recipe if own else index.recipe), index.split
            if own:
                found.append((f"images of one's own ({recipe}, {split})", ""))
                continue
        found.append((f"{recipe} ({split})" if split else recipe, recipe))
    return found


def _licence(folder: Path) -> str:
    """What a packed set may be used for; empty where it cannot be read any more."""
    with contextlib.suppress(UserError, OSError):
        if (folder / INDEX_NAME).is_file():
            licence = load_index(folder).licence
            return "what their owner says" if licence == OWNERS else licence  # read by others than the owner
    return ""
