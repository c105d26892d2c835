"""Each way in which a CPU computes a GAN's iteration faster gives the losses that it gives without, over 30 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import ToyReader, rows, run
from translation import distilled, double_samples, small

from hpcdistill.methods import cyclegan
from hpcdistill.models import vgg as vgg_module
from hpcdistill.ops import cpu_forms

STEPS = 30


def losses(folder: Path, vgg: Path | None, steps: int) -> list[dict[str, Any]]:
    """The log of a training in float64. Each step about doubles a rounding: from 1e-16 to 1e-8 in 30, 1e-6 in 40."""
    smallest = small({"blocks": 1}, 4)
    method = distilled(vgg, teacher=smallest, student=smallest).double()
    run(method, ToyReader(1, double_samples), folder, steps)
    return rows(folder)


def compare(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, rel=1e-6), row["step"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return losses(tmp_path_factory.mktemp("usual"), None, STEPS)


@pytest.mark.parametrize("lever", ["all", "layout", "norm", "few", "strided", "parts"])
def test_the_same_losses_over_30_steps(
    lever: str, usual: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lever == "all":
        for module in (cpu_forms, cyclegan):
            monkeypatch.setattr(module, "applies", lambda x: False)
    elif lever == "layout":
        monkeypatch.setattr(cpu_forms, "channels_last", lambda x: x)
    elif lever == "norm":
        monkeypatch.setattr(cpu_forms, "instance_norm", cpu_forms.functional.instance_norm)
    elif lever == "few":
        monkeypatch.setattr(cpu_forms, "_FEW", 0)
    elif lever == "strided":
        monkeypatch.setattr(cpu_forms._Strided, "apply", plain)
    else:
        monkeypatch.setattr(cyclegan, "is_batch_free", lambda network: False)
    compare(losses(tmp_path, None, STEPS), usual)


def plain(x: Any, weight: Any, bias: Any, options: tuple[Any, ...]) -> Any:
    return cpu_forms.torch.convolution(x, weight, bias, *options)


def test_the_same_perceptual_losses(vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16 in another layout, and Gram's gradient in one product; a few steps, as VGG16 is not small."""
    found = losses(tmp_path / "ours", vgg, 3)
    monkeypatch.setattr(vgg_module.cpu_forms, "applies", lambda x: False)
    compare(losses(tmp_path / "theirs", vgg, 3), found)
