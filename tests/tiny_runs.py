"""Runs of the train command that are as small as they can be: a few images of noise, packed, and a variant for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.run import load_run
from hpcdistill.trainer import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def packed_noise(folder: Path, images: int = 3, size: tuple[int, int] = (48, 60)) -> Path:
    """`folder`/packed: images of noise, packed for super-resolution as a user's own folder is."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(images):
        noise = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.png")
    pack(load_recipe("folder"), folder / "images", folder / "packed")
    return folder / "packed"


def tiny_variant(folder: Path, **train: Any) -> str:
    """A variant file: two steps of two patches of noise, packed beside it, on the CPU; evaluated on it as `tiny`."""
    packed = str(packed_noise(folder))
    values = {
        "data": {"train": packed, "eval": {"tiny": packed}, "patch": 24, "samples_per_epoch": 3, "workers": 0},
        "train": {"steps": 2, "batch_size": 2, "trackers": [], "device": "cpu", "threads": 1, "log_every": 1} | train,
        "eval": {"every": 1},
    }
    (folder / "tiny.yaml").write_text(json.dumps(values))  # JSON is YAML
    return str(folder / "tiny.yaml")


def trained(*arguments: str) -> dict[str, Any]:
    """The result of `train` on what a command line would say."""
    result = train(load_run(arguments))
    assert result is not None
    return result
