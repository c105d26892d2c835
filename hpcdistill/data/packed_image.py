"""One image made ready for a shard: HR as it is, and its down-sampled versions."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.images import MAX_PIXELS, encode_png, read_file, read_rgb
from hpcdistill.data.recipes import Source
from hpcdistill.data.sidecars import Digest
from hpcdistill.errors import UserError
from hpcdistill.ops.bicubic import downsample_uint8

SCALES = (2, 3, 4)
MIN_SIDE = 12  # an LR image at 4 of fewer than 3 x 3 pixels teaches nothing


@dataclass(frozen=True)
class PackedImage:
    """One sample ready to be written, in the order of its members in the tar."""

    digest: Digest
    members: tuple[tuple[str, bytes, int, int], ...]  # suffix, content, height, width

    @property
    def length(self) -> int:
        """Bytes in the tar: a header block a member, contents padded to blocks."""
        return sum(tarfile.BLOCKSIZE + padded(len(content)) for _, content, _, _ in self.members)


def pack_image(source: Source, max_pixels: int = MAX_PIXELS) -> PackedImage:
    """Decode one image and make its members; UserError when it cannot be used."""
    content = read_file(source.path, max_pixels=max_pixels)
    sha256 = hashlib.sha256(content).hexdigest()
    origin = (source.name, len(content), sha256)
    hr = read_rgb(content, str(source.path), max_pixels=max_pixels)
    del content
    height, width = hr.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{source.path}: {width} x {height} pixels are too few, the smallest side must be {MIN_SIDE} or more; "
            "take the image out"
        )
    images: list[tuple[str, NDArray[np.uint8]]] = [("hr.png", hr)]
    for scale in SCALES:
        cropped = hr[: height - height % scale, : width - width % scale]
        images.append((f"lr{scale}.png", downsample_uint8(cropped, scale)))
    members = [(suffix, encode_png(image), image.shape[0], image.shape[1]) for suffix, image in images]
    about = {
        "source": source.name,
        "sha256": sha256,
        "sizes": {suffix: [rows, columns] for suffix, _, rows, columns in members},
    }
    members.append(("json", json.dumps(about, ensure_ascii=False).encode(), 0, 0))
    return PackedImage(origin, tuple(members))


def padded(length: int) -> int:
    """Bytes that a content of `length` takes in a tar."""
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
