"""Colour and layout of the sample pictures."""

from __future__ import annotations

import numpy as np
import torch
from skimage.color import rgb2ycbcr, ycbcr2rgb

from hpcdistill.metrics.sample_grid import bicubic_image, busiest_crop, colourise, outlined, sample_grid, sample_row
from hpcdistill.metrics.sr_evaluation import ImagePair
from hpcdistill.ops.bicubic import upsample


def photograph(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + columns / 14), np.cos(rows / 11), np.sin(columns / 8)]
    return (128 + 90 * np.stack(waves, -1)).astype(np.uint8)


def test_luma_is_coloured_with_the_chroma_of_the_enlarged_lr_image() -> None:
    lr = photograph(12, 15)
    sr = torch.rand(1, 24, 30, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    enlarged = upsample(torch.from_numpy(np.moveaxis(lr, -1, 0).copy()).double() / 255, 2).numpy()
    ycbcr = rgb2ycbcr(np.moveaxis(enlarged, 0, -1))
    ycbcr[..., 0] = sr[0].numpy() * 255.0
    expected = np.clip(ycbcr2rgb(ycbcr) * 255, 0, 255)
    # scikit-image's inverse comes from rounded coefficients of its own; one level is rounding.
    assert np.abs(colourise(sr, lr, 2) - expected).max() < 0.51


def test_bicubic_luma_gives_the_bicubic_image() -> None:
    lr = photograph(12, 15)
    planes = upsample(torch.from_numpy(np.moveaxis(lr, -1, 0).copy()).double() / 255, 3)
    luma = rgb2ycbcr(np.moveaxis(planes.numpy(), 0, -1))[..., 0] / 255
    coloured = colourise(torch.from_numpy(luma)[None], lr, 3)
    assert np.abs(coloured.astype(int) - bicubic_image(lr, 3).astype(int)).max() <= 1


def test_rgb_is_only_rounded_and_clamped() -> None:
    sr = torch.tensor([-0.2, 100.4 / 255, 1.7]).view(3, 1, 1).expand(3, 2, 2)
    assert colourise(sr, np.zeros((1, 1, 3), np.uint8), 2)[0, 0].tolist() == [0, 100, 255]


def test_the_busiest_crop() -> None:
    image = np.full((100, 120, 3), 60, np.uint8)
    image[40:60, 80:100] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    assert busiest_crop(image, 40) in [(20, 60, 40, 40), (20, 80, 40, 40), (40, 60, 40, 40), (40, 80, 40, 40)]
    assert busiest_crop(image, 500) == (0, 0, 100, 120)


def test_a_row_shows_the_same_place_three_times() -> None:
    hr, lr = photograph(64, 96), photograph(64, 96)[::4, ::4]
    pair = ImagePair(*(torch.from_numpy(np.moveaxis(image, -1, 0).copy())[None] for image in (hr, lr)))
    row = sample_row(pair, pair.hr.float() / 255, 4, side=32)
    assert list(row) == ["bicubic", "SR", "HR"]
    assert all(crop.shape == (32, 32, 3) for crop in row.values())
    assert np.array_equal(row["SR"], row["HR"])
    assert not np.array_equal(row["bicubic"], row["HR"])


def test_the_grid_shows_every_crop_magnified_under_its_label() -> None:
    first, second = photograph(20, 30), 255 - photograph(25, 40)
    grid = sample_grid([{"bicubic": first, "HR": first}, {"bicubic": second}], zoom=3)
    assert grid.dtype == np.uint8
    for crop in (first, second):
        magnified = np.kron(crop, np.ones((3, 3, 1), np.uint8))
        windows = np.lib.stride_tricks.sliding_window_view(grid[..., 0], magnified.shape[:2])
        corners = [tuple(corner) for corner in np.argwhere(windows[:, :, 0, 0] == magnified[0, 0, 0])]
        found = [
            (top, left)
            for top, left in corners
            if np.array_equal(grid[top : top + magnified.shape[0], left : left + magnified.shape[1]], magnified)
        ]
        assert len(found) == (2 if crop is first else 1)
        top, left = found[0]
        label = grid[top - 18 : top, left : left + 60]
        assert label.min() < 100 < 250 < label.max()  # ink on paper


def test_a_label_may_have_several_lines() -> None:
    """All pictures of a row begin below the highest label; 18 pixels a line, 4 between tiles."""
    crop = np.full((20, 30, 3), 9, np.uint8)
    grid = sample_grid([{"one": crop, "two\nlines": crop}, {"third": crop}], zoom=1)
    dark = np.argwhere((grid == 9).all(axis=-1))
    assert sorted({int(row) for row, _ in dark}) == [*range(4 + 36, 4 + 36 + 20), *range(64 + 18, 64 + 18 + 20)]
    lines = [grid[4 + 18 * line : 21 + 18 * line, 36:].min() for line in range(2)]
    assert max(lines) < 100  # ink in both


def test_a_white_picture_has_an_edge() -> None:
    """A line of one pixel around it, outside; 4 pixels beside it, 4 + 18 above."""
    grid = sample_grid([{"a": np.full((20, 60, 3), 255, np.uint8)}], zoom=1)
    inside = grid[22:42, 4:64]
    assert (inside == 255).all()
    for edge in (grid[21, 3:65], grid[42, 3:65], grid[21:43, 3], grid[21:43, 64]):
        assert (edge == 200).all()
    assert (grid[43:] == 255).all()
    assert (grid[:, 65:] == 255).all()


def test_an_outline_is_outside_its_box() -> None:
    image = photograph(40, 50)
    drawn = outlined(image, (10, 20, 8, 12))
    changed = (drawn != image).any(axis=-1)
    assert not changed[10:18, 20:32].any()
    ring = np.zeros((40, 50), bool)
    ring[7:21, 17:35] = True
    ring[10:18, 20:32] = False
    assert not changed[~ring].any()
    assert (drawn[9, 19:33] == 255).all()
    assert (drawn[7, 17:35] == 20).all()
    assert outlined(image, (0, 0, 40, 50)).tolist() == image.tolist()  # nowhere to draw
