"""One split that is being packed: what its bytes depend on, and what of it is in finished shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL
from PIL import features

from hpcdistill.data.images import Colour
from hpcdistill.data.index import Index, Kind, Sample, Shard
from hpcdistill.data.pack.packed_image import Form
from hpcdistill.data.pack.recipes import UNSPLIT, Recipe
from hpcdistill.data.pack.shard_files import FinishedShard
from hpcdistill.data.pack.sources import Digest, Source
from hpcdistill.ops.downsampling import ResizeRule

# Raised when the same sources would give other bytes. A set that is there is completed, and mended, by its own packer.
FIRST_PACKER = 1  # all but super-resolution; there: LR images of rule `exact` or official ones, a gray HR made RGB
PACKER = 2  # of super-resolution: the rule of the LR images stands in the index, a gray HR stays gray

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class SplitPacking:
    recipe: Recipe
    split: str
    folder: Path
    on_error: OnError
    max_pixels: int
    processes: int | None
    shard_samples: int
    shard_bytes: int
    official_lr: bool
    packer: int
    resize: ResizeRule  # of LR images that are computed
    flatten: Colour | None

    @property
    def kind(self) -> Kind:
        return self.recipe.kind

    @property
    def form(self) -> Form:
        return Form(self.resize, keeps_gray=self.packer >= PACKER)

    @property
    def lr(self) -> str | None:
        """As `Index.lr` will have it."""
        if self.kind != "lr-hr":
            return None
        return "official" if self.official_lr else self.resize

    def settings(self) -> dict[str, Any]:
        """What a finished shard's bytes depend on beside its sources."""
        settings = {
            "packer": self.packer,
            "recipe": self.recipe.name,
            "split": self.split,
            "kind": self.kind,
            "official_lr": self.official_lr,
            "shard": [self.shard_samples, self.shard_bytes],
            # What PNG's bytes depend on; shards of one data set must not mix encoders.
            "encoder": f"Pillow {PIL.__version__}, zlib {features.version('zlib')}, "
            f"zlib-ng {features.version('zlib_ng')}",
        }
        return settings | self.resized() | self.flattened()

    def resized(self) -> dict[str, Any]:
        """The rule of the LR images; nothing where the packer has but one, or they are the official ones."""
        return {"lr": self.resize} if self.packer >= PACKER and not self.official_lr else {}

    def flattened(self) -> dict[str, Any]:
        """What transparent pixels were laid over; nothing where they are refused."""
        return {"flatten": "#{:02x}{:02x}{:02x}".format(*self.flatten)} if self.flatten else {}


@dataclass
class State:
    """What is in finished shards so far of one split."""

    shards: list[Shard] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)  # of every source looked at, skipped ones too
    skipped: list[str] = field(default_factory=list)

    def add(self, finished: FinishedShard) -> None:
        self.shards.append(finished.shard)
        self.samples += finished.samples
        self.digests += finished.digests
        self.skipped += finished.skipped


def notes_of(job: SplitPacking, sources: list[Source], digests: list[Digest]) -> dict[str, Any]:
    listing: list[Any] = list(digests)
    if job.kind == "unpaired":  # a digest does not say which side its image is on
        listing = [(*source.roles, *listed) for source, listed in zip(sources, digests, strict=True)]
    notes: dict[str, Any] = {"packer": job.packer}
    if job.kind == "lr-hr":
        each = "" if job.resize == "exact" else " after each pass"
        notes["resize"] = "official" if job.official_lr else f"MATLAB bicubic, antialiased, rounded half up{each}"
        notes |= job.resized()
    notes |= job.flattened()
    notes["sources_sha256"] = hashlib.sha256(json.dumps(listing, ensure_ascii=False).encode()).hexdigest()
    return notes


def title_of(recipe: str, split: str) -> str:
    return recipe if split == UNSPLIT else f"{recipe}/{split}"


def lr_said(index: Index) -> str:
    return f", LR images {index.lr}" if index.lr else ""
