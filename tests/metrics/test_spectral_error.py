"""spectral_error against NumPy on whole images, and in an evaluation of packed sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from packed_sets import noise, write_set
from PIL import Image
from processes import launch
from scipy import ndimage
from torch import Tensor, nn

from hpcdistill.data.config import DataConfig
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.metrics import run_evaluators
from hpcdistill.metrics.base import SPECTRAL_ERROR
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.run_evaluators import TranslationRunEvaluator
from hpcdistill.metrics.spectral_error import check_side, spectral_error, spectrum_of
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol

SIDE = 32
Images = Sequence[NDArray[np.uint8]]  # [H, W, 3] each


def by_numpy(images: Images) -> NDArray[np.float64]:
    """The mean power of a set in the rings 1 ... SIDE / 2 - 1."""
    spectra = []
    for image in images:
        gray = image.astype(np.float64) @ [0.299, 0.587, 0.114]
        power = np.abs(np.fft.fftshift(np.fft.fft2(gray))) ** 2 / gray.size
        rows, columns = np.mgrid[: len(gray), : len(gray)] - len(gray) // 2
        radius = np.floor(np.hypot(rows, columns)).astype(int)
        spectra.append([power[radius == ring].mean() for ring in range(1, len(gray) // 2)])
    return np.mean(spectra, axis=0)


def error_by_numpy(images: Images, real: Images) -> float:
    """Over the rings SIDE / 4 ... SIDE / 2 - 1."""
    ratio = np.log10(by_numpy(images) / by_numpy(real))
    return float(np.abs(ratio[SIDE // 4 - 1 :]).mean())


def tensor(images: Images) -> Tensor:
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def mean_of(images: Images) -> Tensor:
    return spectrum_of(tensor(images)).mean(0)


def blurred(images: Images, deviation: float) -> Images:
    return [
        ndimage.gaussian_filter(image.astype(float), (deviation, deviation, 0), mode="wrap").round().astype(np.uint8)
        for image in images
    ]


REAL = [noise(SIDE, SIDE, seed) for seed in range(6)]


def test_a_set_against_itself_is_zero() -> None:
    assert spectral_error(mean_of(REAL), mean_of(REAL), SIDE) == 0
    assert spectral_error(mean_of(REAL), mean_of([*REAL[3:], *REAL[:3]]), SIDE) < 1e-12  # in any order


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_a_blurred_set_is_what_numpy_computes(deviation: float) -> None:
    images = blurred(REAL, deviation)
    found = spectral_error(mean_of(images), mean_of(REAL), SIDE)
    assert found == pytest.approx(error_by_numpy(images, REAL), rel=1e-9)
    assert found > 0.2


def test_half_of_the_contrast_is_a_factor_of_four() -> None:
    """Powers are compared, in decades: whatever the number of images and the mean."""
    spectrum = mean_of(REAL)
    assert spectral_error(spectrum / 4, spectrum, SIDE) == pytest.approx(np.log10(4))
    assert spectral_error(spectrum, spectrum / 4, SIDE) == pytest.approx(np.log10(4))


def test_the_lower_half_of_the_band_does_not_count() -> None:
    x = np.cos(2 * np.pi * 4 * np.arange(SIDE) / SIDE)  # 4 cycles; half of Nyquist is 8
    fine = np.cos(2 * np.pi * 12 * np.arange(SIDE) / SIDE)
    real = mean_of(REAL)
    for wave, seen in ((x, False), (fine, True)):
        extra = torch.from_numpy(20 * wave[:, None] * np.ones(SIDE))
        changed = spectrum_of(tensor(REAL).double() + extra).mean(0)
        assert (spectral_error(changed, real, SIDE) > 1e-3) is seen


def test_flat_images_have_a_number() -> None:
    flat = [np.full((SIDE, SIDE, 3), 128, np.uint8)]
    found = spectral_error(mean_of(flat), mean_of(REAL), SIDE)
    assert 3 < found < 9  # against a floor of 1e-3
    assert spectral_error(mean_of(flat), mean_of(flat), SIDE) == 0


def test_images_without_a_band_are_refused() -> None:
    check_side(8)
    with pytest.raises(UserError, match=r"8x8 pixels or more, not 7x7; .*eval\.spectral_error=false"):
        check_side(7)


# --- in an evaluation ------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """The image with less contrast."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, image: Tensor) -> Tensor:
        scaled: Tensor = image * self.factor
        return scaled


def scaled(images: Images, factor: float) -> Images:
    return [np.round(((image / 127.5 - 1) * factor + 1) * 127.5).astype(np.uint8) for image in images]


A = [noise(SIDE, SIDE, 20 + seed) for seed in range(5)]
B = [np.asarray(Image.fromarray(noise(SIDE, SIDE, 40 + seed) // 2 + 60)) for seed in range(7)]


@pytest.fixture
def unpaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: None)
    folder = tmp_path / "root" / "test"
    write_set(folder, "unpaired", [{"a.png": image} for image in A] + [{"b.png": image} for image in B], split="test")
    return folder


@pytest.mark.parametrize("backwards", [False, True])
def test_outputs_are_compared_with_the_test_set_s_targets(unpaired: Path, backwards: bool) -> None:
    protocol = TranslationProtocol("unpaired", "AtoB", SIDE, "test", spectral_error=True)
    evaluator = TranslationEvaluator({"set": unpaired}, protocol, [], None, None, backwards=backwards)
    sources, targets = (B, A) if backwards else (A, B)
    for factor in (0.5, 0.25):  # the real side is computed once, and is the same again
        found = evaluator.evaluate(Scale(factor), "set", backwards)
        outputs = scaled(sources, factor)
        assert found.metrics == {"spectral_error": pytest.approx(error_by_numpy(outputs, targets), rel=1e-9)}
        assert found.spectra["output"] == pytest.approx(by_numpy(outputs), rel=1e-9)
        assert found.spectra["real"] == pytest.approx(by_numpy(targets), rel=1e-9)
    assert evaluator.describe()["spectral_error"] == SPECTRAL_ERROR.about


def test_pairs_have_it_beside_their_own_metrics(tmp_path: Path) -> None:
    write_set(tmp_path / "pairs", "paired", [{"a.png": a, "b.png": b} for a, b in zip(A, B, strict=False)])
    protocol = TranslationProtocol("paired", "AtoB", SIDE, "test", spectral_error=True)
    found = TranslationEvaluator({"set": tmp_path / "pairs"}, protocol, [], None, None).evaluate(Scale(0.5), "set")
    assert list(found.metrics) == ["psnr", "l1", "spectral_error"]
    assert set(found.per_image[0]) == {"name", "psnr", "l1"}
    assert found.metrics["spectral_error"] == pytest.approx(error_by_numpy(scaled(A, 0.5), B[:5]), rel=1e-9)
    without = TranslationProtocol("paired", "AtoB", SIDE, "test")
    plain = TranslationEvaluator({"set": tmp_path / "pairs"}, without, [], None, None).evaluate(Scale(0.5), "set")
    assert (plain.per_image, plain.spectra) == (found.per_image, {})
    assert plain.metrics == {name: found.metrics[name] for name in ("psnr", "l1")}


def in_a_run(folder: Path, **options: Any) -> Any:
    data, networks = DataConfig(eval={"set": str(folder)}, crop=SIDE), {"student": Scale(0.5), "teacher": Scale(0.9)}
    accelerator = Accelerator(cpu=True)
    made = TranslationRunEvaluator(
        data, EvalConfig(samples=0, **options), "set", Needs("unpaired"), networks, accelerator
    )
    return made(networks, accelerator)


def test_a_run_has_the_curves_of_all_networks(unpaired: Path) -> None:
    evaluation = in_a_run(unpaired, spectral_error=True)
    assert set(evaluation.metrics) == {"student/set/spectral_error", "teacher/set/spectral_error"}
    curves = evaluation.curves["spectrum"]["set"]
    assert list(curves) == ["real", "student", "teacher"]
    assert curves["student"] == pytest.approx(by_numpy(scaled(A, 0.5)), rel=1e-9)
    nothing = in_a_run(unpaired)  # it is asked for
    assert (nothing.metrics, nothing.curves) == ({}, {})
    assert "spectral_error" in EvalConfig(spectral_error=True).metrics("unpaired")
    assert "spectral_error" not in EvalConfig().metrics("unpaired")


@pytest.mark.distributed
def test_ranks_share_the_images(unpaired: Path) -> None:
    expected = in_a_run(unpaired, spectral_error=True)

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        found = in_a_run(unpaired, spectral_error=True)
        (unpaired / f"found-{rank}.json").write_text(json.dumps([found.metrics, found.curves]))

    assert launch(3, work) == [0] * 3
    first, *others = (json.loads((unpaired / f"found-{rank}.json").read_text()) for rank in range(3))
    assert others == [first] * 2
    assert first[0] == pytest.approx(expected.metrics, rel=1e-9)
