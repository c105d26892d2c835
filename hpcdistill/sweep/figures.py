"""Figures 5 and 6 of the DSSD paper, for any super-resolution runs and images, as a page.

Places are chosen by rule: where the methods differ most. Each image is enlarged by every network twice, once to be
measured and once to be shown, so that no more than one image's pictures are in memory.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.errors import UserError, nearest, plural
from hpcdistill.metrics.base import ImageRow
from hpcdistill.metrics.cost import Cost, super_resolution_cost
from hpcdistill.metrics.psnr_ssim import gray_as_it_is
from hpcdistill.metrics.sample_grid import bicubic_image, colourise, densest_crop
from hpcdistill.metrics.sr_evaluation import (
    SRImages,
    bicubic_upsampler,
    evaluate_image,
    evaluating,
    load_test_set,
    summarise,
)
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import load_generator
from hpcdistill.models.weights_file import generator_file
from hpcdistill.ops.colour import luma, luma_uint8
from hpcdistill.storage import Damaged
from hpcdistill.sweep.crop import Wanted
from hpcdistill.sweep.demos.base import Box, Measured, cut, gain_over, view
from hpcdistill.sweep.report import Commands, Crops, Facts, Image, Page, Row, Section, Table, Text
from hpcdistill.training.records import read_result

COLOURS = 7  # series of the page; the first is bicubic's
OVERVIEW = 720  # pixels of the longer side of a picture that only shows where the crops are
MIDDLE = 128  # the grey of no difference
BEYOND = 16  # levels that an encoded image may leave black and white by and still be shown as it is
BICUBIC = "Bicubic"
Picture = tuple[str, Image, str, int | None]  # label, pixels, note and colour


@dataclass(frozen=True)
class Shown:
    """A network of the page."""

    label: str
    file: Path
    network: nn.Module

    @property
    def scale(self) -> int:
        return int(cast(int, self.network.scale))

    @property
    def sees_hr(self) -> bool:
        """Whether it is a teacher whose encoder is shown; what it enlarges is no super-resolution."""
        return _has_encoder(self.network)


@dataclass(frozen=True)
class Choice:
    """An image, and the place where it is shown magnified."""

    image: int  # in the test set
    box: Box
    difference: float | None  # mean spread of the methods there, 8-bit levels; None: the user's choice


def open_runs(words: Sequence[tuple[str | None, Path]], which: str) -> list[Shown]:
    """The networks of `words` (label, run folder or file), and the teachers beside the runs of students.

    Raises UserError for what cannot be loaded, enlarges nothing, or has the label of another.
    """
    found: dict[Path, Shown] = {}
    teachers: list[tuple[str, Path]] = []
    for label, path in words:
        file = generator_file(path, which)
        network = load_generator(file)[0]
        if network.takes not in ("lr", "hr"):
            raise UserError(f"{path}: translates images; these figures are of super-resolution runs")
        result = _result(path)
        name = label or str(result.get("name") or path.stem)
        found[file.resolve()] = Shown(name, file, network)
        if isinstance(teacher := result.get("teacher"), str):
            teachers.append((f"teacher of {name}", path.parent / teacher))
    for name, folder in teachers:
        if not any((folder / "generators" / which).glob("*.safetensors")):
            continue
        file = generator_file(folder, which)
        network = load_generator(file)[0]
        if _has_encoder(network):
            found.setdefault(file.resolve(), Shown(name, file, network))
    labels = [shown.label for shown in found.values()]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two runs are called {twice}; call one otherwise: OTHER_LABEL=RUN")
    return list(found.values())


def figures_page(runs: Sequence[Shown], options: argparse.Namespace, crops: Sequence[Wanted], argv: list[str]) -> Page:
    """The page of `runs` on the images that `options` name, a part for each scale."""
    by_scale = sorted(runs, key=lambda shown: shown.scale)
    sections: list[Section] = []
    for scale, members in groupby(by_scale, key=lambda shown: shown.scale):
        sections += _Figures(scale, list(members), options, crops).sections()
    files = tuple((shown.label, str(shown.file)) for shown in runs)
    made = Section("How it was made", (
        Facts((*files, ("Images", str(options.images)), ("Rule of PSNR and SSIM", options.rule))),
        Commands((("This page", shlex.join(["python", "-m", "hpcdistill.figures", *argv])),)),
    ))  # fmt: skip
    return Page(
        title="What each method makes of an image",
        kicker="hpcdistill figures: super-resolution",
        lead=f"{', '.join(shown.label for shown in runs)} on the images of {Path(options.images).name}. PSNR and SSIM "
        "are of whole images; crops are magnified as they are, every pixel a square.",
        sections=(*sections, made),
        footer="This page needs no network and no other file.",
    )


class _Figures:
    """Everything of one scale."""

    def __init__(self, scale: int, runs: Sequence[Shown], options: argparse.Namespace, crops: Sequence[Wanted]) -> None:
        self.scale, self.rule = scale, options.rule
        self.methods = [shown for shown in runs if not shown.sees_hr]
        self.teachers = [shown for shown in runs if shown.sees_hr]
        self.images: SRImages = load_test_set(options.images, scale)
        self.rows: dict[str, list[ImageRow]] = {}
        self.choices = self._measure(options.pictures, options.side, crops)

    def sections(self) -> Iterator[Section]:
        """The table, figure 6 and figure 5, as far as there is something to show."""
        if self.methods:
            crops = tuple(self._compared(choice) for choice in self.choices)
            yield Section(
                f"x{self.scale}: the same place by each method", (self._table(), Text((self._places(),)), *crops)
            )
        if self.teachers:
            shown = tuple(self._encoded(choice) for choice in self.choices)
            yield Section(f"x{self.scale}: what each teacher's encoder extracts", (Text((_ENCODERS,)), *shown))

    # --- measuring, and where to look -----------------------------------------------------------------------------

    def _measure(self, pictures: int, side: int, crops: Sequence[Wanted]) -> list[Choice]:
        """Fill `rows` from all images, and choose what is shown."""
        named = [self._wanted(crop) for crop in crops]  # a place that is not there is said before anything is measured
        said = f"measuring {plural(len(self.methods), 'network')} on {plural(len(self.images), 'image')}"
        say(f"x{self.scale}: {said}")
        side = max(self.scale, side // self.scale * self.scale)
        found = []
        for number in range(len(self.images)):
            _, hr, lr = self.images[number]
            pictures_of = self._enlarged(number, hr, lr, keep=True)
            if not named:
                box, difference = densest_crop(self._spread(hr, lr, pictures_of), side)
                found.append(Choice(number, _on_grid(box, self.scale), difference))
        if named:
            return named
        found.sort(key=lambda choice: (-(choice.difference or 0), choice.image))
        return found[:pictures]

    def _enlarged(self, number: int, hr: Image, lr: Image, keep: bool = False) -> dict[str, Image]:
        """The picture that each method makes of an image; with `keep` its row is kept."""
        gray = gray_as_it_is(self.rule, self.images.is_gray(number))
        pictures: dict[str, Image] = {}
        networks: dict[str, nn.Module] = {BICUBIC: bicubic_upsampler(self.scale)}
        networks |= {shown.label: shown.network for shown in self.methods}
        for label, network in networks.items():
            with evaluating(network) as used:
                name = self.images.names[number]
                row, output = evaluate_image(used, name, hr, lr, self.scale, self.rule, gray=gray)
            made = bicubic_image(lr, self.scale) if label == BICUBIC else colourise(output[0], lr, self.scale, gray)
            pictures[label] = made
            if keep:
                self.rows.setdefault(label, []).append(row)
        return pictures

    def _spread(self, hr: Image, lr: Image, pictures: Mapping[str, Image]) -> NDArray[Any]:
        """How far the methods are apart at each pixel `[H, W]`, in 8-bit levels of luma.

        Of the networks where there are two: bicubic would drown them. Without any, of the teachers' encoders and
        bicubic, enlarged to the pixels of HR.
        """
        if self.methods:
            names = [shown.label for shown in self.methods]
            names = names if len(names) > 1 else [BICUBIC, *names]
            planes = np.stack([luma_uint8(pictures[name]) for name in names])
        else:
            small = [luma_uint8(lr), *(_luma(encoded) for encoded in self._encodings(hr).values())]
            planes = np.stack(small).repeat(self.scale, axis=1).repeat(self.scale, axis=2)
        spread: NDArray[Any] = planes.max(axis=0) - planes.min(axis=0)
        return spread * 255

    def _wanted(self, crop: Wanted) -> Choice:
        """The place that the user named; UserError for one that is not there."""
        names = list(self.images.names)
        if crop.image not in names:
            raise UserError(f"--crop {crop.image}: no such image; {nearest(crop.image, names)}")
        number = names.index(crop.image)
        height, width = self.images[number][1].shape[:2]
        if crop.top + crop.side > height or crop.left + crop.side > width:
            raise UserError(
                f"--crop {crop.image}:{crop.top},{crop.left},{crop.side}: leads out of the image of {width}x{height}; "
                "TOP and LEFT are those of its first pixel, SIDE its width and height"
            )
        return Choice(number, _on_grid((crop.top, crop.left, crop.side, crop.side), self.scale), None)

    # --- figure 6 -------------------------------------------------------------------------------------------------

    def _table(self) -> Table:
        rows = [
            Measured(label, label, number, summarise(rows).metrics, rows, self._cost(label))
            for number, (label, rows) in enumerate(self.rows.items())
        ]
        return Table(
            f"x{self.scale}, mean of {plural(len(self.images), 'image')}",
            ("Method", "PSNR [dB]", "to bicubic", "SSIM", "Parameters", "MACs"),
            tuple(
                Row(
                    (row.title, f"{row.psnr:.2f}", gain_over(row, rows[0]), f"{row.metrics['ssim']:.4f}",
                     *((f"{row.cost.params:,}", f"{row.cost.macs / 1e9:.2f} G") if row.cost.params else ("-", "-"))),
                    _colour(row.series),
                )
                for row in rows
            ),
            note=f"On luma, {self.scale} pixels of border left out, rule {self.rule}. MACs for an output of 1280x720 "
            "by the literature's rule, which charges a transposed convolution at its output's size.",
        )  # fmt: skip

    def _cost(self, label: str) -> Cost:
        network = next((shown.network for shown in self.methods if shown.label == label), None)
        return Cost(0, 0, 0) if network is None else super_resolution_cost(network)

    def _places(self) -> str:
        if any(choice.difference is None for choice in self.choices):
            return "The places were named by who made this page."
        among = "the networks" if len(self.methods) > 1 else "the network and bicubic"
        return (
            f"The images and places are those where {among} differ most, of all places on a grid: where a difference "
            "can be seen, not where one of them is good. The brightness is the network's, of luma networks the colours "
            "are bicubic's."
        )

    def _compared(self, choice: Choice) -> Crops:
        """A picture and its crop, by every method, from the HR image to the last run."""
        name, hr, lr = self.images[choice.image]
        pictures: list[Picture] = [("HR", hr, "PSNR / SSIM", None)]
        for number, (label, picture) in enumerate(self._enlarged(choice.image, hr, lr).items()):
            row = self.rows[label][choice.image]
            pictures.append((label, picture, f"{row['psnr']:.2f} dB / {row['ssim']:.4f}", _colour(number)))
        overview, factor = _overview(hr)
        shown = view(name, _said(choice), _shrunk(choice.box, factor), _cut(pictures, choice.box))
        return Crops(name, overview, f"The image {name}", (shown,), _size(hr))

    # --- figure 5 -------------------------------------------------------------------------------------------------

    def _encodings(self, hr: Image) -> dict[str, Tensor]:
        """The LR image that each teacher's encoder makes, `[c, h, w]` nominally in [0, 1]."""
        rgb = torch.from_numpy(np.ascontiguousarray(hr.transpose(2, 0, 1)))[None].float() / 255
        encoded: dict[str, Tensor] = {}
        for shown in self.teachers:
            assert isinstance(shown.network, PrivilegedTeacher)
            with torch.no_grad():
                encoded[shown.label] = shown.network.encode(luma(rgb) if shown.network.channels == 1 else rgb)[-1][0]
        return encoded

    def _encoded(self, choice: Choice) -> Crops:
        """The encoders' LR images, and what they differ in from bicubic's beside each; whole and magnified."""
        name, hr, lr = self.images[choice.image]
        given = luma_uint8(lr).astype(np.float64) * 255
        made = {label: _luma(encoded) * 255 for label, encoded in self._encodings(hr).items()}
        gain = _gain([levels - given for levels in made.values()])
        whole: list[Picture] = [(BICUBIC, _grey(given), "what students are given", 0)]
        for number, (label, levels) in enumerate(made.items(), 1):
            change, (low, high) = levels - given, _window(levels)
            said = "" if (low, high) == (0, 255) else f"black is {low:.0f}, white {high:.0f}"
            whole.append((label, _grey((levels - low) * 255 / (high - low)), said, _colour(number)))
            said = f"times {gain:g}; root mean square {np.sqrt(np.mean(change**2)):.1f} levels"
            whole.append((f"{label}, less bicubic", _grey(MIDDLE + gain * change), said, _colour(number)))
        top, left, height, width = choice.box
        small = (top // self.scale, left // self.scale, height // self.scale, width // self.scale)
        original = ("HR", cut(_grey(luma_uint8(hr) * 255.0), choice.box), f"{width} x {height} pixels", None)
        overview, factor = _overview(hr)
        views = (
            view(name, "the LR images", None, whole),
            view(name, "magnified", _shrunk(choice.box, factor), [original, *_cut(whole, small)]),
        )
        return Crops(name, overview, f"The image {name}", views, _size(hr))


_ENCODERS = (
    "A teacher sees the HR image and makes an LR image of its own, which its F enlarges. Here it is, on luma, beside "
    "the bicubic LR image that students are given, and less that image (grey: no difference): what is light or dark "
    "there the encoder has kept of HR, or put there for F to use. Differences of one picture are magnified alike. An "
    "encoder's values need not stay between black (0) and white (255); where they do not, the picture says its range."
)


def _has_encoder(network: nn.Module) -> bool:
    return isinstance(network, PrivilegedTeacher) and network.takes == "hr"


def _result(path: Path) -> Mapping[str, Any]:
    """result.json of a run folder; empty for a file, or a run that has not finished."""
    try:
        return (read_result(path) if path.is_dir() else None) or {}
    except Damaged as error:
        raise UserError(str(error)) from None


def _colour(number: int) -> int | None:
    """The page's colour of the method `number`, bicubic being 0; there are not more."""
    return number if number < COLOURS else None


def _luma(planes: Tensor) -> NDArray[Any]:
    """Luma `[h, w]` in [0, 1] of `[c, h, w]`; one channel is luma already."""
    found = planes if planes.shape[0] == 1 else luma(planes[None])[0]
    return np.asarray(found[0].double())


def _grey(levels: NDArray[Any]) -> Image:
    """`[h, w]` in 0 .. 255 as a grey picture, clamped and rounded."""
    return np.repeat(np.clip(np.rint(levels), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _window(levels: NDArray[Any]) -> tuple[float, float]:
    """What is shown as black and as white: 0 and 255, or nearly all of the values where they go beyond."""
    low, high = (float(bound) for bound in np.percentile(levels, (0.5, 99.5)))
    if low >= -BEYOND and high <= 255 + BEYOND:
        return 0.0, 255.0
    return float(np.floor(low)), float(np.floor(low) + max(1, np.ceil(high - np.floor(low))))


def _gain(differences: Sequence[NDArray[Any]]) -> float:
    """What differences (8-bit levels) are magnified by, two digits: nearly all stay between black and white."""
    most = max((float(np.percentile(np.abs(change), 99.5)) for change in differences), default=0.0)
    if most == 0:
        return 1.0
    gain = (MIDDLE - 1) / most
    unit = 10.0 ** (np.floor(np.log10(gain)) - 1)
    return float(f"{np.floor(gain / unit) * unit:.2g}")


def _on_grid(box: Box, scale: int) -> Box:
    """The box moved and cut to whole LR pixels, so that the crop of the LR image is the same place."""
    top, left, height, width = (side // scale * scale for side in box)
    return top, left, max(scale, height), max(scale, width)


def _overview(hr: Image) -> tuple[Image, float]:
    """The picture small enough to show where the crops are, and its size to the original's."""
    factor = min(1.0, OVERVIEW / max(hr.shape[:2]))
    if factor == 1:
        return hr, 1.0
    size = [max(1, round(side * factor)) for side in hr.shape[1::-1]]
    return np.asarray(PillowImage.fromarray(hr).resize((size[0], size[1]), PillowImage.Resampling.LANCZOS)), factor


def _shrunk(box: Box, factor: float) -> Box:
    """The box in the pixels of the overview."""
    top, left, height, width = (round(side * factor) for side in box)
    return top, left, max(1, height), max(1, width)


def _cut(pictures: Sequence[Picture], box: Box) -> list[Picture]:
    return [(label, cut(picture, box), note, colour) for label, picture, note, colour in pictures]


def _said(choice: Choice) -> str:
    """Where a crop is, and why there."""
    top, left, height, width = choice.box
    where = f"{width} x {height} pixels, {left} from the left and {top} from the top"
    return where if choice.difference is None else f"{where}; they differ by {choice.difference:.1f} levels on average"


def _size(hr: Image) -> str:
    return f"{hr.shape[1]} x {hr.shape[0]} pixels"
