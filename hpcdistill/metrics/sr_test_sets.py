"""The images of a super-resolution test set, from a folder or packed, and what goes wrong with one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcdistill.console import warn
from hpcdistill.data.folders import SUFFIXES, beside, left_out
from hpcdistill.data.images import Colour, is_gray, read_rgb
from hpcdistill.data.index import INDEX_NAME, Index, Sample, load_index
from hpcdistill.data.read.cache import check_member
from hpcdistill.data.test_sets import hr_files
from hpcdistill.errors import UserError
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is
from hpcdistill.ops.bicubic import downsample_uint8
from hpcdistill.ops.downsampling import ResizeRule

Image = NDArray[np.uint8]  # [H, W, 3] RGB


class UnusableImageError(UserError):
    """An image that cannot be read, or is too small to be measured: the network is not to blame."""


class SRImages(Sequence[tuple[str, Image, Image]]):
    """The images of a test set, read when asked for: (name, hr `[H, W, 3]`, lr `[H/s, W/s, 3]`), uint8 RGB.

    HR is cropped to a multiple of s (bottom and right). Raises UserError for an image that cannot be read. `lr`: how LR
    was made, as `Index.lr`.
    """

    def __init__(self, path: Path, scale: int, names: Sequence[str], lr: str) -> None:
        self.path = path
        self.lr = lr
        self.scale = scale
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, Image, Image]]:
        return (self.read(index) for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.read(place) for place in range(len(self))[index]]
        return self.read(range(len(self))[index])

    def read(self, index: int) -> tuple[str, Image, Image]:
        """The image at `index` in 0 .. len - 1."""
        raise NotImplementedError

    def is_gray(self, index: int) -> bool:
        """Whether the file of that image stores gray: see `psnr_ssim`. Reads no more than its header."""
        raise NotImplementedError

    def taken_as_gray(self, rule: Rule) -> list[str]:
        """The names of the images that the rule takes as they are because their files store gray."""
        if not gray_as_it_is(rule, True):
            return []
        return [name for index, name in enumerate(self.names) if self.is_gray(index)]


class FolderTestSet(SRImages):
    """A folder of HR images; LR is computed as MATLAB's `imresize` does."""

    RULE: ResizeRule = "newer"

    def __init__(self, path: Path, scale: int, background: Colour | None = None) -> None:
        self._files = hr_files(path)
        self._background = background
        inside = self._files[0].parent
        for line in (left_out(inside, "name such a folder by itself"), beside(path, inside)):
            if line:
                warn(line)
        # Set14 holds ppt3.png, another copy ppt3.bmp: only names that clash keep their suffix.
        stems = [file.stem for file in self._files]
        names = [file.name if stems.count(file.stem) > 1 else file.stem for file in self._files]
        super().__init__(path, scale, names, self.RULE)

    def is_gray(self, index: int) -> bool:
        if not is_gray(self._files[index]):
            return False
        if self._background is None or len(set(self._background)) == 1:
            return True
        hr = self.read(index)[1]  # its transparent pixels may have become coloured
        return bool((hr == hr[..., :1]).all())

    def read(self, index: int) -> tuple[str, Image, Image]:
        file = self._files[index]
        try:
            hr = _cropped(read_rgb(file, str(file), background=self._background), self.scale, str(file))
        except UserError as error:
            raise UnusableImageError(str(error)) from None
        return self.names[index], hr, downsample_uint8(hr, self.scale, self.RULE)


class PackedTestSet(SRImages):
    """A packed data set's samples with their stored LR; see `data.index`.

    Sets packed before LR images had rules hold every HR as RGB: of them none is known to be gray.
    """

    def __init__(self, path: Path, scale: int) -> None:
        self._index: Index = load_index(path)
        if self._index.kind != "lr-hr":
            raise UserError(f"{path}: is packed for image translation ({self._index.kind}), not for super-resolution")
        if scale not in self._index.scales:
            scales = ", ".join(f"x{known}" for known in self._index.scales) or "no super-resolution scale"
            raise UserError(f"{path}: packed for {scales}, not for x{scale}; evaluate a folder of HR images instead")
        if not self._index.samples:
            raise UserError(f"{path}: holds no images; pack the data set again")
        names = [Path(sample.source).stem or sample.key for sample in self._index.samples]
        super().__init__(path, scale, names, self._index.lr or "unknown")
        if len(set(self.names)) < len(self.names):
            self.names = tuple(sample.key for sample in self._index.samples)

    def read(self, index: int) -> tuple[str, Image, Image]:
        sample = self._index.samples[index]
        lr = self._member(sample, f"lr{self.scale}.png")
        hr = self._member(sample, "hr.png")
        height, width = lr.shape[0] * self.scale, lr.shape[1] * self.scale
        if hr.shape[0] - height not in range(self.scale) or hr.shape[1] - width not in range(self.scale):
            raise UserError(
                f"{self.path}: {sample.key}: HR {hr.shape[1]}x{hr.shape[0]} does not belong to "
                f"LR {lr.shape[1]}x{lr.shape[0]} at x{self.scale}; pack the data set again"
            )
        return self.names[index], hr[:height, :width], lr

    def is_gray(self, index: int) -> bool:
        return is_gray(self._content(self._index.samples[index], "hr.png", 26))

    def _member(self, sample: Sample, suffix: str) -> Image:
        shard = self._index.shards[sample.shard].name
        return read_rgb(self._content(sample, suffix), f"{shard}/{sample.key}.{suffix}")

    def _content(self, sample: Sample, suffix: str, most: int | None = None) -> bytes:
        """The member, or its first `most` bytes."""
        place = sample.members.get(suffix)
        if place is None:
            raise UserError(f"{self.path}: {sample.key} has no {suffix}; pack the data set again")
        check_member(f"{self.path}: {suffix} of {sample.key}", sample, place, self._index)
        shard = self.path / self._index.shards[sample.shard].name
        if not shard.is_file():
            raise UserError(f"{shard}: no such shard, although {INDEX_NAME} names it; copy or pack the data set again")
        with open(shard, "rb") as file:
            file.seek(place.offset)
            length = place.length if most is None else min(place.length, most)
            content = file.read(length)
        if len(content) != length:
            raise UserError(f"{shard}: shorter than {INDEX_NAME} says; copy or pack the data set again")
        return content


def load_test_set(path: Path | str, scale: int, background: Colour | None = None) -> SRImages:
    """A test set from a packed data set, or from a folder of HR images (also `path/HR`, as benchmarks ship them).

    Only the names are read here. `background`: what transparent pixels of a folder's images are laid over. Raises
    UserError for a missing or empty folder, or a scale that was not packed.
    """
    path = Path(path)
    if (path / INDEX_NAME).is_file():
        return PackedTestSet(path, scale)
    # The splits of a packed set; not where the folder holds images of its own, and a set was packed beside them.
    own = path.is_dir() and any(entry.suffix.lower() in SUFFIXES or entry.name == "HR" for entry in path.iterdir())
    if not own and any(path.glob(f"*/{INDEX_NAME}")):
        return PackedTestSet(path, scale)
    return FolderTestSet(path, scale, background)


def _cropped(image: Image, scale: int, name: str) -> Image:
    height, width = image.shape[0] // scale * scale, image.shape[1] // scale * scale
    if not height or not width:
        raise UserError(f"{name}: {image.shape[1]}x{image.shape[0]} is too small for x{scale}; use larger images")
    return image[:height, :width]
