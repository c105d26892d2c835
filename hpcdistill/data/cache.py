"""Where patches come from: decoded at every draw (`none`) or cut from images kept in memory (`ram`).

Both give the same bits. What is kept is the luma as float32 (1 channel) or the RGB as uint8 (3 channels); scaling to
[0, 1] and augmentation are the reader's.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpcdistill.console import err, is_main_process
from hpcdistill.data.images import read_rgb
from hpcdistill.data.index import Index
from hpcdistill.errors import UserError
from hpcdistill.ops.colour import luma_uint8

Pixels = NDArray[Any]  # float32 luma [1, H, W] or uint8 RGB [3, H, W]

_SHOW_PROGRESS_FROM = 1 << 26  # pixels; decoding fewer is over before anybody wonders


@dataclass(frozen=True)
class Placed:
    """The images of one name ("hr", "lr4") in all samples: arrays of length N instead of objects, for large sets."""

    name: str
    shards: NDArray[np.int64]  # position in `PackedImages.paths`
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]


class PatchSource(Protocol):
    """Cuts patches out of a data set's images."""

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Pixels:
        """The square patch of image number `image` (in `PackedImages.images`) of `sample`: [C, size, size]."""


class PackedImages:
    """Packed data sets, joined: reads and decodes single images by their recorded place (cache `none`)."""

    def __init__(self, folders: Sequence[Path], indices: Sequence[Index], names: Sequence[str], channels: int) -> None:
        """`names` are the images needed of each sample. UserError when a shard is missing, cut off or lacks one."""
        self.channels = channels
        self.paths: list[Path] = []
        for folder, index in zip(folders, indices, strict=True):
            for shard in index.shards:
                _check_shard(folder / shard.name, shard.length)
                self.paths.append(folder / shard.name)
        self.sources = [sample.source for index in indices for sample in index.samples]
        self.images = [_place(name, folders, indices) for name in names]
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Pixels:
        """Read, decode and cut; see `PatchSource`."""
        return self._pixels(self._decode(image, sample)[top : top + size, left : left + size])

    def load(self, image: int, sample: int) -> Pixels:
        """A whole image: [C, H, W]."""
        return self._pixels(self._decode(image, sample))

    def sample(self, sample: int) -> tuple[Path, str]:
        """The shard that holds `sample`, and the name of the image it was made from."""
        return self.paths[int(self.images[0].shards[sample])], self.sources[sample]

    def _pixels(self, rgb: NDArray[np.uint8]) -> Pixels:
        return luma_uint8(rgb)[None] if self.channels == 1 else rgb.transpose(2, 0, 1)

    def _decode(self, image: int, sample: int) -> NDArray[np.uint8]:
        place = self.images[image]
        shard, length = int(place.shards[sample]), int(place.lengths[sample])
        path = self.paths[shard]
        label = f"{path}: {place.name} of sample '{self.sources[sample]}'"
        remedy = f"find the damage with `python shards/verify.py {path.parent}` and pack the data set again"
        try:
            content = os.pread(self._file(shard), length, int(place.offsets[sample]))
        except OSError as error:
            raise UserError(f"{label} cannot be read ({error.strerror}); {remedy}") from None
        if len(content) != length:
            raise UserError(f"{label} is cut off; {remedy}")
        try:
            rgb = read_rgb(content, label)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        size = (int(place.heights[sample]), int(place.widths[sample]))
        if rgb.shape[:2] != size:
            raise UserError(f"{label} is {rgb.shape[:2]} pixels instead of the index's {size}; {remedy}")
        return rgb

    def _file(self, shard: int) -> int:
        """The open shard. `pread` has no position that processes could share, so a fork may inherit the handle."""
        handle = self._files.get(shard)
        if handle is None:
            with self._lock:
                handle = self._files.get(shard)
                if handle is None:
                    try:
                        handle = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        if error.errno == errno.EMFILE:
                            remedy = "raise the limit with `ulimit -n` or pack into larger shards"
                            raise UserError(f"{self.paths[shard]}: too many open files; {remedy}") from None
                        raise
                    self._files[shard] = handle
        return handle

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker opens its own
        return {**{k: v for k, v in self.__dict__.items() if k != "_lock"}, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class DecodedImages:
    """All images decoded once, one flat array for each name (cache `ram`); forked workers share the memory."""

    def __init__(self, packed: PackedImages) -> None:
        """Decode everything `packed` has. UserError, before anything is decoded, when it does not fit in memory."""
        self._channels = packed.channels
        self._type: Any = np.float32 if packed.channels == 1 else np.uint8
        self._item = np.dtype(self._type).itemsize
        _check_memory(packed, self._item)
        self._flat: list[Pixels] = []
        self._starts: list[NDArray[np.int64]] = []  # first element of each sample
        self._heights = [place.heights for place in packed.images]
        self._widths = [place.widths for place in packed.images]
        for heights, widths in zip(self._heights, self._widths, strict=True):
            ends = np.cumsum(heights * widths * self._channels)
            self._starts.append(np.concatenate(([0], ends[:-1])))
            self._flat.append(np.empty(int(ends[-1]), dtype=self._type))
        self._fill(packed)

    def _fill(self, packed: PackedImages) -> None:
        samples = len(packed.sources)

        def load(sample: int) -> None:
            for image, flat in enumerate(self._flat):
                pixels = packed.load(image, sample)
                start = self._starts[image][sample]
                flat[start : start + pixels.size].reshape(pixels.shape)[...] = pixels

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        quick = sum(flat.size for flat in self._flat) < _SHOW_PROGRESS_FROM * self._channels
        hidden = quick or not is_main_process()
        threads = min(8, os.cpu_count() or 1)
        with (
            Progress(*columns, console=err, transient=True, disable=hidden) as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            try:
                for _ in progress.track(pool.map(load, range(samples)), samples, description="decoding images"):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the first bad image ends it, not the last
                raise
        packed.close()

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Pixels:
        """A view into the kept image, no copy; see `PatchSource`."""
        height, width = int(self._heights[image][sample]), int(self._widths[image][sample])
        start = int(self._starts[image][sample]) + top * width + left
        # One constructor call: slicing and reshaping takes four times as long, 2 us for each image of each draw.
        return np.ndarray(
            (self._channels, size, size),
            self._type,
            self._flat[image],
            start * self._item,
            (height * width * self._item, width * self._item, self._item),
        )


def _check_shard(path: Path, length: int) -> None:
    remedy = "pack the data set again (or copy the shard once more)"
    if not path.is_file():
        raise UserError(f"{path}: this shard of the data set is missing; {remedy}")
    if path.stat().st_size != length:
        raise UserError(f"{path}: {path.stat().st_size} bytes instead of the index's {length}; {remedy}")


def _place(name: str, folders: Sequence[Path], indices: Sequence[Index]) -> Placed:
    rows = []
    shards_before = 0
    for folder, index in zip(folders, indices, strict=True):
        for sample in index.samples:
            member = next((m for suffix, m in sample.members.items() if suffix.split(".")[0] == name), None)
            if member is None:
                raise UserError(f"{folder}: sample '{sample.source}' has no image '{name}'; pack the data set again")
            rows.append((shards_before + sample.shard, member.offset, member.length, member.height, member.width))
        shards_before += len(index.shards)
    table = np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy()
    return Placed(name, *table)


def _check_memory(packed: PackedImages, item: int) -> None:
    pixels = sum(int((place.heights * place.widths).sum()) for place in packed.images)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each rank of a node keeps its own copy
    needed = pixels * packed.channels * item * ranks
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"data.cache=ram needs {needed / 2**30:.1f} GiB for {len(packed.sources)} images"
            f"{f' on {ranks} ranks' if ranks > 1 else ''}, {available / 2**30:.1f} GiB are free; set data.cache=none"
        )
