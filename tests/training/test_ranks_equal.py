"""The same global batches on 1, 2 and 4 processes, and in 1, 2 and 4 micro-batches: the same run, for every method."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import launch
from safetensors.torch import load
from small_methods import METHODS, Ramp, build, image_distillation_of, omgd_of, samples_of, wavelet_kd_of
from torch import Tensor
from toy import BATCH as TOY_BATCH
from toy import Killed, ToyGAN, ToyReader, gan_samples, newest_tensors, rows, run

STEPS = 20
EARLY = 8  # steps that four ranks take of the expensive methods: with all their phases, at less than half the time
EXPENSIVE = ("cyclegan", "pix2pix", "fesd", "dcd")
OTHER_FAMILY = ("fesd_paired", "dcd_unpaired")  # of FESD and of DCD one family is trained at each change
BATCH = 4
Weights = dict[str, Tensor]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", autouse=True)
def _vgg_is_read(vgg: Path) -> None:
    build("fesd_unpaired", vgg)  # here, not in each rank


def train(
    name: str, vgg: Path, folder: Path, ranks: int, steps: int, batch: int, until: int | None = None, **options: Any
) -> None:
    """`steps` steps, left after `until` of them; what the method was after EARLY is in `early.pt`."""
    folder.mkdir()

    def work(rank: int, of: int) -> None:
        method = build(name, vgg)

        def before(step: int) -> None:
            if step == EARLY and rank == 0:
                torch.save(method.state_dict(), folder / "early.pt")
            if step == until:
                raise Killed

        reader = ToyReader(batch, samples_of(name), rank, of, before)
        evaluator = Ramp() if name.startswith("dcd") else None
        settings = {"checkpoint_every": steps, "gradient_norms_every": 5, **options}
        with pytest.raises(Killed) if until else contextlib.nullcontext():
            run(method, reader, folder, steps, evaluator, **settings)

    assert launch(ranks, work, seconds=120) == [0] * ranks


def assert_same_lines(one: list[dict[str, Any]], two: list[dict[str, Any]], rtol: float) -> None:
    """Loss terms and gradient norms, of each term and in all, of every step.

    Everything is float64 but the weighted terms, whose values (not gradients) are float32.
    """
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=rtol, abs=1e-9), (left["step"], key)


def assert_same_tensors(left: Weights, right: Weights, rtol: float, atol: float = 1e-7) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_run(first: Path, second: Path, rtol: float, exact: float | None = None) -> None:
    """The lines; weights, Adam's moments and pools at the end, to `exact` where given."""
    assert_same_lines(rows(first), rows(second), rtol)
    tensors, others = newest_tensors(first), newest_tensors(second)
    assert tensors.keys() == others.keys()
    for file in tensors:
        assert_same_tensors(load(tensors[file]), load(others[file]), exact or rtol, exact or 1e-7)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.torture if name in OTHER_FAMILY else ()) for name in METHODS]
)
def test_one_two_and_four_processes(name: str, vgg: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        train(name, vgg, tmp_path / str(ranks), ranks, STEPS, BATCH)
    until = EARLY if name.startswith(EXPENSIVE) else None
    train(name, vgg, tmp_path / "4", 4, STEPS, BATCH, until)
    one = rows(tmp_path / "1")
    lines = [row for row in one if "images" in row]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for row in lines for value in row.values())
    assert any(key.startswith("gradient/") and value > 0 for row in lines for key, value in row.items())
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-4)
    if until:
        early = [row for row in one if row["step"] <= until]
        assert len(early) >= until
        assert_same_lines(early, rows(tmp_path / "4"), 1e-4)
    else:
        assert_same_run(tmp_path / "1", tmp_path / "4", 1e-4)
    states = [torch.load(tmp_path / ranks / "early.pt") for ranks in ("1", "2", "4")]
    for state in states[1:]:
        assert_same_tensors(states[0], state, 1e-4)


@pytest.mark.parametrize("name", ["privileged_student", "cyclegan"])
def test_accumulation_is_exact(name: str, vgg: Path, tmp_path: Path) -> None:
    """Networks without BatchNorm, of several groups, the pool at work: three steps of eight samples."""
    runs = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
    for ranks, pieces in runs:
        train(name, vgg, tmp_path / f"{ranks}x{pieces}", ranks, 3, 8, accumulation=pieces, gradient_norms_every=2)
    if name == "cyclegan":
        pool = load(newest_tensors(tmp_path / "1x1")["memory/pool_generator.safetensors"])
        assert pool["filled"] == len(pool["images"]) < 8  # images have changed places from the first step on
    for ranks, pieces in runs[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / f"{ranks}x{pieces}", 1e-5)


@pytest.mark.parametrize("spectrum", ["crop", "maps"])
def test_what_the_spectral_classifier_sees(
    spectrum: str, vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces lie where the samples' numbers say; without the maps' BatchNorm micro-batches change nothing either."""
    values: dict[str, Any] = {"weight_dcd": 0, "weight_spectral": 0, "mix_spectral": True} if spectrum == "crop" else {}
    monkeypatch.setitem(METHODS, "spectrum", partial(METHODS["fesd_unpaired"], spectrum=spectrum, **values))
    runs = [(1, 1), (2, 1), *([(1, 2), (2, 2)] if spectrum == "crop" else [])]
    for ranks, cut in runs:
        train("spectrum", vgg, tmp_path / f"{ranks}x{cut}", ranks, 3, BATCH, accumulation=cut, gradient_norms_every=2)
    assert any("discriminator/spectral_real" in row for row in rows(tmp_path / "1x1"))
    for ranks, cut in runs[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / f"{ranks}x{cut}", 1e-4)


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_omgd(family: str, vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum over pixels is a mean over images, and its connectors' BatchNorm sees the images of all ranks."""
    monkeypatch.setitem(METHODS, "omgd", partial(omgd_of, family))
    for ranks in (1, 2):
        train("omgd", vgg, tmp_path / str(ranks), ranks, 3, BATCH, gradient_norms_every=2)
    assert all("student/tv" in row for row in rows(tmp_path / "1"))
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-4)


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_wavelet_kd(family: str, vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen teacher's term is a mean over images; without BatchNorm micro-batches change nothing either."""
    monkeypatch.setitem(METHODS, "wavelet_kd", partial(wavelet_kd_of, family))
    runs = [(1, 1), (2, 1), *([(1, 2)] if family == "cyclegan" else [])]
    for ranks, cut in runs:
        folder = tmp_path / f"{ranks}x{cut}"
        train("wavelet_kd", vgg, folder, ranks, 3, BATCH, accumulation=cut, gradient_norms_every=2)
    assert all(row["student/wavelet"] > 0 for row in rows(tmp_path / "1x1"))
    for ranks, cut in runs[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / f"{ranks}x{cut}", 1e-4)


def test_image_distillation(vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices are of one image each, its sum over pixels is a mean over images."""
    monkeypatch.setitem(METHODS, "image_distillation", image_distillation_of)
    for ranks in (1, 2):
        train("image_distillation", vgg, tmp_path / str(ranks), ranks, 3, BATCH, gradient_norms_every=2)
    assert all("student/style" in row for row in rows(tmp_path / "1"))
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-4)


def test_spectral_norm_sees_the_whole_batch(tmp_path: Path) -> None:
    """Every micro-batch sees the same weights, and the power iterations of a step are those of one batch."""
    runs = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]

    def work(rank: int, of: int) -> None:
        for ranks, pieces in runs:
            if ranks == of:
                reader, options = ToyReader(TOY_BATCH, gan_samples, rank, of), {"accumulation": pieces}
                options |= {"checkpoint_every": 6, "gradient_norms_every": 2}
                run(ToyGAN(), reader, tmp_path / f"{ranks}x{pieces}", 6, **options)

    assert launch(1, work) == [0]
    assert launch(2, work) == [0, 0]
    vectors = load(newest_tensors(tmp_path / "1x1")["networks/discriminator.safetensors"])
    start = ToyGAN().discriminator.state_dict()
    moved = [name for name in vectors if name.endswith(("_u", "_v")) and vectors[name].numel() > 1]
    assert len(moved) >= 3
    assert all((vectors[name] - start[name]).abs().max() > 1e-3 for name in moved)
    for ranks, pieces in runs[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / f"{ranks}x{pieces}", 1e-6, 1e-12)  # the lines are of float32
