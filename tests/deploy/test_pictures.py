"""Pictures of every kind, against Pillow and imagecodecs as independent readers and writers."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from imagecodecs import png_decode, png_encode
from PIL import Image, ImageCms

from hpcdistill.deploy.pictures import Picture, from_pillow, read_picture, to_pillow, write_png
from hpcdistill.errors import UserError

RANDOM = np.random.default_rng(0)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RANDOM.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("strips", [(21,), (1, 9, 11)])
def test_what_is_written_other_programs_read(
    tmp_path: Path, channels: int, dtype: type, strips: tuple[int, ...]
) -> None:
    pixels = noise(21, 13, channels, dtype=dtype)
    tops = np.cumsum([0, *strips])
    parts = (pixels[top : top + length] for top, length in zip(tops, strips, strict=False))
    write_png(tmp_path / "a.png", (21, 13), parts, PROFILE)
    read = png_decode((tmp_path / "a.png").read_bytes()).reshape(pixels.shape)
    np.testing.assert_array_equal(read, pixels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info.get("icc_profile") == (PROFILE if channels > 2 else None)
        image.load()  # every checksum


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield noise(4, 5, 3)
        raise UserError("the network failed")

    with pytest.raises(UserError, match="the network failed"):
        write_png(tmp_path / "a.png", (8, 5), broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_stay_16_bits(tmp_path: Path, channels: int) -> None:
    pixels = noise(9, 7, channels, dtype=np.uint16)
    (tmp_path / "deep.png").write_bytes(png_encode(pixels if channels > 1 else pixels[..., 0]))
    picture = read_picture(tmp_path / "deep.png")
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.white == 65535


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_exif_turns_a_picture_as_pillow_does(tmp_path: Path, orientation: int, deep: bool) -> None:
    small = noise(5, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = io.BytesIO()
    Image.fromarray(small).save(stored, "PNG", exif=exif)
    upright = Image.open(io.BytesIO(stored.getvalue()))
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(upright))
    content = stored.getvalue()
    if deep:
        plain = png_encode(small.astype(np.uint16) * 257)
        at = content.index(b"eXIf") - 4
        length = int.from_bytes(content[at : at + 4], "big") + 12
        content = plain[:33] + content[at : at + length] + plain[33:]  # after the header
        expected = expected.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").pixels, expected)


def test_kinds_of_pictures(tmp_path: Path) -> None:
    gray = noise(6, 4)
    palette = Image.fromarray(noise(6, 4, 3)).quantize(8)
    palette.info["transparency"] = 3
    expected = np.asarray(palette.convert("RGBA"))
    assert set(np.unique(expected[..., 3])) == {0, 255}
    cases = {
        "L": (Image.fromarray(gray), gray[..., None]),
        "1": (Image.fromarray(gray > 99), ((gray > 99) * 255)[..., None]),
        "P": (palette, expected),
        "RGBA": (Image.fromarray(rgba := noise(6, 4, 4)), rgba),
        "LA": (Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray.T.copy().reshape(6, 4))]), None),
    }
    for name, (image, pixels) in cases.items():
        file = tmp_path / f"{name}.png"
        image.save(file, **({"transparency": 3} if name == "P" else {}))
        picture = read_picture(file)
        if pixels is not None:
            np.testing.assert_array_equal(picture.pixels, pixels, err_msg=name)
        assert picture.has_alpha == (name in ("P", "RGBA", "LA")), name
    assert read_picture(tmp_path / "LA.png").pixels.shape == (6, 4, 2)


def test_cmyk_becomes_rgb_by_its_profile(tmp_path: Path) -> None:
    image = Image.fromarray(noise(16, 16, 3)).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as plain:
        expected = np.asarray(plain.convert("RGB"))
    picture = read_picture(tmp_path / "a.jpg")
    np.testing.assert_array_equal(picture.pixels, expected)
    image.save(tmp_path / "b.jpg", quality=95, icc_profile=PROFILE)  # a profile of RGB: it cannot be used
    picture = read_picture(tmp_path / "b.jpg")
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.profile is None  # of CMYK, and these pixels are none


def test_a_profile_stays(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 4, 3)).save(tmp_path / "a.jpg", icc_profile=PROFILE)
    assert read_picture(tmp_path / "a.jpg").profile == PROFILE
    assert to_pillow(read_picture(tmp_path / "a.jpg")).info["icc_profile"] == PROFILE


@pytest.mark.parametrize(("channels", "space"), [(3, b"GRAY"), (1, b"RGB "), (2, b"RGB "), (4, b"Lab ")])
def test_a_profile_of_other_pixels_goes(tmp_path: Path, channels: int, space: bytes) -> None:
    """A translated gray picture is RGB: readers refuse it, or show it wrong, with the profile of gray."""
    profile = PROFILE[:16] + space + PROFILE[20:]
    pixels = noise(6, 4, channels)
    assert "icc_profile" not in to_pillow(Picture(pixels, profile)).info
    write_png(tmp_path / "a.png", (6, 4), [pixels], profile)
    with Image.open(tmp_path / "a.png") as image:
        assert "icc_profile" not in image.info


def test_gray_of_16_bits_keeps_its_transparent_level(tmp_path: Path) -> None:
    pixels = noise(6, 4, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"tRNS" + int(pixels[2, 1]).to_bytes(2, "big")
    (tmp_path / "a.png").write_bytes(
        content[:33] + b"\0\0\0\2" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[33:]  # behind IHDR
    )
    found = read_picture(tmp_path / "a.png").pixels
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[..., 0], pixels)
    np.testing.assert_array_equal(found[..., 1], np.where(pixels == pixels[2, 1], 0, 65535))


def test_nothing_is_no_picture() -> None:
    with pytest.raises(UserError, match="the picture: has no pixels"):
        from_pillow(Image.new("RGB", (0, 4)))


def test_pil_and_back() -> None:
    for mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        image = Image.fromarray(noise(5, 6, dtype=np.uint16)) if mode == "I;16" else Image.new(mode, (6, 5), 7)
        assert to_pillow(from_pillow(image)).mode == mode
    with pytest.raises(UserError, match="PIL has no 16-bit colour"):
        to_pillow(Picture(noise(5, 6, 3, dtype=np.uint16)))


def test_bad_pictures_are_one_line(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(30, 30, 3)).save(whole, "PNG")
    deep = png_encode(noise(30, 30, 3, dtype=np.uint16))
    frames = [Image.fromarray(noise(5, 5, 3)) for _ in range(3)]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    contents = {
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"hello, world", "cannot be decoded"),
        "cut.png": (whole.getvalue()[:600], "cannot be decoded"),
        "cut_deep.png": (deep[:600], "cannot be decoded"),
        "page.txt": (b"x", "not a suffix that is read"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UserError, match="is an animation"):
        read_picture(tmp_path / "moves.webp")
    (tmp_path / "whole.png").write_bytes(whole.getvalue())
    with pytest.raises(UserError, match="megapixels"):
        read_picture(tmp_path / "whole.png", max_pixels=800)
    with pytest.raises(UserError, match="floating-point pixels"):
        from_pillow(Image.open(tmp_path / "f.tiff"))
