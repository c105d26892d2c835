"""Small packed data sets of every kind, written with tarfile alone: a reader is tested without our packer."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcdistill.data.index import Index, Kind, Member, Sample, Shard

Rgb = NDArray[np.uint8]  # [H, W, 3]


def encode(image: Rgb, suffix: str) -> bytes:
    """The file that ends in `suffix` ("hr.png", "a.jpg") for `image`."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix.rpartition(".")[2]])
    return content.getvalue()


def write_set(
    folder: Path,
    kind: Kind,
    samples: Sequence[Mapping[str, Rgb | bytes]],
    *,
    scales: Sequence[int] = (),
    shard_samples: int = 3,
    split: str = "train",
) -> Index:
    """Write `samples` (suffix -> pixels, or an image file's content) as shards and index into `folder`.

    A shard ends after `shard_samples` samples, and where the suffixes change (domains of an unpaired set).
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[int]] = []
    for number, sample in enumerate(samples):
        if not groups or len(groups[-1]) == shard_samples or samples[groups[-1][-1]].keys() != sample.keys():
            groups.append([])
        groups[-1].append(number)
    shards, listed = [], []
    for position, group in enumerate(groups):
        path = folder / f"shard-{position:05d}.tar"
        sizes = {}
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in group:
                for suffix, image in samples[number].items():
                    content = image if isinstance(image, bytes) else encode(image, suffix)
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                    with Image.open(io.BytesIO(content)) as opened:
                        sizes[entry.name] = (opened.height, opened.width)
        with tarfile.open(path) as tar:
            places = {entry.name: (entry.offset_data, entry.size) for entry in tar}
        for number in group:
            names = {suffix: f"{number:06d}.{suffix}" for suffix in samples[number]}
            members = {suffix: Member(*places[name], *sizes[name]) for suffix, name in names.items()}
            listed.append(Sample(f"{number:06d}", f"image{number}", position, members))
        content = path.read_bytes()
        shards.append(Shard(path.name, len(content), hashlib.sha256(content).hexdigest()))
    index = Index("test", split, kind, tuple(scales), "none", "test", tuple(shards), tuple(listed))
    index.save(folder)
    return index


def noise(height: int, width: int, seed: int) -> Rgb:
    """An image that no other seed gives."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def numbered(height: int, width: int, number: int) -> Rgb:
    """An image of one colour that tells its number (up to 65,535) exactly, whatever crop or flip is taken of it."""
    return np.full((height, width, 3), (number >> 8, number & 255, 77), np.uint8)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
