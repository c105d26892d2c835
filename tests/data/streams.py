"""Opening small sets in tests, what they delivered, and the order of their samples from its definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sets import Rgb

from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import ORDER
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


def same_batch(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(map(same_batch, one, other))


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


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in plain integers, an independent reference."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def epoch_order(size: int, draws: int, epoch: int, seed: int, stream: int = ORDER) -> list[int]:
    """The samples of an epoch: permutations by 64-bit keys, one after the other, the last one cut."""
    result: list[int] = []
    while len(result) < draws:
        keys = [philox([len(result) + i, 0, epoch, stream], [seed, 0]) for i in range(size)]
        result += sorted(range(size), key=lambda i: (keys[i][0] << 32) | keys[i][1])
    return result[:draws]
