"""Packed data sets to be damaged: what the tests of verification, duplicates and repair share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from packed_sets import Rgb, noise, write_set

ROOT = Path(__file__).resolve().parents[2]
SCALES = (2, 3, 4)


def with_lrs(image: Rgb, seed: int) -> dict[str, Rgb]:
    """A sample whose LRs have the right sizes; what they show is nobody's concern here."""
    height, width, _ = image.shape
    lrs = {f"lr{s}.png": noise(height // s, width // s, 1000 * s + seed) for s in SCALES}
    return {"hr.png": image, **lrs}


def write_small_set(folder: Path) -> None:
    """Five images in three shards of two, two and one."""
    samples = [with_lrs(noise(16 + number, 20, number), number) for number in range(5)]
    write_set(folder, "lr-hr", samples, scales=SCALES, shard_samples=2)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(folder: Path) -> None:
    """A flipped byte in one shard, another one gone; the third is whole."""
    flip(folder / "shard-00000.tar", 700)
    (folder / "shard-00002.tar").unlink()


def script(name: str) -> ModuleType:
    """What shards/NAME.py runs."""
    return importlib.import_module(f"hpcdistill.{name}")
