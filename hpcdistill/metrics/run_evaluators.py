"""Evaluators the training loop calls: one for each kind of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hpcdistill.console import warn
from hpcdistill.data import held_out
from hpcdistill.data.config import DataConfig
from hpcdistill.data.fetch.weights import WEIGHTS
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.metrics.base import PSNR_OF_PAIRS, SR_METRICS, ImageRow
from hpcdistill.metrics.config import BACKWARDS, EvalConfig
from hpcdistill.metrics.feature_networks import FeatureNetwork, missing, open_features
from hpcdistill.metrics.held_out_images import HeldOutImages
from hpcdistill.metrics.lpips import LPIPS, open_lpips
from hpcdistill.metrics.real_side import load_translation_index
from hpcdistill.metrics.real_statistics import read_statistics
from hpcdistill.metrics.sample_grid import sample_grid, sample_row
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.metrics.sr_evaluation import SREvaluator
from hpcdistill.metrics.sr_test_sets import Image, SRImages
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.training.evaluation import Evaluation, Evaluator, never


def open_evaluator(
    data: DataConfig,
    config: EvalConfig,
    selected: str,
    needs: Needs,
    generators: Mapping[str, nn.Module],
    accelerator: Accelerator,
) -> Evaluator:
    """The evaluator for what a method needs of its data; the set `selected` of `data.eval` chooses the best weights.

    UserError for a test set that is missing or does not fit, before anything is trained.
    """
    if needs.kind == "lr-hr":
        sets: dict[str, str | SRImages] = dict(data.eval)
        if data.held_out:
            sets[held_out.NAME] = HeldOutImages(data.train, data.held_out, needs.scale)
        return SRRunEvaluator(sets, selected, next(iter(generators)), needs, config, accelerator)
    return TranslationRunEvaluator(data, config, selected, needs, generators, accelerator)


def bicubic_reference(evaluator: Evaluator | None, accelerator: Accelerator) -> dict[str, dict[str, float]] | None:
    """What result.json says of bicubic enlargement; None where nothing is enlarged. Every rank calls it."""
    return evaluator.bicubic(accelerator) if isinstance(evaluator, SRRunEvaluator) else None


class SRRunEvaluator:
    """`SR_METRICS` of every generator of a super-resolution run on every test set, the images shared among ranks.

    The first metric chooses the best weights.
    """

    larger_is_better = SR_METRICS[0].better == "higher"

    def __init__(
        self,
        test_sets: Mapping[str, str | SRImages],
        selected: str,
        generator: str,
        needs: Needs,
        config: EvalConfig,
        accelerator: Accelerator,
    ) -> None:
        """`generator` on the set `selected` chooses the best weights. Decodes this rank's images."""
        self.config = config
        self.selected = selected
        self.generator = generator
        self.selects: str | None = f"{generator}/{selected}/{SR_METRICS[0].name}"
        self.evaluator = SREvaluator(test_sets, needs.scale, needs.channels, config.rule, accelerator.device)
        with shared_work(accelerator.num_processes, accelerator.device):
            self.evaluator.preload(accelerator.process_index, accelerator.num_processes)

    def __call__(
        self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Callable[[], bool] = never
    ) -> Evaluation:
        rank, ranks = accelerator.process_index, accelerator.num_processes
        mine: dict[str, dict[str, list[ImageRow]]] = {}
        pictures: dict[str, Image] = {}
        # One agreement and one gathering for all networks, sets and samples: a rank waits for the others only there.
        with shared_work(ranks, accelerator.device):
            for name, generator in generators.items():
                mine[name] = self.evaluator.evaluate(generator, rank, ranks, stop)
            if rank == 0 and self.config.samples > 0:
                pictures[self.generator] = self._picture(generators[self.generator], stop)
        shares = gather_object([mine]) if ranks > 1 else [mine]
        metrics: dict[str, float] = {}
        for name in generators:
            for test_set in self.evaluator.test_sets:
                rows = [row for share in shares for row in share[name][test_set]]
                result = self.evaluator.result(test_set, rows)
                metrics |= {f"{name}/{test_set}/{metric}": value for metric, value in result.metrics.items()}
        return Evaluation(metrics, pictures)

    def bicubic(self, accelerator: Accelerator) -> dict[str, dict[str, float]]:
        """Test set -> metric -> its value of bicubic enlargement, by the run's own rule. Every rank calls it."""
        ranks = accelerator.num_processes
        with shared_work(ranks, accelerator.device):
            mine = self.evaluator.bicubic(accelerator.process_index, ranks)
        shares = gather_object([mine]) if ranks > 1 else [mine]
        return {
            test_set: self.evaluator.result(test_set, [row for share in shares for row in share[test_set]]).metrics
            for test_set in self.evaluator.test_sets
        }

    def protocol(self) -> dict[str, Any]:
        """What result.json says about how the numbers were made."""
        gray = {
            name: taken
            for name, images in self.evaluator.test_sets.items()
            if (taken := images.taken_as_gray(self.config.rule))
        }
        return {
            "metric": "PSNR (dB) and SSIM on luma, border of `scale` pixels shaved, mean over images",
            "rule": self.config.rule,
            "scale": self.evaluator.scale,
            "selects": self.selects,
            "test_sets": {name: len(images) for name, images in self.evaluator.test_sets.items()},
            "lr": {name: images.lr for name, images in self.evaluator.test_sets.items()},
            **({"gray": gray} if gray else {}),
        }

    def _picture(self, generator: nn.Module, stop: Callable[[], bool]) -> Image:
        samples = self.evaluator.samples(generator, self.selected, self.config.samples, stop)
        return sample_grid([sample_row(pair, output, self.evaluator.scale) for _, pair, output in samples])


class TranslationRunEvaluator:
    """Every generator of an image-to-image run on every test set: FID, KID and, for pairs, PSNR, L1 and LPIPS.

    The best weights are chosen by the student's FID or, where Inception's weights are missing, its PSNR on pairs.
    """

    def __init__(
        self,
        data: DataConfig,
        config: EvalConfig,
        selected: str,
        needs: Needs,
        generators: Mapping[str, nn.Module],
        accelerator: Accelerator,
    ) -> None:
        """Decodes this rank's test images. Missing weights are one line each, and leave their metrics out."""
        self.config, self.selected = config, selected
        self.names = evaluated_names(generators, config.both_directions)
        self.generator = "student" if "student" in self.names else self.names[0]
        size = config.size or data.crop
        for name in self.names:
            check_size(generators[name], size)
        kinds = {
            name: load_translation_index(Path(place), None, f"data.eval.{name}").kind
            for name, place in data.eval.items()
        }
        features = features_if_there(config.features, accelerator.device)
        lpips = lpips_if_there(accelerator.device) if config.lpips and "paired" in kinds.values() else None
        statistics = None
        if config.real_stats and features is not None:
            statistics = read_statistics(Path(config.real_stats), features.dimensions, "eval.real_stats=")
        self.evaluator = TranslationEvaluator(
            data.eval,
            TranslationProtocol(
                None, data.direction, size, config.real, config.kid, config.bits, config.spectral_error
            ),
            data.train if needs.real_targets else (),
            features,
            lpips,
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
            backwards=any(name.endswith(BACKWARDS) for name in self.names),
            statistics=statistics,
        )
        with shared_work(accelerator.num_processes, accelerator.device):
            self.evaluator.preload()
        metric = features.frechet_name if features else PSNR_OF_PAIRS.name if kinds[selected] == "paired" else None
        self.selects: str | None = f"{self.generator}/{selected}/{metric}" if metric else None
        self.larger_is_better = metric == PSNR_OF_PAIRS.name

    def __call__(
        self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Callable[[], bool] = never
    ) -> Evaluation:
        metrics: dict[str, float] = {}
        spectra: dict[str, dict[str, list[float]]] = {}
        for name in self.names:
            backwards = name.endswith(BACKWARDS)
            for test_set in self.evaluator.test_sets:
                result = self.evaluator.evaluate(generators[name], test_set, backwards, stop)
                metrics |= {f"{name}/{test_set}/{metric}": value for metric, value in result.metrics.items()}
                if result.spectra:
                    curves = spectra.setdefault(test_set, {})
                    curves["real" + BACKWARDS * backwards] = result.spectra["real"]
                    curves[name] = result.spectra["output"]
        pictures: dict[str, Image] = {}
        if self.config.samples > 0:
            with shared_work(accelerator.num_processes, accelerator.device):
                if accelerator.is_main_process:
                    pictures = self._pictures(generators, stop)
        return Evaluation(metrics, pictures, {"spectrum": spectra} if spectra else {})

    def protocol(self) -> dict[str, Any]:
        """What result.json says about how the numbers were made."""
        counts = {name: self.evaluator.count(name) for name in self.evaluator.test_sets}
        return {**self.evaluator.describe(), "selects": self.selects, "test_sets": counts}

    def _pictures(self, generators: Mapping[str, nn.Module], stop: Callable[[], bool]) -> dict[str, Image]:
        pictures: dict[str, Image] = {}
        for picture, backwards in (("translation", False), (f"translation{BACKWARDS}", True)):
            shown = {name: generators[name] for name in self.names if name.endswith(BACKWARDS) == backwards}
            if shown:
                pictures[picture] = self._picture(shown, backwards, stop)
        return pictures

    def _picture(self, generators: Mapping[str, nn.Module], backwards: bool, stop: Callable[[], bool]) -> Image:
        """A row for each image: source, what the teacher and the others make of it, and its pair's target."""
        numbers = range(min(self.config.samples, self.evaluator.count(self.selected, backwards)))
        columns = {"source": [self.evaluator.image(self.selected, int(backwards), number) for number in numbers]}
        for name in sorted(generators, key=lambda name: not name.startswith("teacher")):
            columns[name] = list(self.evaluator.translations(generators[name], self.selected, numbers, backwards, stop))
        if self.evaluator.paired(self.selected):
            columns["target"] = [self.evaluator.image(self.selected, int(not backwards), number) for number in numbers]
        rows = [
            {
                label: np.ascontiguousarray(images[number].numpy().transpose(1, 2, 0))
                for label, images in columns.items()
            }
            for number in numbers
        ]
        return sample_grid(rows, zoom=1)


def evaluated_names(generators: Iterable[str], both_directions: bool) -> list[str]:
    """Which generators are evaluated: those that translate a to b; all of them, if both directions are asked for."""
    names = list(generators)
    forward = [name for name in names if not name.endswith(BACKWARDS)]
    assert forward
    return names if both_directions else forward


def check_size(generator: nn.Module, size: int, setting: str = "eval.size=") -> None:
    """UserError, by the `setting` that says so, when a generator cannot take images of `size` pixels a side."""
    check = getattr(generator, "check_size", None)
    if check is not None:
        try:
            check(size, size)
        except UserError as error:
            raise UserError(f"{setting}{size}: {error}") from None


def features_if_there(name: str, device: torch.device | str) -> FeatureNetwork | None:
    """The network of `eval.features`, or one line of how to get its weights; UserError for damaged ones."""
    if name in WEIGHTS and (reason := missing(name)):
        warn(f"no FID and no KID: {reason}")
        return None
    return open_features(name, device)


def lpips_if_there(device: torch.device | str) -> LPIPS | None:
    """LPIPS, or one line of how to get its weights; UserError for damaged ones."""
    if reason := missing("alexnet"):
        warn(f"no LPIPS: {reason}")
        return None
    return open_lpips(device)
