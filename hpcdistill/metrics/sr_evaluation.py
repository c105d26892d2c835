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
from torch import Tensor, nn

from hpcdistill.default_generator import drawing
from hpcdistill.errors import UserError
from hpcdistill.metrics.base import PSNR_CAP, SR_METRICS, ImageRow, SetResult, means
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is, luma_pair
from hpcdistill.metrics.sr_test_sets import Image, SRImages, UnusableImageError, load_test_set
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.colour import luma
from hpcdistill.ops.transfer import queued
from hpcdistill.training.evaluation import never, until_stopped

BATCH_PIXELS = 1 << 21  # of HR at a time on a GPU: 13 images of B100, half a gigabyte of float64 maps


def summarise(rows: Sequence[ImageRow]) -> SetResult:
    """The means over all images of a test set."""
    return SetResult(means(rows, (metric.name for metric in SR_METRICS)), len(rows), list(rows))


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
    pair = as_tensors(hr, lr, device, gray_as_it_is(rule, gray))
    output = super_resolve(generator, pair, autocast)
    return image_row(name, pair, output, scale, rule), output


@contextmanager
def evaluating(generator: nn.Module) -> Iterator[nn.Module]:
    """Yield what is evaluated in place of `generator`, without gradients: its inference form, the same function.

    `deploy()` equals the trained form to 2e-6 and takes half the time on a CPU. It keeps the layout that the network is
    trained in: another one moves a pixel in a million by a level, and an image's PSNR by 4e-5 dB. A generator without
    an inference form is put in eval mode, and afterwards every submodule is in the mode it was in before.
    """
    deploy = getattr(generator, "deploy", None)
    modes = [(part, part.training) for part in generator.modules()]
    try:
        with torch.no_grad():
            with drawing():  # new layers draw their first weights
                evaluated = generator.eval() if deploy is None else deploy()
            yield evaluated
    finally:
        for part, training in modes:
            part.training = training


@dataclass(frozen=True)
class ImagePair:
    """HR `[B, 3, H, W]` and LR `[B, 3, H/s, W/s]`, uint8: a quarter of float luma and RGB together."""

    hr: Tensor
    lr: Tensor
    gray: bool = False  # of three equal channels, each of which is its luma as it is (`gray_as_it_is`)


def super_resolve(generator: nn.Module, pair: ImagePair, autocast: torch.dtype | None = None) -> Tensor:
    """The generator's float32 output `[B, c, H, W]`, nominally in [0, 1]; it takes luma or RGB of LR or HR."""
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
        # Images of one size are a batch on a GPU, which small ones leave idle. On a CPU a batch takes longer than its
        # images one by one: its maps do not stay in the cache.
        self.batch_pixels = 0 if self.device.type == "cpu" else BATCH_PIXELS
        self._pairs: dict[tuple[str, int], ImagePair] = {}
        self._bicubic: dict[tuple[str, int], Tensor] = {}  # the values of `SR_METRICS`, on the device

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
            self._pairs[key] = as_tensors(hr, lr, "cpu", gray)
        return self._pairs[key]

    def evaluate(
        self, generator: nn.Module, rank: int = 0, ranks: int = 1, stop: Callable[[], bool] = never
    ) -> dict[str, list[ImageRow]]:
        """Test set -> the rows of images rank, rank + ranks, ...; the generator's modes are left as they were.

        The numbers of a set are read from the device once, behind its last image. No collective; EvaluationStopped when
        `stop()` says so between two images.
        """
        assert _channels(generator) == self.channels
        rows: dict[str, list[ImageRow]] = {}
        with evaluating(generator) as network:
            for name, images in self.test_sets.items():
                mine = range(rank, len(images), ranks)
                values: dict[int, Tensor] = {}
                for numbers in until_stopped(self._batches(name, mine), stop):
                    pair = self._on_device(name, numbers)
                    output = super_resolve(network, pair, self.autocast)
                    measured = self._measured(name, numbers, pair, output)
                    values |= zip(numbers, measured, strict=True)
                    self._measure_bicubic(name, numbers, pair)
                rows[name] = image_rows([images.names[index] for index in mine], [values[index] for index in mine])
        return rows

    def bicubic(self, rank: int = 0, ranks: int = 1) -> dict[str, list[ImageRow]]:
        """What `evaluate` gives, of bicubic enlargement: of luma, whatever networks take, as the literature has it.

        It never changes: each image is measured at the first `evaluate`, where a signal is heard, or here.
        """
        rows = {}
        for name, images in self.test_sets.items():
            mine = range(rank, len(images), ranks)
            missing = [index for index in mine if (name, index) not in self._bicubic]
            with torch.no_grad():
                for numbers in self._batches(name, missing):
                    self._measure_bicubic(name, numbers, self._on_device(name, numbers))
            rows[name] = image_rows(
                [images.names[index] for index in mine], [self._bicubic[name, index] for index in mine]
            )
        return rows

    def _measure_bicubic(self, test_set: str, numbers: Sequence[int], pair: ImagePair) -> None:
        if all((test_set, index) in self._bicubic for index in numbers):
            return
        output = super_resolve(bicubic_upsampler(self.scale), pair)
        for index, values in zip(numbers, self._measured(test_set, numbers, pair, output), strict=True):
            self._bicubic[test_set, index] = values

    def _measured(self, test_set: str, numbers: Sequence[int], pair: ImagePair, output: Tensor) -> Tensor:
        names = [self.test_sets[test_set].names[index] for index in numbers]
        return image_values(names, pair, output, self.scale, self.rule)

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
                    super_resolve(network, self._on_device(test_set, [index]), self.autocast).cpu(),
                )
                for index in until_stopped(range(min(count, len(images))), stop)
            ]

    def _batches(self, test_set: str, indices: Sequence[int]) -> Iterator[list[int]]:
        """The images `indices` in batches of one size, of at most `batch_pixels` HR pixels or one image."""
        if not self.batch_pixels:
            yield from ([index] for index in indices)
            return
        alike: dict[Any, list[int]] = {}
        for index in indices:
            pair = self.pair(test_set, index)
            alike.setdefault((pair.hr.shape, pair.gray), []).append(index)
        for (shape, _), those in alike.items():
            size = max(1, self.batch_pixels // (shape[-2] * shape[-1]))
            yield from (those[start : start + size] for start in range(0, len(those), size))

    def _on_device(self, test_set: str, numbers: Sequence[int]) -> ImagePair:
        pairs = [self.pair(test_set, index) for index in numbers]
        hr, lr = (torch.cat(images) for images in zip(*((pair.hr, pair.lr) for pair in pairs), strict=True))
        return ImagePair(queued(hr, self.device), queued(lr, self.device), pairs[0].gray)


def image_values(names: Sequence[str], pair: ImagePair, output: Tensor, scale: int, rule: Rule) -> Tensor:
    """`[B, metrics]` in the order of `SR_METRICS`, float64 on the device, of the images `names` of one size.

    NaN for an image whose output is not finite.
    """
    try:
        produced, expected = luma_pair(output, pair.hr, scale, rule, pair.gray)
        values = torch.stack([_of_each(metric.compute, produced, expected) for metric in SR_METRICS], dim=-1)
    except UserError as error:
        raise UnusableImageError(f"{names[0]}: {error}") from None
    # Clamped, an infinite pixel would be a white or a black one.
    finite = output.isfinite().flatten(1).all(dim=1, keepdim=True)
    return torch.where(finite, values, math.nan)


def _of_each(compute: Callable[[Tensor, Tensor], Tensor], produced: Tensor, expected: Tensor) -> Tensor:
    """A metric of each of the images `[B, H, W]`, `[B]`: of all at once, where it does not answer with one mean."""
    if len(produced) > 1 and (values := compute(produced, expected)).shape == produced.shape[:1]:
        return values
    return torch.stack([compute(one, other) for one, other in zip(produced, expected, strict=True)])


def image_rows(names: Sequence[str], values: Sequence[Tensor]) -> list[ImageRow]:
    """The rows of images from the values `[metrics]` of each, in one transfer from the device."""
    rows = []
    for name, numbers in zip(names, torch.stack(list(values)).tolist() if values else [], strict=True):
        if any(map(math.isnan, numbers)):
            raise UserError(
                f"{name}: the network's output is not finite; its weights are damaged or its training diverged"
            )
        capped = (min(number, PSNR_CAP) for number in numbers)
        rows.append({"name": name} | dict(zip((metric.name for metric in SR_METRICS), capped, strict=True)))
    return rows


def image_row(name: str, pair: ImagePair, output: Tensor, scale: int, rule: Rule) -> ImageRow:
    """The row of the only image of `pair`."""
    return image_rows([name], [*image_values([name], pair, output, scale, rule)])[0]


def as_tensors(hr: Image, lr: Image, device: torch.device | str, gray: bool) -> ImagePair:
    planes = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device) for image in (hr, lr)]
    return ImagePair(planes[0], planes[1], gray)


def _channels(generator: nn.Module) -> int:
    channels = generator.channels
    assert channels in (1, 3)
    return int(channels)
