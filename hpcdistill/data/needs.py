"""What a method asks of the data; the reader delivers exactly this."""

from __future__ import annotations

from dataclasses import dataclass

from hpcdistill.data.index import Kind


@dataclass(frozen=True)
class Needs:
    """The images of one training sample.

    `lr-hr`: a batch is a dict of float32 tensors `[B, channels, H, W]` in [0, 1]: `hr` (the HR patch) and, for each s
    of `lr_scales`, `lr<s>` (the patch at the same place of the separately down-sampled image, HR side / s).

    `paired` and `unpaired`: float32 RGB tensors `[B, 3, crop, crop]` in [-1, 1], `a` (what is translated) and `b`
    (what it is translated to); of a pair they show the same crop and flip, of an unpaired set one image each.
    """

    kind: Kind
    scale: int = 1  # super-resolution factor: HR is cropped to a multiple of it and patches start on its grid
    lr_scales: tuple[int, ...] = ()  # which of the packed down-sampled images are read; each divides the patch size
    channels: int = 1  # lr-hr only: 1 = luma (ops.colour.luma), 3 = RGB
