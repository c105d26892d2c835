"""Decoding what others wrote: good images come out equal, bad ones as one line with the file and the remedy."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcdistill.data.images import (
    carries_alpha,
    colour,
    count_pixels,
    decode_plain_jpeg,
    encode_png,
    header_size,
    read_rgb,
)
from hpcdistill.errors import UserError


def pixels(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def webp_header(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_with_size(width: int, height: int) -> bytes:
    content = encoded(Image.fromarray(pixels()), "JPEG")
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_lossless_formats_come_out_equal(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels()).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_rgb(path), pixels())
    np.testing.assert_array_equal(read_rgb(path.read_bytes(), "a"), pixels())
    assert count_pixels(path) == 600
    monkeypatch.setattr("hpcdistill.data.images._STRIP_PIXELS", 100)  # of large images: 3 rows here
    np.testing.assert_array_equal(read_rgb(path), pixels())


SOFT = np.asarray(Image.fromarray(pixels(6, 9)).resize((61, 43), Image.Resampling.BICUBIC))
JPEGS: dict[str, tuple[np.ndarray, dict[str, object]]] = {
    "4:2:0": (SOFT, {"quality": 75}),
    "4:2:2": (SOFT, {"quality": 90, "subsampling": 1}),
    "4:4:4": (SOFT, {"quality": 100, "subsampling": 0}),
    "noise": (pixels(33, 50), {"quality": 95}),
    "progressive": (SOFT, {"progressive": True, "optimize": True}),
    "restarts": (SOFT, {"restart_marker_blocks": 2}),
    "gray": (SOFT[:, :, 1], {"quality": 85}),
    "RGB, not YCbCr": (SOFT, {"keep_rgb": True}),
    "colour profile": (SOFT, {"icc_profile": bytes(70_000), "comment": "two\nlines"}),
    "one pixel": (SOFT[:1, :1], {}),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_plain_jpegs_have_pillows_bits_without_pillow(kind: str) -> None:
    image, options = JPEGS[kind]
    content = encoded(Image.fromarray(image), "JPEG", **options)
    fast = decode_plain_jpeg(content)
    assert fast is not None
    np.testing.assert_array_equal(fast, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    np.testing.assert_array_equal(read_rgb(content), fast)
    assert header_size(content) == image.shape[:2]


def test_what_is_no_plain_jpeg_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(SOFT), "JPEG", exif=exif, quality=100, subsampling=0)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    by_xmp = encoded(Image.fromarray(SOFT), "JPEG", xmp=xmp, quality=100, subsampling=0)
    upright = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(SOFT), "JPEG", quality=100, subsampling=0))))
    for content in (turned, by_xmp):
        assert decode_plain_jpeg(content) is None
        assert header_size(content) == SOFT.shape[:2]
        np.testing.assert_array_equal(read_rgb(content), np.rot90(upright, -1))
    plain = encoded(Image.fromarray(SOFT), "JPEG")
    precision = plain.index(b"\xff\xc0") + 4
    others = {
        "12 bits": plain[:precision] + b"\x0c" + plain[precision + 1 :],
        "CMYK": encoded(Image.fromarray(SOFT).convert("CMYK"), "JPEG"),
        "PNG": encode_png(SOFT),
        "cut": plain[:-100],
        "two frames": plain[: precision - 4] + plain[precision - 4 : precision + 15] + plain[precision - 4 :],
        "nothing": b"",
    }
    for kind, content in others.items():
        assert decode_plain_jpeg(content) is None, kind


def test_damaged_jpegs_give_what_pillow_alone_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    contents = []
    for number in range(300):
        image, options = list(JPEGS.values())[number % 7]
        content = bytearray(encoded(Image.fromarray(image), "JPEG", **options))
        for place in random.integers(2, len(content), 1 + number % 3):
            content[place] = random.integers(256)
        contents.append(bytes(content[: random.integers(2, len(content))] if number % 5 == 0 else content))
    found = [outcome(content) for content in contents]
    monkeypatch.setattr("hpcdistill.data.images.decode_plain_jpeg", lambda _: None)
    for number, content in enumerate(contents):
        expected = outcome(content)
        assert type(found[number]) is type(expected), (number, found[number], expected)
        np.testing.assert_array_equal(found[number], expected)


def outcome(content: bytes) -> np.ndarray | str:
    try:
        return read_rgb(content)
    except UserError as error:
        return str(error)


def test_real_jpegs_have_pillows_bits(test_data: Path) -> None:
    files = [*(test_data / "i2i/edges2shoes").glob("*/*.jpg"), *(test_data / "sr_test/B100/HR").glob("*.jpg")]
    assert len(files) == 220
    for file in files:
        content = file.read_bytes()
        fast = decode_plain_jpeg(content)
        assert fast is not None
        np.testing.assert_array_equal(fast, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), str(file))


def test_gray_and_opaque_palette_become_rgb() -> None:
    gray = pixels()[..., 0]
    np.testing.assert_array_equal(read_rgb(encoded(Image.fromarray(gray), "PNG")), np.stack([gray] * 3, axis=-1))
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    indices = np.arange(12).reshape(3, 4) % 3
    palette = Image.fromarray(indices.astype(np.uint8), "L")
    palette.putpalette(colours.tobytes())
    assert palette.mode == "P"
    np.testing.assert_array_equal(read_rgb(encoded(palette, "PNG")), colours[indices])


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    content = encoded(Image.fromarray(pixels()), "PNG", exif=exif)
    np.testing.assert_array_equal(read_rgb(content), np.rot90(pixels(), -1))


RGBA = Image.fromarray(np.dstack([pixels(), pixels()[..., :1]]))
_FIRST = tuple(pixels()[0, 0].tolist())
REFUSED = {
    "rgba": (encoded(RGBA, "PNG"), "alpha.*flatten it to RGB"),
    "rgba webp": (encoded(RGBA, "WEBP", lossless=True), "alpha.*flatten"),
    "gray + alpha": (encoded(RGBA.convert("LA"), "PNG"), "alpha.*flatten"),
    "transparent colour": (encoded(Image.fromarray(pixels()), "PNG", transparency=_FIRST), "alpha.*flatten"),
    "transparent palette": (encoded(Image.fromarray(pixels()).quantize(8), "PNG", transparency=0), "alpha.*flatten"),
    "16-bit gray": (encoded(Image.fromarray(pixels()[..., 0].astype(np.uint16)), "PNG"), "16 or more bits.*8-bit RGB"),
    "16-bit RGB": (
        png_header(2, 1, depth=16) + png_chunk(b"IDAT", zlib.compress(bytes(13))) + png_chunk(b"IEND", b""),
        "16 or more bits.*8-bit RGB",
    ),
    "cmyk": (encoded(Image.fromarray(pixels()).convert("CMYK"), "JPEG"), "CMYK; convert it to 8-bit sRGB"),
    "animated": (
        encoded(Image.fromarray(pixels()), "PNG", save_all=True, append_images=[Image.fromarray(pixels()[::-1])]),
        "animation; export the frame",
    ),
    "empty": (b"", "empty; copy it again"),
    "text": (b"this is not an image, whatever its suffix says", "cannot be decoded.*export the image again"),
    "tiff": (encoded(Image.fromarray(pixels()), "TIFF"), "cannot be decoded"),
    "gif": (encoded(Image.fromarray(pixels()), "GIF"), "cannot be decoded"),
    "truncated png": (encode_png(pixels())[:-200], "cannot be decoded.*copy or export"),
    "truncated jpeg": (encoded(Image.fromarray(pixels()), "JPEG")[:-200], "cannot be decoded.*copy or export"),
    "truncated bmp": (encoded(Image.fromarray(pixels()), "BMP")[:-200], "cannot be decoded.*copy or export"),
    "truncated webp": (encoded(Image.fromarray(pixels()), "WEBP")[:-200], "cannot be decoded.*copy or export"),
    "header only": (png_header(30, 20), "cannot be decoded.*copy or export"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line_with_file_and_remedy(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_rgb(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bomb", [png_header, bmp_header, webp_header, jpeg_with_size])
def test_hostile_header_is_refused_before_anything_is_allocated(bomb: Callable[[int, int], bytes]) -> None:
    content = bomb(50_000, 50_000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.png: its header says 50000 x 50000 pixels.*limit of 80 megapixels"):
        read_rgb(content, "bomb.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert read_rgb(encode_png(pixels()), max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(UserError, match=r"limit of 0\.000599 megapixels"):
        read_rgb(encode_png(pixels()), max_pixels=599)


def test_files_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match=r"a\.png: 1099511627776 bytes are more than"):
        read_rgb(path)
    with pytest.raises(UserError, match=r"nothing\.png: cannot be read \(No such file"):
        read_rgb(tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"a\.pkl: not a suffix that is read"):
        read_rgb(tmp_path / "a.pkl")


OPAQUE = np.dstack([pixels(), np.full(pixels().shape[:2], 255, np.uint8)])
PALETTE = Image.fromarray(pixels()).quantize(8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.fromarray(OPAQUE), "PNG"), pixels()),
        (encoded(Image.fromarray(OPAQUE).convert("LA"), "PNG"), np.asarray(Image.fromarray(pixels()).convert("L"))),
        (encoded(PALETTE, "PNG", transparency=200), np.asarray(PALETTE.convert("RGB"))),  # a colour that no pixel has
    ],
)
def test_an_alpha_that_is_opaque_everywhere_is_dropped(content: bytes, expected: np.ndarray) -> None:
    assert carries_alpha(content)
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, axis=-1)
    np.testing.assert_array_equal(read_rgb(content), expected)
    np.testing.assert_array_equal(read_rgb(content, background=(255, 0, 0)), expected)


@pytest.mark.parametrize("strip", [4_000_000, 4])
def test_transparent_pixels_are_laid_over_a_colour(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    monkeypatch.setattr("hpcdistill.data.images._STRIP_PIXELS", strip)
    image = Image.new("RGBA", (4, 2), (200, 100, 0, 255))
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.putpixel((1, 0), (255, 255, 255, 51))  # a fifth
    flat = read_rgb(encoded(image, "PNG"), background=colour("#0000ff"))
    assert flat[0, :3].tolist() == [[0, 0, 255], [51, 51, 255], [200, 100, 0]]
    assert (flat[1] == (200, 100, 0)).all()
    with pytest.raises(UserError, match=r"x\.png: has an alpha channel with transparent pixels; .*--flatten white"):
        read_rgb(encoded(image, "PNG"), "x.png")


def test_colours() -> None:
    assert [colour(text) for text in ("white", "#808080", " Red ")] == [(255, 255, 255), (128, 128, 128), (255, 0, 0)]
    for text in ("", "whiet", "#12", "#11223344", "rgba(1,2,3,4)"):
        with pytest.raises(UserError, match=r"is no opaque colour; give a name or #rrggbb, e\.g\. white or #808080"):
            colour(text)
