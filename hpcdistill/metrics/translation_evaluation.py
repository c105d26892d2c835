"""How well a generator translates images: FID, KID, spectra, and for pairs PSNR, L1, LPIPS (`fesd.md`, section 7).

Each test image is resized to a square (bicubic, as in training; no crop, no flip), translated in eval mode and brought
to 8 bits in memory (`eval.bits`). Images are shared among ranks; what they found is gathered, and rank 0 compares the
sets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.index import Kind
from hpcdistill.data.progress import ProgressBar
from hpcdistill.data.read.domains import DomainImages
from hpcdistill.data.test_sets import Real, real_folders, real_side
from hpcdistill.errors import UserError, plural
from hpcdistill.metrics.base import LPIPS_OF_PAIRS, PAIR_METRICS, PSNR_CAP, SPECTRAL_ERROR, ImageRow, SetResult, means
from hpcdistill.metrics.config import Bits
from hpcdistill.metrics.feature_networks import FeatureNetwork
from hpcdistill.metrics.frechet import Moments, frechet, kid, moments
from hpcdistill.metrics.lpips import LPIPS
from hpcdistill.metrics.pictures import Pictures
from hpcdistill.metrics.real_side import RealFeatures, load_translation_index
from hpcdistill.metrics.real_statistics import RealStatistics
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.metrics.spectral_error import check_side, spectrum_of
from hpcdistill.metrics.sr_evaluation import evaluating
from hpcdistill.training.evaluation import never, until_stopped

BATCH = 16  # images at a time, through generators and feature networks
CPU_BATCH = 4  # no slower there, and a signal is heard every few seconds
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class TranslationProtocol:
    """How generators are measured; all of it is printed beside the numbers."""

    kind: Kind | None  # paired or unpaired; None: each test set its own
    direction: str  # AtoB or BtoA: which domain is translated, as in training
    size: int  # side of the square that test images are resized to, pixels
    real: Real | None  # None: as is usual for the kind (`real_side`)
    kid: bool = True
    bits: Bits = "round"  # how outputs become 8 bits
    spectral_error: bool = False


class TranslationEvaluator:
    """Evaluates generators on packed test sets again and again. Every rank makes one and calls the same methods."""

    def __init__(
        self,
        test_sets: Mapping[str, Path | str],
        protocol: TranslationProtocol,
        train: Sequence[str],
        features: FeatureNetwork | None,
        lpips: LPIPS | None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        *,
        backwards: bool = False,
        statistics: RealStatistics | None = None,
    ) -> None:
        """`train`: the sets that are trained on, for the real side; `backwards`: b is translated to a as well.

        `statistics`: are the real side, in the place of images, of every set and direction; without images no KID.
        UserError for a set that is missing, of another kind, or too small to compare.
        """
        self.protocol, self.features, self.statistics = protocol, features, statistics
        self.device, self.rank, self.ranks = torch.device(device), rank, ranks
        if lpips is not None:
            lpips.check_size(protocol.size, protocol.size)
        if protocol.spectral_error:
            check_side(protocol.size)
        # Metric -> what computes it of two batches uint8 [B, 3, H, W].
        self._of_pairs = {metric.name: metric.compute for metric in PAIR_METRICS if metric.path}
        if lpips is not None:
            self._of_pairs[LPIPS_OF_PAIRS.name] = lambda one, other: lpips(as_input(one), as_input(other))
        self.directions = (False, True) if backwards else (False,)
        self.test_sets: dict[str, DomainImages] = {}
        self.sides: dict[str, Real] = {}  # whose images each set's outputs are compared with
        self.real: dict[tuple[str, bool], RealFeatures] = {}
        for name, place in test_sets.items():
            folder = Path(place)
            index = load_translation_index(folder, protocol.kind, f"data.eval.{name}")
            images = DomainImages([folder], [index], index.kind, protocol.direction, protocol.size)
            self.test_sets[name] = images
            if features is None:
                continue
            if min(map(len, images.domains)) < 2:
                raise UserError(f"{folder}: one image is no set to compare; give a test set of two or more")
            if statistics is not None:
                continue
            self.sides[name] = real_side(index.kind, protocol.real)
            folders = real_folders(folder, self.sides[name], train)
            for back in self.directions:
                self.real[name, back] = RealFeatures(
                    folders, index.kind, protocol.direction, 0 if back else 1, protocol.size, features
                )
        self._images: dict[tuple[str, int, int], Tensor] = {}  # (set, domain, number) -> uint8 [3, size, size]
        self._known: dict[tuple[str, bool], tuple[Tensor, Moments]] = {}  # the real side, on rank 0
        self._real_spectra: dict[tuple[str, bool], Tensor] = {}  # its mean spectrum [rings], on every rank

    def paired(self, test_set: str) -> bool:
        return self.test_sets[test_set].paired

    def of_pairs(self, test_set: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """What is measured of each pair of the set."""
        return self._of_pairs if self.paired(test_set) else {}

    def count(self, test_set: str, backwards: bool = False) -> int:
        """The number of images that are translated."""
        return len(self.test_sets[test_set].domains[1 if backwards else 0])

    def preload(self) -> None:
        """Decode this rank's images now, so that a damaged one ends the run before it trains."""
        for name in self.test_sets:
            for back in self.directions:
                for number in self._share(self.count(name, back)):
                    self._image(name, int(back), number)
                    if self.paired(name):
                        self._image(name, int(not back), number)

    def evaluate(
        self, generator: nn.Module | Pictures, test_set: str, backwards: bool = False, stop: Callable[[], bool] = never
    ) -> SetResult:
        """Translate and measure; the same result on every rank. The generator's modes are left as they were.

        `Pictures` are measured in the place of outputs: what some program has made of the images 0, 1, ... UserError
        when the output is not finite or not of the input's size, or an image cannot be read, and EvaluationStopped
        when a rank's `stop()` says so between two batches: on every rank.
        """
        count, of_pairs = self.count(test_set, backwards), self.of_pairs(test_set)
        # A column for "the output is finite", one for each metric of pairs, and the spectrum's rings.
        rows = [torch.empty(0, 1 + len(of_pairs) + self._rings, device=self.device, dtype=torch.float64)]
        found = [torch.empty(0, self.features.dimensions if self.features else 0, device=self.device)]
        translated = contextlib.nullcontext(generator) if isinstance(generator, Pictures) else evaluating(generator)
        with shared_work(self.ranks, self.device), translated as network:
            for numbers in until_stopped(self._batches(self._share(count)), stop):
                if isinstance(network, Pictures):
                    produced = self._pictures(network, numbers)
                    finite = torch.ones(len(numbers), device=self.device)
                else:
                    output = translate(network, self._batch(test_set, int(backwards), numbers))
                    produced, finite = eight_bits(output, self.protocol.bits), output.isfinite().flatten(1).all(dim=1)
                row = [finite.double()]
                if of_pairs:
                    targets = self._batch(test_set, int(not backwards), numbers)
                    row += [compute(produced, targets).double() for compute in of_pairs.values()]
                rows.append(torch.stack(row, dim=1))
                if self._rings:
                    rows[-1] = torch.cat([rows[-1], spectrum_of(produced)], dim=1)
                if self.features is not None:
                    found.append(self.features(produced))
        gathered = self._gathered(torch.cat(rows), count)
        all_finite, *columns = gathered[:, : 1 + len(of_pairs)].T.tolist()
        if not all(all_finite):
            raise self._not_finite(test_set, backwards, all_finite.index(0.0))
        metrics = self._compared(torch.cat(found), test_set, backwards, count, stop)
        per_image: list[ImageRow] = []
        if of_pairs:
            per_image = [
                {"name": self.name(test_set, number, backwards)} | dict(zip(of_pairs, values, strict=True))
                for number, values in enumerate(zip(*columns, strict=True))
            ]
            metrics |= means(per_image, of_pairs)
        if not self._rings:
            return SetResult(metrics, count, per_image)
        spectrum = gathered[:, -self._rings :].mean(0)
        real = self._real_spectrum(test_set, backwards, stop)
        metrics[SPECTRAL_ERROR.name] = SPECTRAL_ERROR.compute(spectrum, real, self.protocol.size)
        return SetResult(metrics, count, per_image, spectra={"output": spectrum.tolist(), "real": real.tolist()})

    def translations(
        self,
        generator: nn.Module | Pictures,
        test_set: str,
        numbers: Sequence[int],
        backwards: bool = False,
        stop: Callable[[], bool] = never,
    ) -> Tensor:
        """The 8-bit outputs for the images `numbers`, uint8 [n, 3, size, size] on the CPU; no collective.

        Of `Pictures`, as in `evaluate`; UserError as there.
        """
        if isinstance(generator, Pictures):
            return self._pictures(generator, numbers).cpu()
        outputs = []
        with evaluating(generator) as network:
            for batch in until_stopped(self._batches(numbers), stop):
                output = translate(network, self._batch(test_set, int(backwards), batch))
                if not all(finite := output.isfinite().flatten(1).all(dim=1).tolist()):
                    raise self._not_finite(test_set, backwards, batch[finite.index(False)])
                outputs.append(eight_bits(output, self.protocol.bits).cpu())
        return torch.cat(outputs)

    def image(self, test_set: str, domain: int, number: int) -> Tensor:
        """A test image as it is used, uint8 [3, size, size]; domain 0 is what is translated."""
        return self._image(test_set, domain, number)

    def name(self, test_set: str, number: int, backwards: bool = False) -> str:
        """The file that a translated image came from, without its suffix."""
        return self.test_sets[test_set].name(int(backwards), number)

    def describe(self) -> dict[str, Any]:
        """How the numbers are made, for result.json and beside tables."""
        protocol = self.protocol
        about: dict[str, Any] = {
            "images": f"resized to {protocol.size}x{protocol.size} (bicubic), no crop, no flip; outputs of 8 bits",
            "direction": protocol.direction,
            "size": protocol.size,
            "bits": protocol.bits,
        }
        note = []
        if self.features is not None:
            name = self.features.frechet_name
            about[name] = self.features.origin
            if self.statistics is not None:
                about["real"] = side = f"statistics ({self.statistics.described})"
            else:
                about["real"] = " or ".join(dict.fromkeys(self.sides.values()))
                about["real_images"] = {test_set: len(real) for (test_set, back), real in self.real.items() if not back}
                counts = [(self.sides[of], f"{count} for {of}") for of, count in about["real_images"].items()]
                sides = {side: ", ".join(n for its, n in counts if its == side) for side in self.sides.values()}
                side = ", ".join(f"{side} ({counted})" for side, counted in sides.items())
            note.append(f"{name}: {self.features.origin}; real side {side}")
            if protocol.kid and self.statistics is None:
                about[self.features.kernel_name] = (
                    f"mean over {KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE}, unbiased"
                )
        of_pairs = {metric for test_set in self.test_sets for metric in self.of_pairs(test_set)}
        about |= {metric.name: metric.about for metric in PAIR_METRICS if metric.name in of_pairs}
        if self._rings:
            about[SPECTRAL_ERROR.name] = SPECTRAL_ERROR.about
        note.append(f"images {protocol.size}x{protocol.size}, {protocol.direction}")
        if protocol.bits == "floor":
            note.append("outputs cut to 8 bits (floor)")
        about["note"] = "; ".join(note)
        return about

    def _compared(
        self, found: Tensor, test_set: str, backwards: bool, count: int, stop: Callable[[], bool]
    ) -> dict[str, float]:
        """The distances of the outputs' features from the real side's."""
        if self.features is None:
            return {}
        features = self._gathered(found, count)
        if self.statistics is None:
            self._prepare(test_set, backwards, stop)
        metrics: dict[str, float] = {}
        with shared_work(self.ranks, self.device):
            if self.rank == 0 and self.statistics is not None:
                metrics[self.features.frechet_name] = frechet(moments(features.cpu()), self.statistics.moments)
            elif self.rank == 0:
                real, real_moments = self._known[test_set, backwards]
                metrics[self.features.frechet_name] = frechet(moments(features), real_moments)
                if self.protocol.kid:
                    distance = kid(features, real.to(self.device), KID_SUBSETS, KID_SUBSET_SIZE, stop=stop)
                    metrics[self.features.kernel_name] = distance.mean
        gathered: dict[str, float] = self._from_first(metrics)
        return gathered

    def _prepare(self, test_set: str, backwards: bool, stop: Callable[[], bool]) -> None:
        """Have the real side's features on rank 0: from the disk, or computed by all ranks together."""
        real = self.real[test_set, backwards]
        known = self._known.get((test_set, backwards))
        features = known[0] if known else real.kept() if self.rank == 0 else None
        if not self._from_first(features is not None):
            numbers = self._share(len(real))
            label = f"features of {plural(len(real), 'real image')} of {test_set}"
            if self.rank == 0:
                say(f"computing {label} once, for {real.file}")
            with (
                shared_work(self.ranks, self.device),
                contextlib.closing(real.images.packed),
                ProgressBar(label, total=len(numbers), unit="images") as progress,
            ):
                mine = real.compute(numbers, self._batch_size, self.device, progress.advance, stop)
            features = self._gathered(mine, len(real)).cpu()
            if self.rank == 0:
                real.keep(features)
        if known is None and self.rank == 0:
            assert features is not None
            self._known[test_set, backwards] = features, moments(features.to(self.device))

    @property
    def _rings(self) -> int:
        """The length of a spectrum; 0 where none is asked for."""
        return self.protocol.size // 2 - 1 if self.protocol.spectral_error else 0

    def _real_spectrum(self, test_set: str, backwards: bool, stop: Callable[[], bool]) -> Tensor:
        """The mean spectrum [rings] of the test set's target images, computed once by all ranks together."""
        key = (test_set, backwards)
        if key not in self._real_spectra:
            images, domain = self.test_sets[test_set], int(not backwards)
            count = len(images.domains[domain])
            rows = [torch.empty(0, self._rings, device=self.device, dtype=torch.float64)]
            with shared_work(self.ranks, self.device):
                for numbers in until_stopped(self._batches(self._share(count)), stop):
                    rows.append(spectrum_of(self._batch(test_set, domain, numbers, keep=images.paired)))
            self._real_spectra[key] = self._gathered(torch.cat(rows), count).mean(0)
        return self._real_spectra[key]

    def _share(self, count: int) -> range:
        """The numbers of this rank's images."""
        return range(self.rank, count, self.ranks)

    def _gathered(self, rows: Tensor, count: int) -> Tensor:
        """Row n of the result belongs to image n; `rows` are those of this rank's images, in order."""
        if self.ranks == 1:
            return rows
        share = -(-count // self.ranks)
        padded = rows.new_zeros(share, *rows.shape[1:])
        padded[: len(rows)] = rows
        together: Tensor = gather(padded)
        return together.view(self.ranks, share, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]

    def _from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return broadcast_object_list([value])[0] if self.ranks > 1 else value

    @property
    def _batch_size(self) -> int:
        return CPU_BATCH if self.device.type == "cpu" else BATCH

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        size = self._batch_size
        return (numbers[start : start + size] for start in range(0, len(numbers), size))

    def _batch(self, test_set: str, domain: int, numbers: Sequence[int], keep: bool = True) -> Tensor:
        return torch.stack([self._image(test_set, domain, number, keep) for number in numbers]).to(self.device)

    def _pictures(self, pictures: Pictures, numbers: Sequence[int]) -> Tensor:
        size = self.protocol.size
        wanted = f"measured at {size}x{size}; give --size, or pictures of that size"
        return torch.stack([pictures.read(number, size, size, wanted) for number in numbers]).to(self.device)

    def _image(self, test_set: str, domain: int, number: int, keep: bool = True) -> Tensor:
        """From memory after the first time, if it is to be kept: 200 pairs of 256 pixels take 79 MB."""
        key = (test_set, domain, number)
        if key in self._images:
            return self._images[key]
        image = torch.from_numpy(self.test_sets[test_set].load(domain, number).transpose(2, 0, 1).copy())
        if keep:
            self._images[key] = image
        return image

    def _not_finite(self, test_set: str, backwards: bool, number: int) -> UserError:
        name = self.name(test_set, number, backwards)
        return UserError(f"{name}: the generator's output is not finite; its weights are damaged or it diverged")


def translate(generator: nn.Module, sources: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to the generator's output, float32 [B, 3, H, W] nominally in [-1, 1]."""
    output: Tensor = generator(as_input(sources))
    if output.shape != sources.shape:
        raise UserError(
            f"the generator makes {list(output.shape[1:])} of images of {list(sources.shape[1:])}; evaluate a network "
            "that keeps their size"
        )
    return output.float()


def as_input(images: Tensor) -> Tensor:
    """8-bit images as networks take them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def eight_bits(output: Tensor, bits: Bits = "round") -> Tensor:
    """A generator's output to uint8, rounded or cut off (floor); outside [-1, 1] it is clamped.

    floor is what `astype(uint8)` makes of 255 (x + 1) / 2: on average half a level darker.
    """
    levels = ((output + 1) * 127.5).nan_to_num(0.0).clamp(0, 255)
    return (levels.round() if bits == "round" else levels.floor()).to(torch.uint8)


def psnr_rgb(produced: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 RGB [B, 3, H, W], at most PSNR_CAP; float64."""
    error = (produced.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PSNR_CAP)


def l1_rgb(produced: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference [B], levels in 0..255, of uint8 RGB [B, 3, H, W]; float64.

    What Pix2Pix's generator is trained by (Isola et al., CVPR 2017), in the units of a picture.
    """
    return (produced.double() - targets.double()).abs().mean(dim=(1, 2, 3))
