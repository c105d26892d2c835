"""A generator's PSNR and SSIM on a test set, image by image at full size (`dssd.md`, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcdistill.console import warn
from hpcdistill.data.folders import SUFFIXES, beside, left_out
from hpcdistill.data.images import Colour, is_gray, read_rgb
from hpcdistill.data.index import INDEX_NAME, Index, Sample, load_index
from hpcdistill.data.read.cache import check_member
from hpcdistill.data.test_sets import hr_files
from hpcdistill.errors import UserError
from hpcdistill.metrics.base import PSNR_CAP, SR_METRICS, ImageRow, SetResult, means
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is, luma_pair
from hpcdistill.ops.bicubic import downsample_uint8, upsample
from hpcdistill.ops.colour import luma
from hpcdistill.ops.downsampling import ResizeRule
from hpcdistill.training.evaluation import never, until_stopped

Image = NDArray[np.uint8]  # [H, W, 3] RGB


class UnusableImageError(UserError):
    """An image that cannot be read, or is too small to be measured: the network is not to blame."""


def summarise(rows: Sequence[ImageRow]) -> SetResult:
    """The means over all images of a test set."""
    return SetResult(means(rows, (metric.name for metric in SR_METRICS)), len(rows), list(rows))


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


class BicubicUpsampler(nn.Module):
    """The bicubic baseline: MATLAB's enlargement of what a network would be fed with, in floating point.

    With c = 1 luma is enlarged, as the literature's code does for its tables (RGB differs by 0.01 dB).
    """

    takes: Literal["lr"] = "lr"

    def __init__(self, scale: int, channels: int = 1) -> None:
        super().__init__()
        self.scale, self.channels = scale, channels

    @property
    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "channels": self.channels}

    def forward(self, lr: Tensor) -> Tensor:
        """`[B, c, h, w]` in [0, 1] to `[B, c, s h, s w]`, not clamped."""
        return upsample(lr, self.scale)


def bicubic_upsampler(scale: int, channels: int = 1) -> BicubicUpsampler:
    """The baseline in the place of a generator."""
    return BicubicUpsampler(scale, channels)


def evaluate_image(
    generator: nn.Module,
    name: str,
    hr: Image,
    lr: Image,
    scale: int,
    rule: Rule,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    gray: bool = False,
) -> tuple[ImageRow, Tensor]:
    """One image's row and the output `[1, c, H, W]` it was computed from; call it inside `evaluating`.

    The generator says what it takes ("lr" or "hr") and its channels (1: luma, 3: RGB, in [0, 1]); it is on `device`.
    See `luma_pair` for the rules. `autocast`: run it in this half precision. `gray`: as `SRImages.is_gray` says of it.
    UnusableImageError for an image that is too small, UserError for an output that is not finite.
    """
    pair = _as_tensors(hr, lr, device, gray_as_it_is(rule, gray))
    output = super_resolve(generator, pair, autocast)
    return _row(name, pair, output, scale, rule), output


@contextmanager
def evaluating(generator: nn.Module) -> Iterator[nn.Module]:
    """Yield what is evaluated in place of `generator`, without gradients: its inference form, the same function.

    `deploy()` equals the trained form to 2e-6 and takes half the time on a CPU. A generator without one is put in
    eval mode, and afterwards every submodule is in the mode it was in before.
    """
    deploy = getattr(generator, "deploy", None)
    modes = [(part, part.training) for part in generator.modules()]
    try:
        with torch.no_grad():
            yield generator.eval() if deploy is None else deploy()
    finally:
        for part, training in modes:
            part.training = training


@dataclass(frozen=True)
class ImagePair:
    """HR `[1, 3, H, W]` and LR `[1, 3, H/s, W/s]`, uint8: a quarter of float luma and RGB together."""

    hr: Tensor
    lr: Tensor
    gray: bool = False  # of three equal channels, each of which is its luma as it is (`gray_as_it_is`)


def super_resolve(generator: nn.Module, pair: ImagePair, autocast: torch.dtype | None = None) -> Tensor:
    """The generator's float32 output `[1, c, H, W]`, nominally in [0, 1]; it takes luma or RGB of LR or HR."""
    assert generator.takes in ("lr", "hr")
    source: Tensor = pair.lr if generator.takes == "lr" else pair.hr
    image = source.float() / 255
    if _channels(generator) == 1:
        image = image[:, :1] if pair.gray else luma(image)
    with torch.autocast(source.device.type, dtype=autocast, enabled=autocast is not None):
        output: Tensor = generator(image)
    if output.shape[-2:] != pair.hr.shape[-2:]:
        raise UserError(
            f"the network made {output.shape[-1]}x{output.shape[-2]} pixels of an image of "
            f"{source.shape[-1]}x{source.shape[-2]}, not {pair.hr.shape[-1]}x{pair.hr.shape[-2]}; "
            "evaluate it at the scale it was trained for"
        )
    return output.float()


class SREvaluator:
    """Evaluates one method's generators on test sets again and again during a training.

    Images are decoded once and kept as uint8 tensors (Set5, Set14 and B100 together: 70 MiB); with several ranks
    each keeps its own share. What `evaluate` returns is gathered from the ranks and given to `result`.
    """

    def __init__(
        self,
        test_sets: Mapping[str, Path | str | SRImages],
        scale: int,
        channels: int,
        rule: Rule = "pisr",
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.scale, self.channels, self.rule = scale, channels, rule
        self.device, self.autocast = torch.device(device), autocast
        self.test_sets = {
            name: given if isinstance(given, SRImages) else load_test_set(given, scale)
            for name, given in test_sets.items()
        }
        self._pairs: dict[tuple[str, int], ImagePair] = {}
        self._bicubic: dict[tuple[str, int], ImageRow] = {}

    def preload(self, rank: int = 0, ranks: int = 1) -> None:
        """Decode this rank's images now, so that a damaged one ends the run before it trains."""
        for name, images in self.test_sets.items():
            for index in range(rank, len(images), ranks):
                self.pair(name, index)

    def pair(self, test_set: str, index: int) -> ImagePair:
        """One image on the CPU, from memory after the first time."""
        key = (test_set, index)
        if key not in self._pairs:
            images = self.test_sets[test_set]
            _, hr, lr = images.read(index)
            gray = gray_as_it_is(self.rule, True) and images.is_gray(index)
            self._pairs[key] = _as_tensors(hr, lr, "cpu", gray)
        return self._pairs[key]

    def evaluate(
        self, generator: nn.Module, rank: int = 0, ranks: int = 1, stop: Callable[[], bool] = never
    ) -> dict[str, list[ImageRow]]:
        """Test set -> the rows of images rank, rank + ranks, ...; the generator's modes are left as they were.

        No collective; EvaluationStopped when `stop()` says so between two images.
        """
        assert _channels(generator) == self.channels
        rows: dict[str, list[ImageRow]] = {}
        with evaluating(generator) as network:
            for name, images in self.test_sets.items():
                rows[name] = []
                for index in until_stopped(range(rank, len(images), ranks), stop):
                    pair = self._on_device(name, index)
                    output = super_resolve(network, pair, self.autocast)
                    rows[name].append(_row(images.names[index], pair, output, self.scale, self.rule))
                    self._bicubic_row(name, index, pair)
        return rows

    def bicubic(self, rank: int = 0, ranks: int = 1) -> dict[str, list[ImageRow]]:
        """What `evaluate` gives, of bicubic enlargement: of luma, whatever networks take, as the literature has it.

        It never changes: each image is measured at the first `evaluate`, where a signal is heard, or here.
        """
        with torch.no_grad():
            return {
                name: [
                    self._bicubic_row(name, index, self._on_device(name, index))
                    for index in range(rank, len(images), ranks)
                ]
                for name, images in self.test_sets.items()
            }

    def _bicubic_row(self, test_set: str, index: int, pair: ImagePair) -> ImageRow:
        if (row := self._bicubic.get((test_set, index))) is None:
            name = self.test_sets[test_set].names[index]
            row = _row(name, pair, super_resolve(bicubic_upsampler(self.scale), pair), self.scale, self.rule)
            self._bicubic[test_set, index] = row
        return row

    def result(self, test_set: str, rows: Sequence[ImageRow]) -> SetResult:
        """The means of one test set from the rows of all ranks, in any order; no image may be missing."""
        by_name = {row["name"]: row for row in rows}
        return summarise([by_name[name] for name in self.test_sets[test_set].names])

    def samples(
        self, generator: nn.Module, test_set: str, count: int, stop: Callable[[], bool] = never
    ) -> list[tuple[str, ImagePair, Tensor]]:
        """(name, images, output `[1, c, H, W]` on the CPU) of the first `count` images, for `sample_grid`."""
        images = self.test_sets[test_set]
        with evaluating(generator) as network:
            return [
                (
                    images.names[index],
                    self.pair(test_set, index),
                    super_resolve(network, self._on_device(test_set, index), self.autocast).cpu(),
                )
                for index in until_stopped(range(min(count, len(images))), stop)
            ]

    def _on_device(self, test_set: str, index: int) -> ImagePair:
        pair = self.pair(test_set, index)
        return ImagePair(pair.hr.to(self.device), pair.lr.to(self.device), pair.gray)


def _row(name: str, pair: ImagePair, output: Tensor, scale: int, rule: Rule) -> ImageRow:
    try:
        produced, expected = luma_pair(output[0], pair.hr[0], scale, rule, pair.gray)
        # One transfer from the device an image.
        values = torch.stack([metric.compute(produced, expected) for metric in SR_METRICS]).tolist()
    except UserError as error:
        raise UnusableImageError(f"{name}: {error}") from None
    if any(map(math.isnan, values)):
        raise UserError(f"{name}: the network's output is not finite; its weights are damaged or its training diverged")
    return {"name": name} | {
        metric.name: min(value, PSNR_CAP) for metric, value in zip(SR_METRICS, values, strict=True)
    }


def _as_tensors(hr: Image, lr: Image, device: torch.device | str, gray: bool) -> ImagePair:
    planes = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device) for image in (hr, lr)]
    return ImagePair(planes[0], planes[1], gray)


def _channels(generator: nn.Module) -> int:
    channels = generator.channels
    assert channels in (1, 3)
    return int(channels)


def _cropped(image: Image, scale: int, name: str) -> Image:
    height, width = image.shape[0] // scale * scale, image.shape[1] // scale * scale
    if not height or not width:
        raise UserError(f"{name}: {image.shape[1]}x{image.shape[0]} is too small for x{scale}; use larger images")
    return image[:height, :width]
