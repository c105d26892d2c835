"""The cache `device`: a packed set decoded once into the training device's memory, and batches gathered there.

The host draws as it does for the other caches and sends, for each patch, four numbers: the address of its first pixel,
and how far apart its colours, rows and columns lie. Flips and rotations are such steps too: backwards, or rows in the
place of columns. So one read of the kept images crops, flips and rotates a whole batch, and the host never waits.

The batches have the bits of those from the host: images are decoded and resized there, by the same code, and what an
8-bit value becomes is read from a table that the host has filled. (A division would not do: CUDA multiplies by the
reciprocal of a divisor that the host knows, which rounds otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcdistill.console import say
from hpcdistill.data.read.augmentation import (
    REVERSE_COLUMNS,
    REVERSE_ROWS,
    TRANSPOSE,
    Draws,
    PairCrops,
    Patches,
    Planes,
    Rgb,
    place_crop,
    place_patch,
)
from hpcdistill.data.read.cache import FlatLayout, PackedImages, decode_all
from hpcdistill.data.read.domains import DomainImages, resize_all
from hpcdistill.data.read.loader import Batch
from hpcdistill.data.read.order import Blocks
from hpcdistill.ranks.environment import ranks_here

Kept = Literal["none", "ram", "device"]
Plan = NDArray[np.int64]  # [4, ..., draws]: first element, steps between colours, rows and columns

CPU: Final = torch.device("cpu")
ASKED_SHARE, AUTO_SHARE = 0.5, 0.25  # of the free memory that a set may take: the networks need the rest


# --- whether a set is kept on the device ---------------------------------------------------------------------------


def chosen_cache(asked: Literal["auto", "none", "ram", "device"], needed: int, device: torch.device) -> Kept:
    """What `data.cache` stands for with a set that takes `needed` bytes; says so where that is not what it names.

    `device` where the set takes at most half of the free memory, else `ram`. `auto` is `device` on a GPU where the set
    takes at most a quarter of it, else `none`: whoever did not ask should not miss that memory.
    """
    if asked == "auto":
        if device.type == "cpu":
            return "none"
        fits, sizes = _fits(needed, AUTO_SHARE, device)
        taken = (
            "are kept there" if fits else f"more than {AUTO_SHARE:.0%}: they are read at every draw; ram may be faster"
        )
        say(f"data.cache: auto: the decoded images, {sizes}, {taken}")
        return "device" if fits else "none"
    if asked == "device":
        fits, sizes = _fits(needed, ASKED_SHARE, device)
        if not fits:
            say(f"data.cache: device: the decoded images, {sizes}, more than {ASKED_SHARE:.0%}: they are kept in ram")
            return "ram"
    return asked


def _fits(needed: int, share: float, device: torch.device) -> tuple[bool, str]:
    """Whether `needed` bytes are within `share` of what is free, and the words for both."""
    free = free_memory(device)
    sizes = f"{needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free on {device}"
    return needed <= share * free, sizes


def free_memory(device: torch.device) -> int:
    """Bytes of `device`'s memory that nobody uses, over the processes of this node that share it."""
    if device.type == "cuda":
        sharing = -(-ranks_here() // torch.cuda.device_count())
        return int(torch.cuda.mem_get_info(device)[0]) // sharing
    return int(psutil.virtual_memory().available) // ranks_here()


# --- what is kept, and how batches come of it ----------------------------------------------------------------------


class DevicePatches:
    """The images of `lr-hr` sets on the device: luma as float32 or RGB as uint8, in one flat tensor."""

    def __init__(self, packed: PackedImages, layout: FlatLayout, patches: Patches, device: torch.device) -> None:
        """Decode everything `packed` has, image by image, so that the host's memory need not hold the set."""
        self._layout, self._patches = layout, patches
        dtype = torch.float32 if layout.channels == 1 else torch.uint8
        flat = torch.empty(layout.size, dtype=dtype, device=device)

        def keep(start: int, pixels: Planes) -> None:
            _put(pixels, flat[start : start + pixels.size])

        decode_all(packed, layout, keep)
        table = None if layout.channels == 1 else unit_table().to(device)
        sides = [patches.side // scale for scale in patches.scales]
        self._gathers = [Gather(flat, layout.channels, side, table) for side in sides]
        _wait(device)

    def plan(self, draws: Draws) -> Plan:
        """`draws` are what `Patches.batch` takes; int64 [4, roles, N]."""
        samples, tops, lefts, operations = draws
        layout, plans = self._layout, []
        for image, scale in enumerate(self._patches.scales):
            heights, widths = layout.heights[image, samples], layout.widths[image, samples]
            firsts = layout.starts[image, samples] + tops // scale * widths + lefts // scale
            plans.append(steps(firsts, heights * widths, widths, operations, self._patches.side // scale))
        return np.stack(plans, axis=1)

    def batch(self, plan: Tensor) -> Batch:
        """What `Patches.batch` gives, of a plan on the device."""
        of_roles = enumerate(zip(self._patches.names, self._gathers, strict=True))
        return {name: gather(plan[:, role]) for role, (name, gather) in of_roles}


class DeviceDomains:
    """The resized images of an image-to-image set on the device: uint8, both domains in one flat tensor."""

    def __init__(self, images: DomainImages, crops: PairCrops, device: torch.device) -> None:
        """Decode and resize everything, image by image."""
        self._side = images.load_size
        self._pixels = self._side**2
        self._first = (0, len(images.domains[0]))  # of each domain, the number of its first image
        flat = torch.empty(images.bytes, dtype=torch.uint8, device=device)
        kept = flat.view(-1, 3, self._side, self._side)

        def keep(domain: int, number: int, rgb: Rgb) -> None:
            _put(rgb.transpose(2, 0, 1), kept[self._first[domain] + number])

        resize_all(images, keep)
        self._crop = crops.crop
        self._gather = Gather(flat, 3, self._crop, symmetric_table().to(device))
        _wait(device)

    def plan(self, draws: Draws) -> Plan:
        """`draws` are position, top, left and flip of a, then of b; int64 [4, 2, N]."""
        numbers, tops, lefts, flips = (draws[row::4] for row in range(4))  # [2, N] each
        images = numbers + np.array(self._first)[:, None]
        firsts = images * 3 * self._pixels + tops * self._side + lefts
        widths = np.full_like(firsts, self._side)
        return steps(firsts, np.full_like(firsts, self._pixels), widths, flips * REVERSE_COLUMNS, self._crop)

    def batch(self, plan: Tensor) -> Batch:
        """What `PairCrops.batch` gives, of a plan on the device."""
        a, b = self._gather(plan)
        return {"a": a, "b": b}


def steps(
    firsts: NDArray[np.int64],
    planes: NDArray[np.int64],
    widths: NDArray[np.int64],
    operations: NDArray[np.int64],
    side: int,
) -> Plan:
    """How to read square patches: first element, and steps between colours, rows and columns; int64 [4, ...].

    `firsts` are the elements of their upper left corners, `planes` and `widths` the elements of an image's colour and
    row, `operations` what is done with a patch (`augmentation.TRANSPOSE`, ...).
    """
    ones = np.ones_like(widths)
    turned = (operations & TRANSPOSE) > 0
    rows, columns = np.where(turned, ones, widths), np.where(turned, widths, ones)
    # Backwards, from the other end.
    rows = np.where(operations & REVERSE_ROWS, -rows, rows)
    columns = np.where(operations & REVERSE_COLUMNS, -columns, columns)
    ends = (side - 1) * (np.minimum(rows, 0) + np.minimum(columns, 0))
    return np.stack((firsts - ends, planes, rows, columns))


class Gather:
    """Reads square patches out of a flat tensor, by a plan."""

    def __init__(self, flat: Tensor, channels: int, side: int, table: Tensor | None) -> None:
        """`table`, float32 [256]: what the 8-bit values of `flat` become; None: they are what is wanted."""
        self._flat, self._table = flat, table
        self._columns = torch.arange(side, device=flat.device)
        self._rows = self._columns[:, None]
        self._colours = torch.arange(channels, device=flat.device)[:, None, None]

    def __call__(self, plan: Tensor) -> Tensor:
        """Of a plan int64 [4, ..., N], float32 [..., N, C, side, side]."""
        return gathered(self._flat, plan, (self._colours, self._rows, self._columns), self._table)


def gathered(flat: Tensor, plan: Tensor, counts: tuple[Tensor, ...], table: Tensor | None) -> Tensor:
    """The elements of `flat` at the addresses of `plan`, looked up in `table` where there is one."""
    addresses, *distances = plan[..., None, None, None]
    for distance, count in zip(distances, counts, strict=True):
        addresses = torch.addcmul(addresses, distance, count)
    pixels = flat.take(addresses)
    return pixels if table is None else table.take(pixels.long())


def unit_table() -> Tensor:
    """What 8-bit values become in batches of patches, by the host's own code: float32 [256] in [0, 1]."""
    values, table = np.arange(256, dtype=np.uint8).reshape(1, 16, 16), np.empty((1, 16, 16), np.float32)
    place_patch(values, 0, values, table)
    return torch.from_numpy(table.ravel())


def symmetric_table() -> Tensor:
    """What 8-bit values become in batches of image pairs, by the host's own code: float32 [256] in [-1, 1]."""
    values, table = np.arange(256, dtype=np.uint8).reshape(16, 16, 1), np.empty((1, 16, 16), np.float32)
    place_crop(values, 0, 0, False, table)
    return torch.from_numpy(table.ravel())


# --- the way to the device -----------------------------------------------------------------------------------------


class DeviceBatches:
    """Batches of a set on the device, by their draws, whose plans are sent in blocks."""

    def __init__(
        self, kept: DevicePatches | DeviceDomains, draws: Callable[[int, int], Draws], device: torch.device
    ) -> None:
        """`draws(first, count)` are what `kept.plan` takes."""
        self._kept = kept
        self._plans: Blocks[Tensor] = Blocks(lambda first, count: _sent(kept.plan(draws(first, count)), device))

    def __call__(self, first: int, count: int) -> Batch:
        """Of draws first .. first + count - 1; nothing is read back, and most calls send nothing."""
        return self._kept.batch(self._plans(first, count))


def _sent(plan: Plan, device: torch.device) -> Tensor:
    """`plan` on the device; neither waits for the other."""
    numbers = torch.from_numpy(plan)
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _put(pixels: NDArray[Any], place: Tensor) -> None:
    """Copy `pixels` to the device, into `place`, which has as many elements."""
    place.view(pixels.shape).copy_(torch.from_numpy(np.array(pixels, order="C")))


def _wait(device: torch.device) -> None:
    """Until all is there: batches may be made in another stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
