"""A place of an image as the command line names it. Needs no torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from hpcdistill.errors import UserError

SMALLEST_CROP = 8  # HR pixels of a side


class Wanted(NamedTuple):
    """A place of an image that is to be shown, in HR pixels."""

    image: str
    top: int
    left: int
    side: int


def parse_crop(text: str) -> Wanted:
    """`IMAGE:TOP,LEFT,SIDE`; UserError for anything else."""
    match = re.fullmatch(r"(.+):([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6})", text, re.DOTALL)
    if match is None:
        raise UserError(f"--crop {text}: expected IMAGE:TOP,LEFT,SIDE in HR pixels, e.g. butterfly:64,80,48")
    wanted = Wanted(match[1], *(int(number) for number in match.groups()[1:]))
    if wanted.side < SMALLEST_CROP:
        raise UserError(f"--crop {text}: a side of {wanted.side} is too small; use {SMALLEST_CROP} pixels or more")
    return wanted
