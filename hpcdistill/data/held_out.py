"""Images of the training sets that are kept out of training, to choose the best weights by: `data.held_out`.

Which ones is a function of the number of samples alone: every rank, cache, reader and resumed run keeps out the same.
They are spread evenly over the joined sets, as the last ones would all be of the last set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hpcdistill.errors import UserError

if TYPE_CHECKING:  # status needs the name alone: an index's pydantic would double the time that it takes to start
    from hpcdistill.data.index import Index, Kind

NAME = "held_out"  # what reports call them, in the place of a test set's name


def check_kind(count: int, kind: Kind) -> None:
    """UserError when images are to be held out of a data set for image translation.

    Its measure, FID, compares whole sets: of a few images it says nothing.
    """
    if count and kind != "lr-hr":
        raise UserError(
            f"data.held_out={count}: is for super-resolution; for {kind} images name a validation split under "
            "data.eval and eval.select"
        )


def positions(total: int, count: int) -> list[int]:
    """The `count` samples of `total` that are held out, in 0 .. total - 1: the middles of as many equal parts.

    Raises UserError when none would be left.
    """
    if count and count >= total:
        raise UserError(
            f"data.held_out={count}: the training sets have {total} images, so none is left to train on; give at least "
            f"{count + 1}, or set it lower"
        )
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def numbered(indices: Sequence[Index], count: int) -> list[list[int]]:
    """The positions that are held out of each set, in 0 .. its number of samples - 1."""
    sizes = [len(index.samples) for index in indices]
    held = positions(sum(sizes), count)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        [place - start for place in held if start <= place < start + size]
        for start, size in zip(starts, sizes, strict=True)
    ]


def without(indices: Sequence[Index], count: int) -> list[Index]:
    """The sets without the samples that are held out: what is not in an index is never read."""
    if not count:
        return list(indices)
    left = []
    for index, held in zip(indices, map(frozenset, numbered(indices, count)), strict=True):
        samples = tuple(sample for place, sample in enumerate(index.samples) if place not in held)
        left.append(replace(index, samples=samples))
    return left
