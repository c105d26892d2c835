"""How far networks see, against what was measured by gradients; tiles that cover a picture once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from hpcdistill.deploy.tiles import pieces, receptive_radius
from hpcdistill.errors import UserError
from hpcdistill.models.sr_network import build_network


@pytest.mark.parametrize(
    ("network", "scale", "radius"),
    # By gradients, as measured for the plan of this package (2026): LR pixels.
    [("fsrcnn", 2, 8), ("fsrcnn", 3, 8), ("fsrcnn", 4, 7), ("idn", 2, 30), ("idn", 4, 28), ("vdsr", 2, 12)]
    + [("vdsr", 4, 7)],
)
def test_radius_of_the_networks(network: str, scale: int, radius: int) -> None:
    built = build_network(network, scale)
    assert receptive_radius(built.deploy(), 1) == radius
    assert next(built.parameters()).dtype == torch.float32


def test_weights_of_zero_count_as_read() -> None:
    convolution = nn.Conv2d(1, 1, 7, padding=3)
    nn.init.zeros_(convolution.weight)
    assert receptive_radius(convolution, 1) == 3


def test_a_normalisation_over_the_image_has_no_radius() -> None:
    assert receptive_radius(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)), 1) is None


@given(some.integers(1, 60), some.integers(1, 60), some.integers(1, 25), some.integers(0, 9))
def test_pieces_cover_each_pixel_once_and_reach_no_further_than_the_picture(
    height: int, width: int, tile: int, overlap: int
) -> None:
    covered = torch.zeros(height, width, dtype=torch.int)
    for strip in pieces(height, width, tile, overlap):
        for piece in strip:
            covered[slice(*piece.rows), slice(*piece.columns)] += 1
            for (first, last), (begin, end), length in (
                (piece.rows, piece.from_rows, height),
                (piece.columns, piece.from_columns, width),
            ):
                assert last - first <= tile
                assert begin == max(0, first - overlap)
                assert end == min(length, last + overlap)
    assert (covered == 1).all()


def test_a_tile_has_a_size() -> None:
    with pytest.raises(UserError, match="--tile 0: give a number of pixels"):
        list(pieces(5, 5, 0, 2))
