"""Where patches come from: decoded at every draw (`none`) or cut from images kept in memory (`ram`).

Both give the same bits. What is kept is the luma as float32 (1 channel) or the RGB as uint8 (3 channels); scaling to
[0, 1] and augmentation are the reader's. `PackedImages` reads the images of every kind of set. What is kept on the
training device: `data.read.device`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from hpcdistill.data.fetch.location import check_shard, remedy
from hpcdistill.data.images import MAX_PIXELS, read_packed
from hpcdistill.data.index import Index, Member, Sample
from hpcdistill.data.progress import ProgressBar
from hpcdistill.data.read.augmentation import Planes, Rgb, planes_of
from hpcdistill.errors import UserError, plural
from hpcdistill.ranks.environment import ranks_here

_SHOW_PROGRESS_FROM = 1 << 26  # pixels; decoding fewer is over before anybody wonders


@dataclass(frozen=True)
class ImageTable:
    """The images of one role ("hr", "lr4", "a"): arrays of length N instead of objects, for large sets."""

    role: str
    samples: NDArray[np.int64]  # position in `PackedImages.sources`: 0 .. N - 1 where every sample has the role
    shards: NDArray[np.int64]  # position in `PackedImages.paths`
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]


class PatchSource(Protocol):
    """Cuts patches out of a data set's images."""

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Planes:
        """The square patch of image number `image` (in `PackedImages.images`) of `sample`: [C, size, size]."""


class PackedImages:
    """Packed data sets, joined: reads and decodes single images by their recorded place (cache `none`)."""

    def __init__(
        self,
        folders: Sequence[Path],
        indices: Sequence[Index],
        roles: Sequence[str],
        channels: int,
    ) -> None:
        """`roles` are the images that are read, where a sample has them. UserError for a shard missing or cut off."""
        self.channels = channels
        self.paths: list[Path] = []
        for folder, index in zip(folders, indices, strict=True):
            for shard in index.shards:
                check_shard(str(folder), shard)
                self.paths.append(folder / shard.name)
        self.sources = [sample.source for index in indices for sample in index.samples]
        self.images = [_place(role, folders, indices) for role in roles]
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Planes:
        """Read, decode and cut; see `PatchSource`."""
        return planes_of(self.decode(image, sample)[top : top + size, left : left + size], self.channels)

    def load(self, image: int, sample: int) -> Planes:
        """A whole image: [C, H, W]."""
        return planes_of(self.decode(image, sample), self.channels)

    def sample(self, row: int, image: int = 0) -> tuple[Path, str]:
        """The shard of an image, by its row in `images[image]`, and the name of what its sample was made from."""
        place = self.images[image]
        return self.paths[int(place.shards[row])], self.sources[int(place.samples[row])]

    def decode(self, image: int, row: int) -> Rgb:
        """The image in a row of `images[image]`: 8-bit RGB [H, W, 3], of the size that the index says."""
        place = self.images[image]
        path, source = self.sample(row, image)
        label = f"{path}: {place.role} of sample '{source}'"
        todo = remedy(str(path.parent))
        length = int(place.lengths[row])
        try:
            content = os.pread(self._file(int(place.shards[row])), length, int(place.offsets[row]))
        except OSError as error:
            raise UserError(f"{label} cannot be read ({error.strerror}); {todo}") from None
        if len(content) != length:
            raise UserError(f"{label} is cut off; {todo}")
        return read_packed(content, (int(place.heights[row]), int(place.widths[row])), label, todo)

    def _file(self, shard: int) -> int:
        """The open shard. `pread` has no position that processes could share, so a fork may inherit the handle."""
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno == errno.EMFILE:
                        raise UserError(
                            f"{self.paths[shard]}: too many open files; raise the limit with `ulimit -n` or pack into "
                            "larger shards"
                        ) from None
                    raise
            return self._files[shard]

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


class FlatLayout:
    """Where the images of a set lie in one flat array: colours apart, in the order of the roles and samples."""

    def __init__(self, packed: PackedImages) -> None:
        """Of everything `packed` has, which must have each role of each sample."""
        self.channels = packed.channels
        self.dtype: Any = np.float32 if packed.channels == 1 else np.uint8
        self.heights, self.widths = (  # int64 [roles, samples], as `starts`: the first element of each
            np.stack([getattr(place, side) for place in packed.images]) for side in ("heights", "widths")
        )
        ends = np.cumsum(self.heights * self.widths * self.channels)
        self.starts = np.concatenate(([0], ends[:-1])).reshape(self.heights.shape)
        self.size = int(ends[-1])  # elements

    @property
    def bytes(self) -> int:
        """What all images take."""
        return self.size * int(np.dtype(self.dtype).itemsize)


class DecodedImages:
    """All images decoded once into one flat array (cache `ram`); forked workers share the memory."""

    def __init__(self, packed: PackedImages, layout: FlatLayout) -> None:
        """Decode everything `packed` has. UserError, before anything is decoded, when it does not fit in memory."""
        self._layout = layout
        self._item = np.dtype(layout.dtype).itemsize
        check_memory(layout.bytes, len(packed.sources))
        self._flat = np.empty(layout.size, layout.dtype)

        def keep(start: int, pixels: Planes) -> None:
            self._flat[start : start + pixels.size].reshape(pixels.shape)[...] = pixels

        decode_all(packed, layout, keep)

    def patch(self, image: int, sample: int, top: int, left: int, size: int) -> Planes:
        """A view into the kept image, no copy; see `PatchSource`."""
        layout = self._layout
        height, width = int(layout.heights[image, sample]), int(layout.widths[image, sample])
        start = int(layout.starts[image, sample]) + top * width + left
        # One constructor call: slicing and reshaping takes four times as long, 2 us for each image of each draw.
        return np.ndarray(
            (layout.channels, size, size),
            layout.dtype,
            self._flat,
            start * self._item,
            (height * width * self._item, width * self._item, self._item),
        )


def decode_all(packed: PackedImages, layout: FlatLayout, keep: Callable[[int, Planes], None]) -> None:
    """`keep(start, pixels [C, H, W])` of everything `packed` has, from several threads; closes the shards."""

    def load(sample: int) -> None:
        for image, starts in enumerate(layout.starts):
            keep(int(starts[sample]), packed.load(image, sample))

    load_all(load, len(packed.sources), layout.size // layout.channels)
    packed.close()


def load_all(load: Callable[[int], None], count: int, pixels: int) -> None:
    """`load(0)` to `load(count - 1)` in threads, which decode side by side; `pixels` are what they load together."""
    with ExitStack() as stack:
        progress = None
        if pixels >= _SHOW_PROGRESS_FROM:
            progress = stack.enter_context(ProgressBar("decoding images", total=count, unit="images"))
        pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
        try:
            for _ in pool.map(load, range(count)):
                if progress:
                    progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first bad image ends it, not the last
            raise


def check_memory(length: int, images: int) -> None:
    """UserError when keeping `length` bytes on each rank of this node does not fit into the free memory."""
    ranks = ranks_here()  # each rank of a node keeps its own copy
    needed = length * ranks
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"data.cache=ram needs {needed / 2**30:.1f} GiB for {plural(images, 'image')}"
            f"{f' on {ranks} ranks' if ranks > 1 else ''}, {available / 2**30:.1f} GiB are free; set data.cache=none"
        )


def _place(role: str, folders: Sequence[Path], indices: Sequence[Index]) -> ImageTable:
    rows = []
    shards_before = samples_before = 0
    for folder, index in zip(folders, indices, strict=True):
        for number, sample in enumerate(index.samples, start=samples_before):
            member = sample.member(role)
            if member:
                check_member(f"{folder}: image '{role}' of sample '{sample.source}'", sample, member, index)
                shard = shards_before + sample.shard
                rows.append((number, shard, member.offset, member.length, member.height, member.width))
        shards_before += len(index.shards)
        samples_before += len(index.samples)
    return ImageTable(role, *np.array(rows, dtype=np.int64).reshape(-1, 6).T.copy())


def check_member(label: str, sample: Sample, member: Member, index: Index) -> None:
    """UserError when an index says of an image what no packer writes: memory is reserved by these numbers."""
    shard = index.shards[sample.shard]
    if member.offset + member.length > shard.length:
        raise UserError(f"{label} ends behind the end of {shard.name}; pack the data set again")
    if member.height * member.width > MAX_PIXELS:
        limit = f"the limit of {MAX_PIXELS / 1e6:g} megapixels"
        raise UserError(f"{label} is {member.width}x{member.height}, more than {limit}; cut it into tiles")
