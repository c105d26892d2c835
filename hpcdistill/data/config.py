"""The configuration section `data`: which images, which patches, in which order, and how they are read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from hpcdistill.settings import MOST_PIXELS, MOST_STEPS, Section, UserPlace, operational
from hpcdistill.yaml_values import Word


class DataConfig(Section):
    """Where the images are and how training patches are cut from them.

    The folders are operational: a run's identity holds the digest of what they contain, not where they lie.
    """

    train: tuple[UserPlace, ...] = operational(
        (), "packed data sets to train on, a folder or a list of folders; several are joined in this order"
    )
    eval: dict[str, UserPlace] = operational(
        {}, "data sets to evaluate on: the name in the report, then a packed data set or a plain folder of images"
    )
    reader: Literal["indexed", "stream"] = Field(
        "indexed",
        description="indexed: exact order and resume, from local folders; stream: webdataset, also over http(s), "
        "inexact in order and resume",
    )
    stage: UserPlace | None = operational(
        None,
        "folder on node-local scratch that packed sets are copied to, once a node; null = they are read where they lie",
    )
    patch: int = Field(
        192, gt=0, le=MOST_PIXELS, description="lr-hr: side of the HR patch, pixels; a multiple of the scale"
    )
    load_size: int = Field(
        286, gt=0, le=MOST_PIXELS, description="paired, unpaired: side that images are resized to (bicubic), pixels"
    )
    crop: int = Field(256, gt=0, le=MOST_PIXELS, description="paired, unpaired: side of the random crop, pixels")
    direction: Literal["AtoB", "BtoA"] = Field(
        "AtoB", description="paired, unpaired: which domain is translated to which; BtoA exchanges a and b"
    )
    samples_per_epoch: int | None = Field(
        None,
        gt=0,
        le=MOST_STEPS,
        description="draws in one epoch; null = every image once, more = several random crops of each",
    )
    held_out: int = Field(
        0,
        ge=0,
        le=10**6,
        description="lr-hr: images spread over the training sets that are not trained on, but choose the best weights "
        "as the set `held_out` (unless eval.select names another)",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what to do with an image smaller than the patch: stop, or leave it out and say so"
    )
    flip: bool = Field(True, description="flip at random, left to right")
    rotate: bool = Field(True, description="lr-hr: rotate patches at random by multiples of 90 degrees")
    shuffle_buffer: int = Field(
        1000, ge=1, le=10**9, description="stream: samples a reader process mixes; 1 = no mixing"
    )
    cache: Literal["auto", "none", "ram", "device"] = operational(
        "auto",
        "indexed: none = read and decode at every draw; ram = decode everything once and keep it in memory; device = "
        "keep it on the training device and cut the batches there, in memory where it takes more than half of what is "
        "free; auto = device on a GPU where it takes at most a quarter, else none",
    )
    workers: int = operational(
        2,
        "reader processes of each rank; 0 = read in the training process; not used with the cache on the device",
        ge=0,
        le=1024,
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Word) else value
