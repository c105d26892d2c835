"""Figures 5 and 6 of the DSSD paper, for any super-resolution methods and images, as a page; and where each is wrong.

Places are chosen by rule: where the methods differ most. Each image is enlarged by every method once to be measured,
and those that are shown once more, so that no more than one image's pictures are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from hpcdistill.data.outputs import check_page
from hpcdistill.deploy.candidates import Candidate, check_labels
from hpcdistill.errors import UserError, plural
from hpcdistill.metrics.base import SetResult
from hpcdistill.metrics.cost import Cost, super_resolution_cost
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is
from hpcdistill.metrics.reference import BICUBIC
from hpcdistill.metrics.sample_grid import bicubic_image, colourise, densest_crop
from hpcdistill.metrics.sr_evaluation import as_tensors, bicubic_upsampler
from hpcdistill.metrics.sr_test_sets import SRImages
from hpcdistill.metrics.trained_super_resolution import Source, all_evaluating, evaluate_super_resolution, outputs
from hpcdistill.models import registry
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.weights_file import generator_file
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.sweep.charts import Chart
from hpcdistill.sweep.comparison import Captioned, colour, error_crops, results_table, spectra
from hpcdistill.sweep.crop import Wanted, check_inside, image_number
from hpcdistill.sweep.demos.base import Box, Measured, cut, view
from hpcdistill.sweep.encoder_figures import EXPLAINED, encoder_pictures, encodings, original_crop
from hpcdistill.sweep.report import Charts, Commands, Crops, Facts, Image, Page, Section, Table, Text
from hpcdistill.training.records import read_result

OVERVIEW = 720  # pixels of the longer side of a picture that only shows where the crops are
PICTURES, SIDE = 3, 64  # images that are shown, pixels of a crop
BICUBIC_TITLE = "Bicubic"
ALIKE = 0.5  # levels on average: what no eye sees


@dataclass(frozen=True)
class Choice:
    """An image, and the place where it is shown magnified."""

    image: int  # in the test set
    box: Box
    difference: float | None  # mean spread of the methods there, 8-bit levels; None: the user's choice


def with_teachers(candidates: Sequence[Candidate], folders: Sequence[Path], which: str) -> list[Candidate]:
    """`candidates` of the run folders (or other paths) `folders`, and the teachers found beside the runs of students.

    Raises UserError for a teacher that has the label of another.
    """
    found = {candidate.path.resolve(): candidate for candidate in candidates}
    for candidate, folder in zip(candidates, folders, strict=True):
        teacher = (read_result(folder) or {}).get("teacher") if folder.is_dir() else None
        if not isinstance(teacher, str):
            continue
        beside = folder.parent / teacher
        if not any((beside / "generators" / which).glob("*.safetensors")):
            continue
        file = generator_file(beside, which)
        network = registry.load_generator(file)[0]
        if _has_encoder(network):
            found.setdefault(file.resolve(), Candidate(f"teacher of {candidate.label}", str(file), file, network))
    check_labels([candidate.label for candidate in found.values()])
    return list(found.values())


def check_figures_page(page: Path, option: str) -> None:
    """UserError when the page that `option` names cannot be written without taking somebody's place."""
    if page.is_dir():
        raise UserError(f"{option} {page}: is a folder; name the page, e.g. {page / 'figures.html'}")
    check_page(page, option)


def figures_page(figures: Sequence[Figures], images: Path, command: str) -> Page:
    """The page of all `figures`, each of another scale and measured, on `images`."""
    candidates = [candidate for part in figures for candidate in part.candidates]
    made = Section("How it was made", (
        Facts((
            *((candidate.label, candidate.origin) for candidate in candidates),
            ("Images", str(images)), ("Rule of PSNR and SSIM", figures[0].rule),
        )),
        Commands((("This page", command),)),
    ))  # fmt: skip
    return Page(
        title="What each method makes of an image",
        kicker="hpcdistill figures: super-resolution",
        lead=f"{', '.join(candidate.label for candidate in candidates)} on the images of {images.name}. PSNR and SSIM "
        "are of whole images; crops are magnified as they are, every pixel a square.",
        sections=(*(section for part in figures for section in part.sections()), made),
        footer="This page needs no network and no other file.",
    )


class Figures:
    """Everything of one scale: `measure`, then `sections`."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        sources: Mapping[str, Source],
        images: SRImages,
        rule: Rule,
        pictures: int = PICTURES,
        side: int = SIDE,
        crops: Sequence[Wanted] = (),
        device: torch.device | str = "cpu",
        shown: Sequence[str] = (),
    ) -> None:
        """`sources`: what is measured of the candidates (`sources_of`).

        `pictures`: how many are chosen, with places of `side` pixels; none where `crops` names places, or `shown`
        images. UserError for one that is not there, before anything is measured.
        """
        self.candidates, self.images, self.rule, self.device = list(candidates), images, rule, device
        self.scale = images.scale
        self.sources: dict[str, Source] = {BICUBIC: bicubic_upsampler(self.scale)} | dict(sources)
        # What a teacher that sees HR enlarges is no super-resolution: of it, the encoder is shown.
        self.teachers = {
            candidate.label: candidate.network
            for candidate in candidates
            if isinstance(candidate.network, PrivilegedTeacher) and _has_encoder(candidate.network)
        }
        self.methods = [candidate for candidate in candidates if candidate.label not in self.teachers]
        self.results: dict[str, SetResult] = {}
        self._pictures, self._side = pictures, max(self.scale, side // self.scale * self.scale)
        self._named = [self._wanted(crop) for crop in crops]
        self._shown = [image_number(word, images.names, "--show") for word in shown]
        self._found: list[Choice] = []
        self._beside_bicubic: list[Choice] = []

    @property
    def choices(self) -> list[Choice]:
        """What is shown, once it has been measured."""
        found = self._beside_bicubic if self._alike else self._found
        if self._named or self._shown:
            by_image = {choice.image: choice for choice in found}
            return [*self._named, *(by_image[number] for number in self._shown if number in by_image)]
        return sorted(found, key=lambda choice: (-(choice.difference or 0), choice.image))[: self._pictures]

    @property
    def _alike(self) -> bool:
        """Whether the methods hardly differ anywhere: where bicubic does is then a better place than any."""
        return bool(self._beside_bicubic) and all((choice.difference or 0) < ALIKE for choice in self._found)

    def measure(self, *, skip: bool = False) -> tuple[dict[str, SetResult], list[str]]:
        """As `evaluate_super_resolution`, of bicubic and all candidates; chooses what is shown on the way."""
        seen = None if self._named and not self._shown else self._look
        self.results, skipped = evaluate_super_resolution(
            self.sources, self.images, self.rule, self.device, seen, skip=skip
        )
        return self.results, skipped

    def sections(self) -> Iterator[Section]:
        """The table, figure 6 with errors and spectra, and figure 5, as far as there is something to show."""
        if self.methods:
            crops, charts = zip(*(self._compared(choice) for choice in self.choices), strict=True)
            yield Section(
                f"x{self.scale}: the same place by each method",
                (self._table(), Text((self._places(),)), *crops, Charts(charts)),
            )
        if self.teachers:
            shown = tuple(self._encoded(choice) for choice in self.choices)
            yield Section(f"x{self.scale}: what each teacher's encoder extracts", (Text((EXPLAINED,)), *shown))

    # --- where to look --------------------------------------------------------------------------------------------

    def _look(self, number: int, hr: Image, lr: Image, made: Mapping[str, Tensor]) -> None:
        drawn = self._drawn(number, lr, made)
        self._found.append(self._choice(number, self._spread(hr, lr, drawn)))
        if len(self.methods) > 1:
            self._beside_bicubic.append(self._choice(number, _spread(drawn.values())))

    def _choice(self, number: int, spread: NDArray[Any]) -> Choice:
        box, difference = densest_crop(spread, self._side)
        return Choice(number, _on_grid(box, self.scale), difference)

    def _drawn(self, number: int, lr: Image, made: Mapping[str, Tensor]) -> dict[str, Image]:
        """The picture by bicubic and each method, by its title."""
        gray = gray_as_it_is(self.rule, self.images.is_gray(number))
        pictures = {BICUBIC_TITLE: bicubic_image(lr, self.scale)}
        for method in self.methods:
            pictures[method.label] = colourise(made[method.label][0], lr, self.scale, gray)
        return pictures

    def _spread(self, hr: Image, lr: Image, pictures: Mapping[str, Image]) -> NDArray[Any]:
        """How far the methods are apart at each pixel `[H, W]`, in 8-bit levels of luma.

        Of the networks where there are two: bicubic would drown them. Without any, of the teachers' encoders and
        bicubic, enlarged to the pixels of HR.
        """
        if self.methods:
            return _spread(list(pictures.values())[len(self.methods) > 1 :])
        small = np.ptp(np.stack([luma_uint8(lr), *encodings(hr, self.teachers).values()]), axis=0)
        spread: NDArray[Any] = small.repeat(self.scale, axis=0).repeat(self.scale, axis=1) * 255
        return spread

    def _wanted(self, crop: Wanted) -> Choice:
        """The place that the user named; UserError for one that is not there."""
        number = image_number(crop.image, self.images.names, "--crop")
        height, width = self.images.read(number)[1].shape[:2]
        check_inside(crop, height, width)
        return Choice(number, _on_grid((crop.top, crop.left, crop.side, crop.side), self.scale), None)

    # --- figure 6 -------------------------------------------------------------------------------------------------

    def _table(self) -> Table:
        networks = {method.label: method.network for method in self.methods if not method.exported}
        rows = []
        for number, label in enumerate([BICUBIC, *(method.label for method in self.methods)]):
            network, result = networks.get(label), self.results[label]
            cost = Cost(0, 0, 0) if network is None else super_resolution_cost(network)
            title = BICUBIC_TITLE if label == BICUBIC else label
            rows.append(Measured(label, title, number, result.metrics, result.per_image, cost))
        return results_table(
            rows,
            f"x{self.scale}, mean of {plural(self.results[BICUBIC].images, 'image')}",
            f"On luma, {self.scale} pixels of border left out, rule {self.rule}. MACs for an output of 1280x720 by the "
            "literature's rule, which charges a transposed convolution at its output's size.",
        )

    def _places(self) -> str:
        below = (
            "Below the crops: how far each is from HR at the same place, all magnified alike, and the spectra of the "
            "whole pictures."
        )
        if self._named and not self._shown:
            return f"The places were named by who made this page. {below}"
        among = "the networks" if len(self.methods) > 1 else "the network and bicubic"
        if self._alike:
            among = "the networks, which hardly differ among themselves, and bicubic"
        chosen = "The images and places are those where"
        if self._shown:
            chosen = "The images were named by who made this page; places that were not are those where"
        return (
            f"{chosen} {among} differ most, of all places on a grid: where a difference can be seen, not where one of "
            "them is good. The brightness is the network's, of luma networks the colours are bicubic's. "
            f"{below}"
        )

    def _compared(self, choice: Choice) -> tuple[Crops, Chart]:
        """A picture and its crop by every method, from HR to the last one; how far they are from HR; their spectra."""
        name, hr, lr = self.images.read(choice.image)
        gray = gray_as_it_is(self.rule, self.images.is_gray(choice.image))
        shown = {label: self.sources[label] for label in (BICUBIC, *(method.label for method in self.methods))}
        with all_evaluating(shown, self.device) as used:
            made = outputs(used, choice.image, as_tensors(hr, lr, self.device, gray))
        drawn = self._drawn(choice.image, lr, made)
        rows = [next(row for row in self.results[label].per_image if row["name"] == name) for label in made]
        numbers = dict(zip(made, rows, strict=True))
        pictures: list[Captioned] = [("HR", hr, "PSNR / SSIM", None)]
        for number, (title, picture) in enumerate(drawn.items()):
            row = numbers[title if number else BICUBIC]
            pictures.append((title, picture, f"{row['psnr']:.2f} dB / {row['ssim']:.4f}", colour(number)))
        overview, factor = _overview(hr)
        said, errors = error_crops(hr, drawn, choice.box)
        views = (
            view(name, _said(choice), _shrunk(choice.box, factor), _cut(pictures, choice.box)),
            view(name, said, None, errors),
        )
        return Crops(name, overview, f"The image {name}", views, _size(hr)), spectra(hr, drawn, self.scale, name)

    # --- figure 5 -------------------------------------------------------------------------------------------------

    def _encoded(self, choice: Choice) -> Crops:
        """The encoders' LR images, and what they differ in from bicubic's beside each; whole and magnified."""
        name, hr, lr = self.images.read(choice.image)
        whole = encoder_pictures(lr, encodings(hr, self.teachers), BICUBIC_TITLE)
        top, left, height, width = (side // self.scale for side in choice.box)
        overview, factor = _overview(hr)
        views = (
            view(name, "the LR images", None, whole),
            view(
                name,
                "magnified",
                _shrunk(choice.box, factor),
                [original_crop(hr, choice.box), *_cut(whole, (top, left, height, width))],
            ),
        )
        return Crops(name, overview, f"The image {name}", views, _size(hr))


def _spread(pictures: Iterable[Image]) -> NDArray[Any]:
    """How far `pictures` are apart at each pixel `[H, W]`, in 8-bit levels of luma."""
    spread: NDArray[Any] = np.ptp(np.stack([luma_uint8(image) for image in pictures]), axis=0) * 255
    return spread


def _has_encoder(network: Any) -> bool:
    return isinstance(network, PrivilegedTeacher) and network.takes == "hr"


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


def _cut(pictures: Sequence[Captioned], box: Box) -> list[Captioned]:
    return [(label, cut(picture, box), note, colour) for label, picture, note, colour in pictures]


def _said(choice: Choice) -> str:
    """Where a crop is, and why there."""
    top, left, height, width = choice.box
    where = f"{width} x {height} pixels, {left} from the left and {top} from the top"
    return where if choice.difference is None else f"{where}; they differ by {choice.difference:.1f} levels on average"


def _size(hr: Image) -> str:
    return f"{hr.shape[1]} x {hr.shape[0]} pixels"
