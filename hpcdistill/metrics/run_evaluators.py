"""Evaluators the training loop calls: one for each kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hpcdistill.data.needs import Needs
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.sample_grid import sample_grid, sample_row
from hpcdistill.metrics.sr_evaluation import SREvaluator
from hpcdistill.training.evaluation import Evaluation


class SRRunEvaluator:
    """PSNR and SSIM of every generator of a super-resolution run on every test set, the images shared among ranks."""

    larger_is_better = True

    def __init__(
        self,
        test_sets: Mapping[str, str],
        selected: str,
        generator: str,
        needs: Needs,
        config: EvalConfig,
        accelerator: Accelerator,
    ) -> None:
        """`generator`'s PSNR on the set `selected` chooses the best weights. Decodes this rank's images."""
        self.config = config
        self.selected = selected
        self.generator = generator
        self.selects: str | None = f"{generator}/{selected}/psnr"
        self.test_sets = dict(test_sets)
        self.evaluator = SREvaluator(test_sets, needs.scale, needs.channels, config.rule, accelerator.device)
        self.evaluator.preload(accelerator.process_index, accelerator.num_processes)

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator) -> Evaluation:
        metrics: dict[str, float] = {}
        for generator_name, generator in generators.items():
            shares = self.evaluator.evaluate(generator, accelerator.process_index, accelerator.num_processes)
            for set_name, rows in shares.items():
                everything = gather_object(rows) if accelerator.num_processes > 1 else rows
                result = self.evaluator.result(set_name, everything)
                metrics[f"{generator_name}/{set_name}/psnr"] = result.psnr
                metrics[f"{generator_name}/{set_name}/ssim"] = result.ssim
        draws = accelerator.is_main_process and self.config.samples > 0
        pictures = {self.generator: self._picture(generators[self.generator])} if draws else {}
        return Evaluation(metrics, pictures)

    def protocol(self) -> dict[str, Any]:
        """What result.json says about how the numbers were made."""
        return {
            "metric": "PSNR (dB) and SSIM on luma, border of `scale` pixels shaved, mean over images",
            "rule": self.config.rule,
            "scale": self.evaluator.scale,
            "selects": self.selects,
            "test_sets": {name: len(images) for name, images in self.evaluator.test_sets.items()},
        }

    def _picture(self, generator: nn.Module) -> np.ndarray:
        samples = self.evaluator.samples(generator, self.selected, self.config.samples)
        return sample_grid([sample_row(pair, output, self.evaluator.scale) for _, pair, output in samples])
