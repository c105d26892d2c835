"""Large pictures in tiles that equal the whole: how far a network sees, and which pieces that leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from hpcdistill.errors import UserError

TILE = 512  # LR pixels on a side: FSRCNN takes 0.2 GB, IDN 0.7 GB
_SIDES = (33, 65, 129)  # of the probes; who sees further is given whole pictures
OnProgress = Callable[[int], None]  # told how many input pixels have been done since
Span = tuple[int, int]  # first pixel and the one behind the last


def receptive_radius(network: nn.Module, channels: int) -> int | None:
    """How many input pixels to each side an output pixel of a super-resolution network depends on.

    Found by one pixel that is not a number: it spreads to all that reads it, whatever the weights are. None where that
    is the whole image (a normalisation over it, pooling), or 64 and more. FSRCNN: 8 at x2 and x3, 7 at x4.
    """
    # Double precision: its convolutions are plain sums of products, while those of float32 may mix neighbours.
    was = next((p.dtype for p in network.parameters()), torch.float32)
    try:
        network.double()
        for side in _SIDES:
            image = torch.zeros(1, channels, side, side, dtype=torch.float64)
            middle = side // 2
            image[..., middle, middle] = torch.nan
            with torch.no_grad():
                seen = network(image).isnan().any(dim=1)[0]
            scale = seen.shape[0] // side
            rows = seen.view(side, scale, side, scale).any(dim=3).any(dim=1)
            reach = rows.nonzero()
            radius = int((reach - middle).abs().max()) if len(reach) else 0
            if radius < middle:
                return radius
        return None
    finally:
        network.to(was)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a picture (`rows`, `columns`), and the larger one (`from_rows`, `from_columns`) it is made of.

    The larger one has no border where the picture itself ends: the network's own padding belongs there.
    """

    rows: Span
    columns: Span
    from_rows: Span
    from_columns: Span


def pieces(height: int, width: int, tile: int, overlap: int) -> Iterator[list[Piece]]:
    """The pieces of a picture of `height` x `width` pixels, a list for each strip from the top to the bottom.

    They are as equal as can be, and none is larger than `tile` on a side, its border apart. UserError for a tile below
    1 pixel.
    """
    if tile < 1:
        raise UserError(f"--tile {tile}: give a number of pixels, e.g. {TILE}")
    for rows in _spans(height, tile):
        yield [
            Piece(rows, columns, _widened(rows, overlap, height), _widened(columns, overlap, width))
            for columns in _spans(width, tile)
        ]


def _spans(length: int, tile: int) -> list[Span]:
    count = -(-length // tile)
    ends = [length * number // count for number in range(count + 1)]
    return list(pairwise(ends))


def _widened(span: Span, overlap: int, length: int) -> Span:
    return max(0, span[0] - overlap), min(length, span[1] + overlap)
