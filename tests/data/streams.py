"""Opening streams of small sets in tests, and telling what they delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sets import Rgb

from hpcdistill.data.config import DataConfig
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.errors import UserError

RGB = Needs(kind="lr-hr", scale=4, lr_scales=(4,), channels=3)
LUMA = Needs(kind="lr-hr", scale=4, lr_scales=(4,))
PAIRED, UNPAIRED = Needs(kind="paired"), Needs(kind="unpaired")
SIDE = 16
Batch = dict[str, torch.Tensor]


def lr_hr(images: Sequence[Rgb]) -> list[dict[str, Rgb]]:
    return [{"hr.png": image, "lr2.png": image[::2, ::2], "lr4.png": image[::4, ::4]} for image in images]


def stream(places: str | Path | Sequence[Path], needs: Needs = RGB, **options: Any) -> StreamReader:
    loop = {name: options.pop(name) for name in ("seed", "batch_size", "rank", "ranks") if name in options}
    config = DataConfig(**{"reader": "stream", "patch": 8, "load_size": SIDE, "crop": SIDE, "flip": False, **options})
    places = [places] if isinstance(places, str | Path) else places
    return StreamReader([str(place) for place in places], needs, config, **{"seed": 0, "batch_size": 1, **loop})


def numbers(batch: Batch, name: str = "hr") -> list[int]:
    """The numbers of `numbered` images, from pixels in [0, 1] or, of an image-to-image set, in [-1, 1]."""
    pixels = batch[name].double() if name == "hr" else (batch[name].double() + 1) / 2
    assert (pixels == pixels[:, :, :1, :1]).all()
    red, green, blue = (pixels[:, :, 0, 0] * 255).round().int().T.tolist()
    assert set(blue) == {77}
    return [high << 8 | low for high, low in zip(red, green, strict=True)]


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def what_fails(build: Callable[[], object]) -> str | None:
    """The message of the UserError, None when there is none."""
    try:
        build()
    except UserError as error:
        return str(error)
    return None


def fails(build: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    del caught  # it would hold the frames, and with them a loader's workers
    assert "\n" not in message
    assert all(part in message for part in parts), message
