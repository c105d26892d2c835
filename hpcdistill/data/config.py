"""The configuration section `data`: which images, which patches, in which order, and how they are read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from hpcdistill.settings import Section, operational


class DataConfig(Section):
    """Where the images are and how training patches are cut from them.

    The folders are operational: a run's identity holds the digest of what they contain, not where they lie.
    """

    train: tuple[str, ...] = operational(
        (), "packed data sets to train on, a folder or a list of folders; several are joined in this order"
    )
    eval: dict[str, str] = operational(
        {}, "data sets to evaluate on: the name in the report, then a packed data set or a plain folder of images"
    )
    patch: int = Field(192, gt=0, description="side of the HR patch, pixels; a multiple of the scale")
    samples_per_epoch: int | None = Field(
        None, gt=0, description="draws in one epoch; null = every image once, more = several random crops of each"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what to do with an image smaller than the patch: stop, or leave it out and say so"
    )
    flip: bool = Field(True, description="flip patches at random")
    rotate: bool = Field(True, description="rotate patches at random by multiples of 90 degrees")
    cache: Literal["none", "ram"] = operational(
        "none", "none: read and decode at every draw; ram: decode everything once and keep it in memory"
    )
    workers: int = operational(2, "reader processes of each rank; 0 = read in the training process", ge=0)

    @field_validator("train", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
