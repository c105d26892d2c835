"""A metric of one's own is one entry: everything that measures, checks or prints loops over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpcdistill.evaluate import main
from hpcdistill.metrics import base
from hpcdistill.metrics.base import ImageMetric, means
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.sr_evaluation import SREvaluator, bicubic_upsampler


@pytest.fixture
def l1() -> Iterator[ImageMetric]:
    metric = ImageMetric("l1", "L1 [levels]", 2, "lower", "torch.nn.functional:l1_loss")
    base.SR_METRICS.append(metric)
    yield metric
    base.SR_METRICS.remove(metric)


def test_one_entry_is_evaluated_printed_and_known_to_configurations(
    l1: ImageMetric, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 256, (48, 60, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    command = ["--baseline", "bicubic", "--scale", "4", "--data", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report)[:3] == ["psnr", "ssim", "l1"]
    assert report["l1"] == pytest.approx(np.mean([row["l1"] for row in report["per_image"]]))
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "L1 [levels]" in table
    assert f"{report['l1']:.2f}" in table
    assert EvalConfig().metrics("lr-hr") == ["psnr", "ssim", "l1"]
    evaluator = SREvaluator({"set": tmp_path}, 4, 1)
    rows = evaluator.evaluate(bicubic_upsampler(4))["set"]
    assert evaluator.result("set", rows).metrics["l1"] == report["l1"]


def test_the_functions_are_found() -> None:
    for metric in [*base.SR_METRICS, *base.PAIR_METRICS]:
        assert metric is base.LPIPS_OF_PAIRS or callable(metric.compute)
    produced, reference = torch.full((20, 20), 3.0), torch.full((20, 20), 1.0)
    psnr, ssim = (metric.compute(produced, reference).item() for metric in base.SR_METRICS)
    assert psnr == pytest.approx(10 * np.log10(255**2 / 4))
    assert 0 < ssim < 1


def test_means() -> None:
    rows = [{"name": "a", "psnr": 1.0, "ssim": 0.1}, {"name": "b", "psnr": 2.0, "ssim": 0.2}]
    assert means(rows, ["psnr"]) == {"psnr": 1.5}
