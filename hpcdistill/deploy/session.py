"""A network in some runtime, which takes and gives arrays, and what it is asked for and answers, checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpcdistill.deploy.description import Description
from hpcdistill.errors import UserError

Batch = NDArray[np.float32]  # [B, C, H, W], C-contiguous
# [B, channels, H, W] to [B, channels, scale H, scale W], in the range that the network's description says.
Session = Callable[[Batch], Batch]


def check_size(about: Description, images: Batch, origin: str) -> None:
    """UserError for images that the network does not take. A recorded ResNet makes 68x68 of 66x66 without a word."""
    _, channels, height, width = images.shape
    fits = all(side % about.multiple == 0 and side >= about.smallest for side in (height, width))
    if channels != about.channels or not fits:
        raise UserError(
            f"{origin}: takes {about.channels} channels, height and width multiples of {about.multiple} of at least "
            f"{about.smallest}, not {channels} channels of {height}x{width}"
        )


def check_made(about: Description, images: Batch, made: Batch, origin: str) -> Batch:
    """`made` of `images`; UserError when it is no picture of the size that the description says."""
    batch, _, height, width = images.shape
    if made.shape != (batch, about.channels, height * about.scale, width * about.scale):
        raise UserError(f"{origin}: makes {made.shape} of {images.shape}, its metadata says otherwise; export it again")
    return made
