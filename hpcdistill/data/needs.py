"""What a method asks of the data; the reader delivers exactly this, from sets that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcdistill.data.fetch.location import index_at
from hpcdistill.data.index import Index, Kind
from hpcdistill.errors import UserError


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
    real_targets: bool = True  # False: a model has made the images b, so FID's real side is never made of them


def load_indices(places: Sequence[str], needs: Needs) -> list[Index]:
    """The index of each packed set, in a folder or at an http(s) address, in this order.

    UserError when there is none, or it is damaged, of another kind, empty or without a needed LR scale.
    """
    if not places:
        raise UserError("data.train: names no data set; give a packed folder, e.g. data.train=packed/bsd/train")
    indices = [index_at(place) for place in places]
    for place, index in zip(places, indices, strict=True):
        if index.kind != needs.kind:
            raise UserError(
                f"{place}: holds {index.kind} samples, the method needs {needs.kind}; give another data.train"
            )
        if not index.samples:
            raise UserError(f"{place}: holds no samples; pack the data set again")
        missing = [scale for scale in needs.lr_scales if scale not in index.scales]
        if missing:
            scales = ", ".join(map(str, index.scales)) or "none"
            raise UserError(
                f"{place}: has no LR images at scale {missing[0]} (it has: {scales}); pack it again with them"
            )
    return indices
