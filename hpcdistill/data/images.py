"""Reading images from anywhere without trusting them, and writing PNG with the same bytes every time.

Only 8-bit gray, palette and RGB images are read: everything else (transparency, 16-bit, CMYK) would need a choice that
is the user's to make, so it ends in one line that names the file and the remedy. An alpha channel that is opaque
everywhere needs none. The size in the header is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from hpcdistill.data.folders import SUFFIXES
from hpcdistill.errors import UserError

MAX_PIXELS = 80_000_000  # 240 MB as 8-bit RGB; packing one takes less than 1 GiB

Colour = tuple[int, int, int]  # red, green, blue in 0..255

# The limit here is `max_pixels`, checked on the header of every image; Pillow's own would cap it at 179 megapixels.
Image.MAX_IMAGE_PIXELS = None

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# What Pillow's readers raise on damaged files; they have no common class.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, OverflowError, IndexError, KeyError, TypeError),
    *(struct.error, zlib.error),
)
_STRIP_PIXELS = 4_000_000
_PNG_LEVEL = 3  # of 9: within 1 % of the size of 6 (zlib-ng, photographs) in 40 % of its time
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15 without the tables between them
_JPEG_APP1, _JPEG_SCAN = 0xE1, 0xDA
# Restarts, start and end of an image: not expected before the first scan.
_JPEG_NO_LENGTH = frozenset(range(0xD0, 0xDA)) | {0x00, 0x01}
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
REMEDIES = {
    "alpha": ("has an alpha channel with transparent pixels", "flatten it to RGB, e.g. with --flatten white"),
    "deep": ("has 16 or more bits a channel", "convert it to 8-bit RGB"),
    "CMYK": ("is in CMYK", "convert it to 8-bit sRGB"),
    "F": ("has floating-point pixels", "convert it to 8-bit RGB"),
    "animated": ("is an animation", "export the frame you want as an image"),
}


def read_rgb(
    source: Path | bytes,
    name: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: Colour | None = None,
) -> NDArray[np.uint8]:
    """Decode a file, or the content of one, to `[H, W, 3]` 8-bit RGB; EXIF orientation is applied.

    8-bit gray, palettes and an alpha of 255 everywhere become RGB; transparent pixels are laid over `background`.
    `name` is what messages call the image (default: its path). Raises UserError for anything that cannot be read, is
    larger than `max_pixels`, is not 8-bit gray or RGB, or is transparent without a `background`.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    content = source if isinstance(source, bytes) else read_file(source, max_pixels=max_pixels)
    _check_header(content, name, max_pixels)
    plain = decode_plain_jpeg(content)
    if plain is not None:
        return plain
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            refusal = _refusal(image, max_pixels)
            pixels = None if refusal else _decode(image, background)
            if pixels is None and not refusal:
                refusal = "; ".join(REMEDIES["alpha"])
    except DAMAGED as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            detail = f"no {', '.join(FORMATS)} image"
        raise UserError(f"{name}: cannot be decoded ({detail}); copy or export the image again") from None
    if refusal:
        raise UserError(f"{name}: {refusal}")
    assert pixels is not None
    return pixels


def colour(text: str) -> Colour:
    """The colour that `text` is, by its name or as #rrggbb; UserError for none, and for one that is transparent."""
    try:
        found = ImageColor.getrgb(text.strip())
    except ValueError:
        found = (0, 0, 0, 0)
    if len(found) != 3:
        raise UserError(f"--flatten {text}: is no opaque colour; give a name or #rrggbb, e.g. white or #808080")
    return found[0], found[1], found[2]


def carries_alpha(content: bytes) -> bool:
    """True when the image that `content` holds has an alpha channel or a transparent colour."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return has_alpha(image)


def is_gray(source: Path | bytes) -> bool:
    """True when an image file, or the content of one, stores one channel of gray, with or without alpha.

    An RGB file of equal channels is none: MATLAB's code for super-resolution goes by what the file stores. Only the
    header is read; of a PNG's content the first 26 bytes will do. False for what is no image: reading it says why.
    """
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            head = file.read(26)
            if head[:8] == PNG_SIGNATURE:
                return head[25:] in (b"\x00", b"\x04")  # colour type: gray, gray with alpha
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                return image.mode in ("1", "L", "LA", "La")
    except DAMAGED:
        return False


def read_packed(content: bytes, size: tuple[int, int], name: str, remedy: str) -> NDArray[np.uint8]:
    """Decode the content of a shard's image, which the index says has `size` (height, width): [H, W, 3].

    UserError, before a pixel is decoded where the header tells it, when it has another; else as `read_rgb`. Both end
    with `remedy`.
    """
    found = header_size(content)
    if found is None or sorted(found) == sorted(size):  # EXIF may turn it by 90 degrees
        try:
            rgb = read_rgb(content, name)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        found = rgb.shape[0], rgb.shape[1]
        if found == size:
            return rgb
    raise UserError(f"{name} is {found[1]}x{found[0]} pixels instead of the index's {size[1]}x{size[0]}; {remedy}")


def read_file(path: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The content of an image file; UserError when it cannot be read or is far too large to be such an image."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: not a suffix that is read ({', '.join(SUFFIXES)}); convert it to PNG")
    try:
        length = path.stat().st_size
        if length > 4 * max_pixels + (1 << 24):  # an uncompressed BMP with four bytes a pixel
            raise UserError(
                f"{path}: {length} bytes are more than an image of {max_pixels / 1e6:g} megapixels has; "
                "cut it into tiles"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def header_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) from the header of a PNG, JPEG or WebP, None for other formats; decodes and allocates nothing.

    It is the size before EXIF turns the image.
    """
    if content[:8] == PNG_SIGNATURE and len(content) >= 26:
        width, height = struct.unpack(">II", content[16:24])
        return height, width
    frame = _jpeg_frame(content)
    if frame:
        return frame.height, frame.width
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and len(content) >= 30:
        # Pillow hands a WebP to a decoder that allocates its canvas on opening, so its size has to be known before.
        kind = content[12:16]
        if kind == b"VP8X":
            width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
            return height, width
        if kind == b"VP8L":
            bits = int.from_bytes(content[21:25], "little")
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        if kind == b"VP8 ":
            width, height = (int.from_bytes(content[at : at + 2], "little") & 0x3FFF for at in (26, 28))
            return height, width
    return None


def count_pixels(path: Path) -> int:
    """The number of pixels that a file's header claims, 0 when that cannot be told; decodes nothing."""
    try:
        with open(path, "rb") as file:
            size = header_size(file.read(32))
        if size:
            return size[0] * size[1]
        with Image.open(path, formats=FORMATS) as image:
            return image.width * image.height
    except DAMAGED:
        return 0


def encode_png(image: NDArray[np.uint8], software: str = "") -> bytes:
    """`[H, W, 3]` 8-bit RGB, or `[H, W, 1]` gray, to PNG; the same bytes for the same pixels, Pillow and zlib.

    With `software`, the file says that it was made by that.
    """
    assert image.dtype == np.uint8
    assert image.shape[2:] in ((3,), (1,))
    buffer = io.BytesIO()
    about = PngInfo() if software else None
    if about:
        about.add_text("Software", software)
    Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(
        buffer, "PNG", compress_level=_PNG_LEVEL, pnginfo=about
    )
    return buffer.getvalue()


def _check_header(content: bytes, name: str, max_pixels: int) -> None:
    """Refuse what Pillow would hide (16-bit RGB is cut to 8 bits unasked) or allocate for, before it sees the file."""
    if not content:
        raise UserError(f"{name}: the file is empty; copy it again")
    size = header_size(content)
    if size and size[0] * size[1] > max_pixels:
        raise UserError(f"{name}: {too_large(size[0], size[1], max_pixels)}")
    if content[:8] == PNG_SIGNATURE and content[24:25] == b"\x10":
        raise UserError(f"{name}: {'; '.join(REMEDIES['deep'])}")


def _refusal(image: Image.Image, max_pixels: int) -> str | None:
    """Why an opened, not yet decoded image is not taken, with the remedy."""
    if image.width * image.height > max_pixels:
        return too_large(image.height, image.width, max_pixels)
    reason: str | None = None
    if image.mode.startswith("I"):
        reason = "deep"
    elif image.mode in ("CMYK", "F"):
        reason = image.mode
    elif image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        reason = "animated"
    elif image.mode not in ("1", "L", "P", "RGB", *_ALPHA_MODES):
        return f"has the colour mode {image.mode}; convert it to 8-bit RGB"
    return "; ".join(REMEDIES[reason]) if reason else None


def _decode(image: Image.Image, background: Colour | None) -> NDArray[np.uint8] | None:
    """The pixels, turned as EXIF says, None for transparent ones without a background.

    Copies only where it must, as an image may have 80 megapixels.
    """
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    alpha = has_alpha(image)
    image = image if image.mode == ("RGBA" if alpha else "RGB") else image.convert("RGBA" if alpha else "RGB")
    clear = alpha and image.getchannel("A").getextrema() != (255, 255)
    if clear and background is None:
        return None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    strip = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, strip):  # in one go Pillow would hold two more copies
        bottom = min(top + strip, image.height)
        part = image.crop((0, top, image.width, bottom))
        if clear and background is not None:
            part = _laid_over(background, part)
        pixels[top:bottom] = np.asarray(part)[..., :3]
    return pixels


def _laid_over(background: Colour, image: Image.Image) -> Image.Image:
    """The image, RGBA, on that colour."""
    flat = Image.new("RGBA", image.size, (*background, 255))
    flat.alpha_composite(image)
    return flat


def has_alpha(image: Image.Image) -> bool:
    """Whether an opened image has an alpha channel or a transparent colour."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def too_large(height: int, width: int, max_pixels: int) -> str:
    """Why an image of such a size is not read, and what to do."""
    return (
        f"its header says {width} x {height} pixels, more than the limit of {max_pixels / 1e6:g} megapixels; "
        "cut it into tiles, or raise the limit if you trust the file"
    )


@dataclass(frozen=True)
class _JpegFrame:
    """What a JPEG's markers say before its first scan."""

    height: int
    width: int
    plain: bool  # 8-bit gray or three colours, and no EXIF or XMP that may turn it


def _jpeg_frame(content: bytes) -> _JpegFrame | None:
    """The frame of a JPEG; None for another format and where the markers are not what they should be."""
    if content[:2] != b"\xff\xd8":
        return None
    size: tuple[int, int] | None = None
    plain = True
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _JPEG_SCAN:
            return _JpegFrame(*size, plain) if size else None
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in _JPEG_NO_LENGTH or length < 2:
            return None
        if marker in _JPEG_FRAMES:
            if size or at + 10 > len(content):
                return None
            precision, components = content[at + 4], content[at + 9]
            size = int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
            plain = plain and precision == 8 and components in (1, 3) and 0 not in size
        plain = plain and marker != _JPEG_APP1
        at += 2 + length
    return None


def decode_plain_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """The pixels [H, W, 3] of a plain JPEG; None for everything else, damaged ones too, which Pillow decides on.

    libjpeg-turbo is called directly: Pillow's pixels in half of its time, which goes into its 4-byte pixels and copies.
    simplejpeg and Pillow's wheels bring the same decoder; with its exact cosine transform and its smooth upsampling of
    colour, both give the same bits (a test compares them).
    """
    frame = _jpeg_frame(content)
    if frame is None or not frame.plain:
        return None
    try:
        rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return rgb if rgb.shape == (frame.height, frame.width, 3) else None
