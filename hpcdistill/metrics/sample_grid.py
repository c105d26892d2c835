"""Pictures beside each other, as papers show them: magnified, labelled crops of what several methods made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from hpcdistill.metrics.sr_evaluation import ImagePair
from hpcdistill.metrics.sr_test_sets import Image
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.colour import luma, with_luma

_PAPER, _INK, _RULE = (255, 255, 255), (20, 20, 20), (200, 200, 200)
_FONT_SIZE, _LABEL_HEIGHT, _GAP = 12, 18, 4


def colourise(sr: Tensor, lr: Image, scale: int, gray: bool = False) -> Image:
    """An 8-bit RGB image of a generator's output `[c, H, W]` in [0, 1]; values outside are clamped.

    Luma (c = 1) gets the chroma of the bicubically enlarged `lr` `[H/s, W/s, 3]`, as papers make their figures;
    RGB (c = 3) is only rounded, and so is what was made of a `gray` image taken as it is.
    """
    if sr.shape[-3] == 3 or gray:
        return _eight_bits(sr.float().expand(3, -1, -1))
    enlarged = upsample(_planes(lr), scale).double()
    return _eight_bits(with_luma(enlarged, sr.detach().cpu().double()))


def bicubic_image(lr: Image, scale: int) -> Image:
    """`[h, w, 3]` enlarged to `[s h, s w, 3]`: the picture beside which a network's is looked at."""
    return _eight_bits(upsample(_planes(lr), scale))


def sample_row(pair: ImagePair, output: Tensor, scale: int, side: int = 96) -> dict[str, Image]:
    """The labelled crops bicubic, SR and HR of one evaluated image, `side` pixels square at its busiest place.

    `output` is the generator's `[1, c, H, W]` (see `sr_evaluation.super_resolve`).
    """
    hr, lr = (np.ascontiguousarray(image[0].cpu().numpy().transpose(1, 2, 0)) for image in (pair.hr, pair.lr))
    top, left, height, width = busiest_crop(hr, side)
    pictures = {"bicubic": bicubic_image(lr, scale), "SR": colourise(output[0], lr, scale, pair.gray), "HR": hr}
    return {label: picture[top : top + height, left : left + width] for label, picture in pictures.items()}


def busiest_crop(image: Image, side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop with the most luma contrast, where super-resolution shows.

    Candidates lie on a grid of half a side; an image smaller than `side` is taken whole on that axis.
    """
    grey = luma(_planes(image))[0].numpy()
    # Steps between neighbours count, not plain variance: a border between sky and ground is no texture.
    change = np.zeros_like(grey)
    change[:, 1:] += np.abs(np.diff(grey, axis=1))
    change[1:] += np.abs(np.diff(grey, axis=0))
    return densest_crop(change, side)[0]


def densest_crop(density: NDArray[Any], side: int) -> tuple[tuple[int, int, int, int], float]:
    """(top, left, height, width) of the crop of `[H, W]` values with the largest sum, and their mean there.

    Candidates as in `busiest_crop`; of equal ones the first.
    """
    height, width = min(side, density.shape[0]), min(side, density.shape[1])
    total = np.pad(density.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    step = max(1, side // 2)
    tops = range(0, density.shape[0] - height + 1, step)
    lefts = range(0, density.shape[1] - width + 1, step)

    def within(corner: tuple[int, int]) -> float:
        top, left = corner
        bottom, right = top + height, left + width
        return float(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])

    top, left = max(((top, left) for top in tops for left in lefts), key=within)
    return (top, left, height, width), within((top, left)) / (height * width)


def sample_grid(rows: Sequence[Mapping[str, Image]], zoom: int = 2) -> Image:
    """One 8-bit RGB picture: a row for each mapping label -> crop `[H, W, 3]`, the label above its crop.

    A label may have several lines; labels of a row are as high as the highest. Crops are magnified `zoom` times with
    their pixels left square, so that the eye sees what the network made, and have a thin line around them.
    """
    assert rows
    assert all(rows)
    assert zoom >= 1
    lines = [max(label.count("\n") + 1 for label in row) for row in rows]
    tiles = [
        [_labelled(label, crop, zoom, high) for label, crop in row.items()]
        for row, high in zip(rows, lines, strict=True)
    ]
    columns = max(len(row) for row in tiles)
    widths = [max(row[column].width for row in tiles if column < len(row)) for column in range(columns)]
    heights = [max(tile.height for tile in row) for row in tiles]
    grid = PillowImage.new(
        "RGB", (sum(widths) + _GAP * (columns + 1), sum(heights) + _GAP * (len(rows) + 1)), color=_PAPER
    )
    draw, top = ImageDraw.Draw(grid), _GAP
    for row, row_tiles, height in zip(rows, tiles, heights, strict=True):
        left = _GAP
        for crop, tile, width in zip(row.values(), row_tiles, widths, strict=False):
            grid.paste(tile, (left, top))
            below, right = top + tile.height, left + crop.shape[1] * zoom
            draw.rectangle((left - 1, below - crop.shape[0] * zoom - 1, right, below), outline=_RULE)
            left += width + _GAP
        top += height + _GAP
    return np.asarray(grid)


def outlined(image: Image, box: tuple[int, int, int, int]) -> Image:
    """A copy of `[H, W, 3]` with a white and black line just outside `box` (top, left, height, width), 3 pixels wide.

    What is inside stays as it is, and at the image's border there is no line.
    """
    top, left, height, width = box
    drawn = PillowImage.fromarray(image.copy())
    draw = ImageDraw.Draw(drawn)
    for away, colour in ((1, _PAPER), (2, _PAPER), (3, _INK)):
        draw.rectangle((left - away, top - away, left + width - 1 + away, top + height - 1 + away), outline=colour)
    return np.asarray(drawn)


def _labelled(label: str, crop: Image, zoom: int, lines: int) -> PillowImage.Image:
    """The crop, magnified, below a label for which there is room of so many `lines`."""
    height, width, above = crop.shape[0] * zoom, crop.shape[1] * zoom, _LABEL_HEIGHT * lines
    font = ImageFont.load_default(_FONT_SIZE)
    widest = max(int(font.getlength(line)) + 1 for line in label.split("\n"))
    tile = PillowImage.new("RGB", (max(width, widest), height + above), color=_PAPER)
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(label.split("\n")):
        draw.text((0, 1 + _LABEL_HEIGHT * number), line, fill=_INK, font=font)
    tile.paste(PillowImage.fromarray(crop.repeat(zoom, axis=0).repeat(zoom, axis=1)), (0, above))
    return tile


def _planes(image: Image) -> Tensor:
    """`[H, W, 3]` 8-bit to `[3, H, W]` float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def _eight_bits(planes: Tensor) -> Image:
    """`[3, H, W]` nominally in [0, 1] to `[H, W, 3]`, clamped and rounded."""
    rounded = planes.detach().cpu().mul(255).clamp(0, 255).round().to(torch.uint8)
    image: Image = np.ascontiguousarray(rounded.numpy().transpose(1, 2, 0))
    return image
