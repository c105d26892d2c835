"""Plain JPEGs, decoded by libjpeg-turbo directly: Pillow's pixels in half of its time.

simplejpeg and Pillow's wheels bring the same decoder; with its exact cosine transform and its smooth upsampling of
colour, both give the same bits (a test compares them). The time that Pillow adds goes into its 4-byte pixels and the
copies from and to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15 without the tables between them
_APP1, _SCAN = 0xE1, 0xDA
_NO_LENGTH = frozenset(range(0xD0, 0xDA)) | {0x00, 0x01}  # restarts, start and end: not expected before the first scan


@dataclass(frozen=True)
class Frame:
    """What a JPEG's markers say before its first scan."""

    height: int
    width: int
    plain: bool  # 8-bit gray or three colours, and no EXIF or XMP that may turn it


def read_frame(content: bytes) -> Frame | None:
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
        if marker == _SCAN:
            return Frame(*size, plain) if size else None
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in _NO_LENGTH or length < 2:
            return None
        if marker in _FRAMES:
            if size or at + 10 > len(content):
                return None
            precision, components = content[at + 4], content[at + 9]
            size = int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
            plain = plain and precision == 8 and components in (1, 3) and 0 not in size
        plain = plain and marker != _APP1
        at += 2 + length
    return None


def decode_plain(content: bytes) -> NDArray[np.uint8] | None:
    """The pixels [H, W, 3] of a plain JPEG; None for everything else, damaged ones too, which is Pillow's to judge."""
    frame = read_frame(content)
    if frame is None or not frame.plain:
        return None
    try:
        rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return rgb if rgb.shape == (frame.height, frame.width, 3) else None
