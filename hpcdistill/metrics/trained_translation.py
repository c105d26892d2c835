"""Evaluating the generator of a finished or running image-to-image run, as the run itself would: its own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn

from hpcdistill.console import err, say, speaks_alone
from hpcdistill.data.outputs import check_images_out, save_image
from hpcdistill.data.test_sets import Real, real_side
from hpcdistill.errors import UserError, plural
from hpcdistill.methods import METHODS
from hpcdistill.methods.settings import config_class
from hpcdistill.metrics.base import LPIPS_OF_PAIRS, SetResult
from hpcdistill.metrics.config import BACKWARDS, Bits
from hpcdistill.metrics.pictures import Pictures, first_side
from hpcdistill.metrics.real_side import load_translation_index
from hpcdistill.metrics.real_statistics import read_statistics
from hpcdistill.metrics.run_evaluators import check_size, features_if_there, lpips_if_there
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.ranks import watchdog
from hpcdistill.training.records import run_values

DEFAULT_SIZE = 256  # pixels


@dataclass(frozen=True)
class TranslationOptions:
    """What the command line says; None = as the run was configured, or the project's default."""

    size: int | None = None
    real: Real | None = None
    real_stats: Path | None = None  # a file that stands for the real images
    bits: Bits | None = None
    features: str | None = None
    direction: str | None = None
    kid: bool | None = None
    lpips: bool | None = None


def evaluate_translation(
    generator: nn.Module | None,
    file: Path,
    folder: Path,
    options: TranslationOptions,
    device: torch.device | str,
    save_images: Path | None = None,
    rank: int = 0,
    ranks: int = 1,
    opened: dict[str, Any] | None = None,
) -> tuple[SetResult, dict[str, Any]]:
    """`generator`, loaded from `file`, on the packed test set `folder`: its result, and how it was made.

    Without a `generator`, `file` is a folder of pictures that some program has made of the set's images.
    With `save_images`, the 8-bit outputs are written there as PNG. UserError for a set or a size that does not fit.
    `opened` keeps what measures, networks and statistics, or that it is missing, for the next call.
    With several ranks each calls it, takes its share of the images and gets the same result.
    """
    run = run_values(file)
    data, evaluation = run.get("data") or {}, run.get("eval") or {}
    index = load_translation_index(folder, None, "--data")
    if generator is None:
        size = options.size or first_side(file)
    else:
        size = options.size or evaluation.get("size") or data.get("crop") or DEFAULT_SIZE
        check_size(generator, size, "--size ")
    backwards = generator is not None and file.stem.endswith(BACKWARDS)
    statistics_file, option = options.real_stats, "--real-stats "
    # The run's are of the images that it translates to.
    if statistics_file is None and options.real is None and evaluation.get("real_stats") and not backwards:
        statistics_file, option = Path(evaluation["real_stats"]), "eval.real_stats of the run, "
        if options.kid:
            raise UserError(f"--kid: there is none with {option}{statistics_file}; add --real test or train+test")
    protocol = TranslationProtocol(
        index.kind,
        options.direction or data.get("direction") or "AtoB",
        size,
        real_side(index.kind, options.real or evaluation.get("real")),
        _wanted(options.kid, evaluation.get("kid")),
        options.bits or evaluation.get("bits") or "round",
        spectral_error=_wanted(None, evaluation.get("spectral_error")),
    )
    opened = {} if opened is None else opened
    name = options.features or evaluation.get("features") or "inception"
    if name not in opened:
        opened[name] = features_if_there(name, device)
    features = opened[name]
    if statistics_file is not None and features is not None and str(statistics_file) not in opened:
        opened[str(statistics_file)] = read_statistics(statistics_file, features.dimensions, option)
    with_lpips = index.kind == "paired" and _wanted(options.lpips, evaluation.get("lpips"))
    if with_lpips and LPIPS_OF_PAIRS.name not in opened:
        opened[LPIPS_OF_PAIRS.name] = lpips_if_there(device)
    evaluator = TranslationEvaluator(
        {"data": folder},
        protocol,
        _real_train(run),
        features,
        opened[LPIPS_OF_PAIRS.name] if with_lpips else None,
        device,
        rank,
        ranks,
        backwards=backwards,
        statistics=opened.get(str(statistics_file)),
    )
    names = evaluator.test_sets["data"].names(int(backwards))
    if save_images is not None:
        check_images_out(save_images, names, [folder])
    translated = Pictures(file, names) if generator is None else generator.to(device)
    result = evaluator.evaluate(translated, "data", backwards, _at_work)
    if save_images is not None and generator is not None:
        with shared_work(ranks, device):
            _save(evaluator, generator, backwards, save_images)
        say(f"wrote {plural(result.images, 'image')} to {save_images}")
    about = evaluator.describe()
    if "real_images" in about:
        about["real_images"] = len(evaluator.real["data", backwards])
    return result, about


def _wanted(asked: bool | None, configured: bool | None) -> bool:
    """Whether a metric is computed: as the command line says, else the run, else yes."""
    return next((choice for choice in (asked, configured) if choice is not None), True)


def _real_train(run: Mapping[str, Any]) -> Sequence[str]:
    """The training sets of a run that hold real target images: none where a teacher made them."""
    name = (run.get("method") or {}).get("name")
    if isinstance(name, str) and name in METHODS and not config_class(name).REAL_TARGETS:
        return ()
    train = (run.get("data") or {}).get("train") or ()
    return [train] if isinstance(train, str) else train


def _save(evaluator: TranslationEvaluator, generator: nn.Module, backwards: bool, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = evaluator.test_sets["data"].names(int(backwards))
    mine = range(evaluator.rank, len(names), evaluator.ranks)
    hidden = evaluator.rank > 0 or not (err.moves and speaks_alone())
    for number in track(mine, "writing", console=err, transient=True, disable=hidden):
        watchdog.progress()
        [image] = evaluator.translations(generator, "data", [number], backwards)
        pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
        save_image(folder, names[number], pixels)


def _at_work() -> bool:
    """A `stop` that never stops, and shows the other ranks that this one goes on."""
    watchdog.progress()
    return False
