"""8-bit images shrunk as MATLAB does it: beside its own pixels, and beside dense float64 matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matlab_reference import matlab_shrunk
from PIL import Image

from hpcdistill.ops.downsampling import ResizeRule, downsample_uint8

RULES: tuple[ResizeRule, ...] = ("newer", "older", "exact")

# One channel of small parts of Set5's images. What MATLAB makes of them is from the LR files that it wrote.
BUTTERFLY_EDGE = """
    108  35   0  48  88  71  74  70  69  69
    170  94   2  21  89  80  77  76  75  73
    163 141  34  10  49  79  77  77  76  73
    145 151  60  12  12  79  83  68  71  80
    116 157 119  35   0  42  90  69  74  78
    101 139 158  73   0  25  87  74  81  65
     74 101 163 146  27   9  53  80  76  59
     32  78 130 170 106  11  14  90  84  70
     21  36 102 160 141  34   0  48  81  69
     45  17  90 162 170  79   0   5  74  83
"""
BIRD_CORNER = """
    18 17 15 15 19 19 22 26 22 30
    16 15 12 14 18 15 18 21 18 26
    13 12 10 12 16 13 15 18 17 25
    11 10 10 12 15 11 12 15 15 23
     9  9 10 11 13 10 10 12 11 16
     9  9 10 11 13 10 10 12  9 14
     9  9 10 11 13 10 10 12  7 12
     9  9 10 11 13 10 10 12  6 11
     8  8  8  9 11  6  6  8  3  5
    10 10  8  9 10  7  8 10  5  6
"""
BUTTERFLY_CORNER = """
     42  58  85  98 115 120 124 124 126 128 131 130 134 137
     41  47  54  72  96 106 113 123 131 133 131 134 137 133
     80  52  42  42  59  70  97 114 126 136 134 136 137 133
    225 136  38  35  37  62  89  97 119 136 138 134 134 137
    108  99  44  27  33  53  78  97 127 133 137 140 136 132
     30  33  37  35  33  35  46  90 136 134 134 128 118 119
     37  37  38  33  34  34  46  74 115 137 125 103  87  99
     45  42  42  37  34  34  50  98  99 102  90  64  59  91
     51  40  38  37  40  40  40  66  73  53  57  41  50  92
     44  42  43  41  44  45  42  49  48  41  41  38  50  94
     42  49  46  38  46  60 107  86  44  38  37  36  60  98
     51  50  40  40  44  98 238 176  47  39  37  42  59  85
     58  46  39  42  47 152 251 195  54  36  39  42  50  62
     48  42  46  47  68 205 251 192  55  39  39  38  46  45
"""


def image_of(text: str, scale: int) -> np.ndarray:
    """`[H, W, 1]`, filled up with zeros at the bottom and on the right to a multiple of `scale`."""
    rows = np.array([line.split() for line in text.split("\n") if line.strip()], dtype=np.uint8)
    return np.pad(rows, [(0, -length % scale) for length in rows.shape])[..., None]


def shrunk(text: str, scale: int, rule: ResizeRule) -> np.ndarray:
    return downsample_uint8(image_of(text, scale), scale, rule)[..., 0]


def test_matlab_s_pixel_at_an_edge() -> None:
    """No border in reach: both rules give MATLAB's 22; rounded once it would be 20."""
    assert [int(shrunk(BUTTERFLY_EDGE, 2, rule)[2, 2]) for rule in RULES] == [22, 22, 20]


def test_matlab_s_pixels_in_a_corner() -> None:
    """What lies beyond the parts does not reach the first two pixels of an axis."""
    assert shrunk(BIRD_CORNER, 3, "newer")[:2, :2].tolist() == [[15, 16], [10, 12]]
    assert shrunk(BUTTERFLY_CORNER, 4, "newer")[:2, :2].tolist() == [[70, 97], [48, 52]]
    assert shrunk(BUTTERFLY_CORNER, 4, "older")[:2, :2].tolist() == [[69, 95], [47, 51]]


def test_mirrored_is_the_default() -> None:
    image = image_of(BUTTERFLY_CORNER, 4)
    np.testing.assert_array_equal(downsample_uint8(image, 4), downsample_uint8(image, 4, "newer"))


MATLAB_FILES = [("newer", scale) for scale in (2, 3, 4)] + [("older", 4)]


@pytest.mark.parametrize(("rule", "scale"), MATLAB_FILES)
@pytest.mark.parametrize("name", ["baby", "bird", "butterfly", "head", "woman"])
def test_equals_the_files_that_matlab_wrote(test_data: Path, rule: ResizeRule, scale: int, name: str) -> None:
    with Image.open(test_data / "matlab_lr" / rule / "Set5" / f"x{scale}" / f"{name}.png") as image:
        expected = np.asarray(image.convert("RGB"))
    with Image.open(test_data / "sr_test" / "Set5" / "HR" / f"{name}.png") as image:
        hr = np.asarray(image.convert("RGB"))
    height, width = (length // scale * scale for length in hr.shape[:2])
    np.testing.assert_array_equal(downsample_uint8(hr[:height, :width], scale, rule), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24), (768, 1020)], ids=str)  # one strip, and several
def test_equals_the_reference(scale: int, shape: tuple[int, int], rule: ResizeRule) -> None:
    image = np.random.default_rng(scale).integers(0, 256, (*shape, 3), dtype=np.uint8)
    result = downsample_uint8(image, scale, rule)
    for channel in range(3):
        np.testing.assert_array_equal(result[..., channel], matlab_shrunk(image[..., channel], scale, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8, 16])  # from 8 on float32 does not hold all sums
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (4, 7)], ids=str)  # of the result
def test_where_all_is_border(scale: int, shape: tuple[int, int], rule: ResizeRule) -> None:
    for low, high in ((0, 256), (0, 2), (255, 256)):
        size = (shape[0] * scale, shape[1] * scale)
        image = np.random.default_rng(scale).integers(low, high, (*size, 1), dtype=np.uint8) * (255 if high == 2 else 1)
        expected = matlab_shrunk(image[..., 0], scale, rule)
        np.testing.assert_array_equal(downsample_uint8(image, scale, rule)[..., 0], expected)


def test_a_cut_out_of_a_larger_image() -> None:
    """What packing hands over: rows that do not lie side by side in memory."""
    image = np.random.default_rng(0).integers(0, 256, (25, 31, 3), dtype=np.uint8)
    for rule in RULES:
        cut = image[:24, :30]
        np.testing.assert_array_equal(downsample_uint8(cut, 2, rule), downsample_uint8(cut.copy(), 2, rule))


@pytest.mark.parametrize("rule", RULES)
def test_rounds_a_half_up_and_clamps(rule: ResizeRule) -> None:
    # A column of 128 beside zeros, halved: 128 * 0.43359375 = 55.5, 128 * 0.11328125 = 14.5, negative lobes clamp to 0.
    image = np.zeros((8, 8, 1), np.uint8)
    image[:, 3] = 128
    np.testing.assert_array_equal(downsample_uint8(image, 2, rule)[0, :, 0], [0, 56, 15, 0])


def test_the_two_roundings_by_hand() -> None:
    """A pixel of 8 beside zeros, halved: 8 * 0.43359375 = 3.469 of it are left after one axis.

    Rounded to 3, then 3 * 0.43359375 = 1.301, which is 1; not rounded, 3.469 * 0.43359375 = 1.504, which is 2.
    """
    image = np.zeros((8, 8, 1), np.uint8)
    image[3, 3] = 8
    assert [int(downsample_uint8(image, 2, rule)[1, 1, 0]) for rule in RULES] == [1, 1, 2]


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"not a multiple of 4"):
        downsample_uint8(np.zeros((8, 9, 3), np.uint8), 4)
    with pytest.raises(ValueError, match=r"by 1 to 16, not by 17"):
        downsample_uint8(np.zeros((17, 17, 3), np.uint8), 17)
