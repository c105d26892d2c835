"""One sample made ready for a shard: HR and its down-sampled versions, or the images of a translation as they are."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcdistill.data.images import MAX_PIXELS, carries_alpha, encode_png, is_gray, read_file, read_rgb
from hpcdistill.data.index import Kind, role_of
from hpcdistill.data.pack.sources import Digest, FileDigest, Source, digest_of_files
from hpcdistill.errors import UserError
from hpcdistill.ops.downsampling import ResizeRule, downsample_uint8

SCALES = (2, 3, 4)
MIN_SIDE = 12  # an LR image at 4 of fewer than 3 x 3 pixels teaches nothing

Rgb = NDArray[np.uint8]  # [H, W, 3]; a gray HR is [H, W, 1]
PackedMember = tuple[str, bytes, int, int]  # suffix, content, height, width of the decoded image


@dataclass(frozen=True)
class Form:
    """How the images of a super-resolution set are stored."""

    resize: ResizeRule = "newer"  # of LR images that are computed
    keeps_gray: bool = True  # HR of a gray file is a gray PNG; else RGB, as all others


NEWEST = Form()


@dataclass(frozen=True)
class PackedImage:
    """One sample ready to be written, in the order of its members in the tar."""

    digest: Digest
    members: tuple[PackedMember, ...]

    @property
    def length(self) -> int:
        """Bytes in the tar: a header block a member, contents padded to blocks."""
        return sum(tarfile.BLOCKSIZE + padded(len(content)) for _, content, _, _ in self.members)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its images."""
        return tuple(role_of(suffix) for suffix, _, _, _ in self.members if suffix != "json")


def pack_image(source: Source, kind: Kind, max_pixels: int = MAX_PIXELS, form: Form = NEWEST) -> PackedImage:
    """Decode the files of one sample and make its members; UserError when it cannot be used.

    `lr-hr`: HR as PNG and its LRs, computed, or the official files when the source has them. `paired` and `unpaired`:
    the bytes of the files themselves (BMP and what has alpha become PNG), once decoded and found of the right sizes.
    """
    if kind == "lr-hr":
        files, members = _lr_hr(source, max_pixels, form)
    else:
        files, members = _translation(source, max_pixels)
    digest = digest_of_files(source.name, files)
    about = {
        "source": source.name,
        "sha256": digest[2],
        "sizes": {suffix: [rows, columns] for suffix, _, rows, columns in members},
    }
    if len(files) > 1:
        about["files"] = {
            role: {"name": path.name, "sha256": sha256}
            for (role, path), (_, _, sha256) in zip(source.files, files, strict=True)
        }
    members.append(("json", json.dumps(about, ensure_ascii=False).encode(), 0, 0))
    return PackedImage(digest, tuple(members))


def padded(length: int) -> int:
    """Bytes that a content of `length` takes in a tar."""
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _lr_hr(source: Source, max_pixels: int, form: Form) -> tuple[list[FileDigest], list[PackedMember]]:
    (role, path), *official = source.files
    content, digest = _read(role, path, max_pixels)
    files = [digest]
    hr = read_rgb(content, str(path), max_pixels=max_pixels, background=source.background)
    gray = form.keeps_gray and is_gray(content)
    del content  # may be as large as the pixels
    height, width = hr.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{path}: {width} x {height} pixels are too few, the smallest side must be {MIN_SIDE} or more; "
            "take the image out"
        )
    if gray and source.background is not None:  # it may have become coloured
        gray = bool((hr == hr[..., :1]).all())
    members = [_as_png("hr", hr[..., :1] if gray else hr)]
    if not official:
        for scale in SCALES:
            cropped = hr[: height - height % scale, : width - width % scale]
            members.append(_as_png(f"lr{scale}", downsample_uint8(cropped, scale, form.resize)))
    for role, path in official:
        content, digest = _read(role, path, max_pixels)
        files.append(digest)
        lr = read_rgb(content, str(path), max_pixels=max_pixels, background=source.background)
        scale = int(role.removeprefix("lr"))
        if lr.shape[:2] != (height // scale, width // scale):
            raise UserError(
                f"{path}: is {lr.shape[1]} x {lr.shape[0]} pixels, {source.path} of {width} x {height} needs "
                f"{width // scale} x {height // scale} at 1/{scale}; copy the official image again"
            )
        rgb = _kind_of(content) == "png" and content[24:26] == b"\x08\x02"  # 8 bits
        plain = rgb and not carries_alpha(content)
        members.append((f"{role}.png", content, *lr.shape[:2]) if plain else _as_png(role, lr))
    return files, members


def _translation(source: Source, max_pixels: int) -> tuple[list[FileDigest], list[PackedMember]]:
    files, members = [], []
    for role, path in source.files:
        content, digest = _read(role, path, max_pixels)
        files.append(digest)
        rgb = read_rgb(content, str(path), max_pixels=max_pixels, background=source.background)
        suffix, (height, width) = _kind_of(content), rgb.shape[:2]
        if suffix in ("png", "webp") and carries_alpha(content):
            suffix = None
        members.append((f"{role}.{suffix}", content, height, width) if suffix else _as_png(role, rgb))
        if role == "ab" and width % 2:
            raise UserError(
                f"{path}: {width} pixels wide, which two images of the same size side by side cannot be; crop it, or "
                "take it out"
            )
        _, _, first_height, first_width = members[0]
        if (height, width) != (first_height, first_width):
            raise UserError(
                f"{path}: is {width} x {height} pixels, its partner {source.path} is {first_width} x {first_height}; "
                "a pair must have one size"
            )
    return files, members


def _read(role: str, path: Path, max_pixels: int) -> tuple[bytes, FileDigest]:
    content = read_file(path, max_pixels=max_pixels)
    return content, (role, len(content), hashlib.sha256(content).hexdigest())


def _as_png(role: str, image: Rgb) -> PackedMember:
    return f"{role}.png", encode_png(image), image.shape[0], image.shape[1]


def _kind_of(content: bytes) -> str | None:
    """The suffix of a file that is packed as it is, by what it holds and not by its name; None for others (BMP)."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None
