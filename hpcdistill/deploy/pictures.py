"""Pictures as people have them, read without losing what they are: gray, 16 bits, transparency, colour profiles.

What training must not guess about (`data.images`) has an answer here: the picture comes back as the kind it was.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hpcdistill.data.images import (
    DAMAGED,
    FORMATS,
    MAX_PIXELS,
    PNG_SIGNATURE,
    REMEDIES,
    has_alpha,
    header_size,
    read_file,
    too_large,
)
from hpcdistill.errors import UserError
from hpcdistill.storage import replacing

Pixels = NDArray[Any]  # uint8 or uint16, [H, W, channels]: gray, gray and alpha, RGB, RGB and alpha
SOFTWARE = b"Software\0hpcdistill"  # what a PNG that was written here says; it may be replaced
_DEEP = 16  # bits a channel
_LEVEL = 3  # of zlib; the filters do most of the work
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG's


@dataclass(frozen=True)
class Picture:
    """`pixels` `[H, W, channels]`, uint8 or uint16: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha."""

    pixels: Pixels
    profile: bytes | None = None  # ICC

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    @property
    def colour(self) -> Pixels:
        """Without alpha: `[H, W, 1 or 3]`."""
        return self.pixels[..., :-1] if self.has_alpha else self.pixels

    @property
    def white(self) -> int:
        """The largest value of a channel: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a file, upright as its EXIF says.

    Palettes become RGB (with alpha where they are transparent), CMYK becomes sRGB by its profile. UserError, with the
    file and the remedy, for what cannot be read, moves, has floating-point pixels or more than `max_pixels`.
    """
    content = read_file(path, max_pixels=max_pixels)
    size = header_size(content)
    if size and size[0] * size[1] > max_pixels:
        raise UserError(f"{path}: {too_large(size[0], size[1], max_pixels)}")
    if not content:
        raise UserError(f"{path}: the file is empty; copy it again")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UserError(f"{path}: {too_large(image.height, image.width, max_pixels)}")
            if _is_deep_png(content) and (image.mode != "I;16" or has_alpha(image)):
                return _deep(content, image)
            return from_pillow(image, str(path))
    except UserError:
        raise
    except DAMAGED as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            detail = f"no {', '.join(FORMATS)} image"
        raise UserError(f"{path}: cannot be decoded ({detail}); copy or export the picture again") from None


def from_pillow(image: Image.Image, name: str = "the picture") -> Picture:
    """The picture that a PIL image is, upright; UserError for an animation, floating-point pixels and none at all."""
    if not image.width or not image.height:
        raise UserError(f"{name}: has no pixels; give one of 1x1 or more")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG with a second view behind it
        raise UserError(f"{name}: {'; '.join(REMEDIES['animated'])}")
    if image.mode == "F" or image.mode == "I":
        raise UserError(f"{name}: {'; '.join(REMEDIES['F' if image.mode == 'F' else 'deep'])}, or to 16-bit gray")
    if 0 in image.size:
        raise UserError(f"{name}: has no pixels; give a picture")
    image.load()
    profile: bytes | None = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        levels = np.asarray(upright)
        return Picture(levels.astype(levels.dtype.newbyteorder("=").type)[..., None], profile)
    if upright.mode == "CMYK":
        upright, profile = _from_cmyk(upright, profile), None
    gray = upright.mode in ("1", "L", "LA", "La")
    clear = has_alpha(upright)
    mode = ("LA" if clear else "L") if gray else ("RGBA" if clear else "RGB")
    pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    return Picture(pixels.reshape(pixels.shape[0], pixels.shape[1], -1), profile)


def to_pillow(picture: Picture) -> Image.Image:
    """As a PIL image, with its profile where that fits.

    PIL has no colour of 16 bits: UserError; write it to a file instead.
    """
    pixels, deep = picture.pixels, picture.white > 255
    if deep and pixels.shape[2] != 1:
        raise UserError("PIL has no 16-bit colour; use `hpcdistill infer`, which writes it to a file")
    image = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0]))
    if profile := _fitting(picture.profile, pixels.shape[2]):
        image.info["icc_profile"] = profile
    return image


def write_png(path: Path, size: tuple[int, int], strips: Iterable[Pixels], profile: bytes | None = None) -> None:
    """Write a picture of `size` (height, width) as PNG while its `strips` `[h, W, channels]` are still being made.

    Pillow needs the whole picture, at four bytes a pixel, and knows no colour of 16 bits; this needs one strip. A
    `profile` of another colour space than the pixels' is left out. The file is whole or absent.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(PNG_SIGNATURE)
        packer = zlib.compressobj(_LEVEL)
        above: Pixels | None = None
        for strip in strips:
            if above is None:
                deep = strip.dtype == np.uint16
                header = struct.pack(">IIBB", size[1], size[0], 16 if deep else 8, _COLOUR_TYPES[strip.shape[2]])
                _chunk(file, b"IHDR", header + b"\0\0\0")
                if profile := _fitting(profile, strip.shape[2]):
                    _chunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
                _chunk(file, b"tEXt", SOFTWARE)
            for lines in _filtered(strip, above):
                if packed := packer.compress(lines):
                    _chunk(file, b"IDAT", packed)
            above = strip[-1:]
        _chunk(file, b"IDAT", packer.flush())
        _chunk(file, b"IEND", b"")


def _fitting(profile: bytes | None, channels: int) -> bytes | None:
    """The profile, where its colour space (bytes 16 to 19, ICC.1:2022, 7.2) is that of pixels of so many channels.

    Of a translated gray picture, now RGB, it is not. PNG forbids any other (PNG, third edition, 11.3.2.3).
    """
    return profile if profile and profile[16:20] == (b"GRAY" if channels < 3 else b"RGB ") else None


def _chunk(file: IO[bytes], kind: bytes, content: bytes) -> None:
    file.write(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
    )


def _filtered(strip: Pixels, above: Pixels | None, lines: int = 64) -> Iterator[bytes]:
    """The rows of a strip as PNG wants them: each a byte that names its filter, and its differences.

    The filter is the mean of the pixels to the left and above (3), which suits photographs.
    """
    height, _, channels = strip.shape
    raw = np.ascontiguousarray(strip.astype(strip.dtype.newbyteorder(">"))).view(np.uint8).reshape(height, -1)
    pixel = channels * strip.dtype.itemsize
    last = np.zeros((1, raw.shape[1]), np.uint8)
    if above is not None:
        last = np.ascontiguousarray(above.astype(strip.dtype.newbyteorder(">"))).view(np.uint8).reshape(1, -1)
    for top in range(0, height, lines):
        part = raw[top : top + lines]
        up = np.concatenate([last, part[:-1]])
        left = np.zeros_like(part)
        left[:, pixel:] = part[:, :-pixel]
        # (a + b) / 2 without a wider type: the bits that both have, and half of those that differ.
        mean = (left & up) + ((left ^ up) >> 1)
        coded = np.empty((len(part), raw.shape[1] + 1), np.uint8)
        coded[:, 0] = 3
        np.subtract(part, mean, out=coded[:, 1:])
        last = part[-1:]
        yield coded.tobytes()


def _is_deep_png(content: bytes) -> bool:
    """Whether it is a PNG of 16 bits: of all but opaque gray Pillow loses half without a word."""
    return content[:8] == PNG_SIGNATURE and content[24] == _DEEP


def _deep(content: bytes, opened: Image.Image) -> Picture:
    from imagecodecs import png_decode

    try:
        pixels = np.asarray(png_decode(content))
    except Exception as error:  # its own class for each codec
        raise ValueError(str(error)) from None
    pixels = _upright(pixels.reshape(*pixels.shape[:2], -1), opened.getexif().get(0x0112, 1))
    return Picture(np.ascontiguousarray(pixels), opened.info.get("icc_profile"))


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """`pixels` turned as an EXIF orientation of 1 to 8 says (Exif 3.0, tag 0x0112)."""
    turned = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return turned


def _from_cmyk(image: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB by the picture's profile; without one, or with one that cannot be used, by Pillow's plain formula."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError:
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
