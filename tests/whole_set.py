"""A generator's result on a whole super-resolution test set, by the steps that `evaluate` and the demo take."""

from __future__ import annotations

from torch import nn

from hpcdistill.metrics.base import SetResult
from hpcdistill.metrics.psnr_ssim import Rule
from hpcdistill.metrics.sr_evaluation import evaluate_image, evaluating, summarise
from hpcdistill.metrics.sr_test_sets import SRImages


def evaluate_sr(generator: nn.Module, images: SRImages, scale: int, rule: Rule = "pisr") -> SetResult:
    """Every image at full size, one after the other."""
    with evaluating(generator) as network:
        return summarise(
            [
                evaluate_image(network, name, hr, lr, scale, rule, gray=images.is_gray(index))[0]
                for index, (name, hr, lr) in enumerate(images)
            ]
        )
