"""What every indexed reader asks of a configuration and its data sets before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcdistill.data.index import Index, load_index
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError


def check_batch_size(batch_size: int, ranks: int) -> None:
    """UserError, with the nearest valid value, when the global batch cannot be cut evenly over the ranks."""
    if batch_size % ranks:
        valid = max(1, batch_size // ranks) * ranks
        raise UserError(f"train.batch_size={batch_size} is global and cannot be cut over {ranks} ranks; use {valid}")


def load_indices(folders: Sequence[Path], needs: Needs) -> list[Index]:
    """The index of each packed folder; UserError when there is none, it is damaged or cannot deliver what is needed."""
    if not folders:
        raise UserError("data.train: names no data set; give a packed folder, e.g. data.train=packed/bsd/train")
    indices = [load_index(folder) for folder in folders]
    for folder, index in zip(folders, indices, strict=True):
        check_index(str(folder), index, needs)
    return indices


def check_index(name: str, index: Index, needs: Needs) -> None:
    """UserError when the data set called `name` is of another kind, empty or without a needed LR scale."""
    if index.kind != needs.kind:
        raise UserError(f"{name}: holds {index.kind} samples, the method needs {needs.kind}; give another data.train")
    if not index.samples:
        raise UserError(f"{name}: holds no samples; pack the data set again")
    missing = [scale for scale in needs.lr_scales if scale not in index.scales]
    if missing:
        scales = ", ".join(map(str, index.scales)) or "none"
        raise UserError(f"{name}: has no LR images at scale {missing[0]} (it has: {scales}); pack it again with them")


def check_crop(load_size: int, crop: int) -> None:
    """UserError when a crop is larger than the images are resized to."""
    if crop > load_size:
        raise UserError(
            f"data.crop={crop} is larger than data.load_size={load_size}; use data.crop={load_size}, or resize to more"
        )
