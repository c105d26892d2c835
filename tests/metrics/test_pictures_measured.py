"""Which picture of a folder is whose, and what is not taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcdistill.errors import UserError
from hpcdistill.metrics.pictures import Pictures, first_side, matched


def found(names: list[str], *files: str) -> list[str]:
    return [file.name for file in matched(Path("out"), [Path("out", file) for file in files], names)]


@pytest.mark.parametrize(
    "file", ["baby.png", "baby_x4.png", "babyx4.jpg", "baby-SRCNN.bmp", "baby (2).png", "baby.a.png"]
)
def test_a_picture_has_the_name_of_its_image_and_perhaps_an_affix(file: str) -> None:
    assert found(["baby", "bird"], "bird.png", file) == [file, "bird.png"]


def test_the_longest_name_wins_and_a_number_is_no_affix() -> None:
    assert found(["img1", "img10", "img1_b"], "img10_x2.png", "img1_x2.png", "img1_b_x2.png") == [
        "img1_x2.png",
        "img10_x2.png",
        "img1_b_x2.png",
    ]
    with pytest.raises(UserError, match=r"no picture of 1 of 2 images \(img1\)"):
        found(["img1", "img2"], "img10.png", "img2.png")


def test_the_very_name_wins_over_an_affix() -> None:
    assert found(["baby"], "baby.png", "baby_bicubic.png") == ["baby.png"]
    assert found(["ppt3.bmp", "ppt3.png"], "ppt3.png.png", "ppt3.bmp.png") == ["ppt3.bmp.png", "ppt3.png.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["babyish.png", "bird.png", "x1.png"], r"^out: no picture of 1 of 2 images \(baby\); give each the name"),
        (["x.png"], r"no picture of 2 of 2 images \(baby, bird\)"),
        (["baby_a.png", "baby_b.png", "bird.png"], r"several pictures of baby \(baby_a.png, baby_b.png\); leave one"),
        (["baby.png", "baby.jpg", "bird.png"], r"several pictures of baby \(baby.png, baby.jpg\)"),
    ],
)
def test_what_is_missing_or_not_certain_is_named(files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        found(["baby", "bird"], *files)


def test_of_many_that_are_missing_a_few_are_named() -> None:
    with pytest.raises(UserError, match=r"no picture of 7 of 7 images \(n0, n1, n2, n3, n4, \.\.\.\)"):
        found([f"n{number}" for number in range(7)], "other.png")


def test_pictures_are_read_as_rgb_of_the_size_that_is_wanted(tmp_path: Path) -> None:
    gray = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([gray, gray, gray + 1, np.full_like(gray, 255)])).save(tmp_path / "b.webp", lossless=True)
    pictures = Pictures(tmp_path, ["a", "b"])
    np.testing.assert_array_equal(pictures.read(0, 20, 30, ""), np.stack([gray] * 3))
    np.testing.assert_array_equal(pictures.read(1, 20, 30, ""), np.stack([gray, gray, gray + 1]))
    assert (pictures.is_gray(0), pictures.is_gray(1)) == (True, False)
    with pytest.raises(UserError, match=r"b\.webp: is 30x20, not 28x20, as b is cut to a multiple of 4$"):
        pictures.read(1, 20, 28, "cut to a multiple of 4")
    with pytest.raises(UserError, match=r"a\.png: is 30x20; translations are measured as squares"):
        first_side(tmp_path)


def test_sixteen_bits_are_not_rounded_by_us(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 300, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: has 16 or more bits a channel; convert it to 8-bit RGB"):
        Pictures(tmp_path, ["a"]).read(0, 9, 9, "")
