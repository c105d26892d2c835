"""An image of a set, and a place of it, as the command line names them. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from hpcdistill.errors import UserError, nearest, plural

SMALLEST_CROP = 8  # HR pixels of a side


class Wanted(NamedTuple):
    """A place of an image that is to be shown, in its pixels (super-resolution: of HR)."""

    image: str
    top: int
    left: int
    side: int


def parse_crop(text: str) -> Wanted:
    """`IMAGE:TOP,LEFT,SIDE`; UserError for anything else."""
    match = re.fullmatch(r"(.+):([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6})", text, re.DOTALL)
    if match is None:
        raise UserError(f"--crop {text}: expected IMAGE:TOP,LEFT,SIDE in pixels (of HR), e.g. butterfly:64,80,48")
    wanted = Wanted(match[1], *(int(number) for number in match.groups()[1:]))
    if wanted.side < SMALLEST_CROP:
        raise UserError(f"--crop {text}: a side of {wanted.side} is too small; use {SMALLEST_CROP} pixels or more")
    return wanted


def image_number(word: str, names: Sequence[str], option: str) -> int:
    """Which of `names` the `word` of an option is: a name, else a number from 0. UserError for what is neither."""
    if word in names:
        return names.index(word)
    if re.fullmatch("[0-9]{1,9}", word):
        if int(word) < len(names):
            return int(word)
        raise UserError(
            f"{option} {word}: there are {plural(len(names), 'image')}; the last is number {len(names) - 1}"
        )
    raise UserError(f"{option} {word}: no such image; {nearest(word, names)}")


def check_inside(wanted: Wanted, height: int, width: int) -> None:
    """UserError for a place that leads out of the image."""
    if wanted.top + wanted.side > height or wanted.left + wanted.side > width:
        raise UserError(
            f"--crop {wanted.image}:{wanted.top},{wanted.left},{wanted.side}: leads out of the image of "
            f"{width}x{height}; TOP and LEFT are those of its first pixel, SIDE its width and height"
        )
