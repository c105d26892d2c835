"""Generators on packed sets of images to translate: each number against one computed from the files alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from packed_sets import noise, write_set
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from hpcdistill import train
from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import index_digest
from hpcdistill.data.needs import Needs
from hpcdistill.data.test_sets import real_folders
from hpcdistill.errors import UserError
from hpcdistill.metrics import run_evaluators, torchvision_operators, trained_translation
from hpcdistill.metrics.base import L1_OF_PAIRS, PSNR_CAP
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.frechet import frechet, kid, moments
from hpcdistill.metrics.pair_errors import l1_rgb, psnr_rgb
from hpcdistill.metrics.real_statistics import read_statistics
from hpcdistill.metrics.run_evaluators import TranslationRunEvaluator, open_evaluator
from hpcdistill.metrics.trained_translation import TranslationOptions, evaluate_translation
from hpcdistill.metrics.translation_evaluation import (
    TranslationEvaluator,
    TranslationProtocol,
    eight_bits,
)
from hpcdistill.run import load_run

SIDE = 16


class Means:
    """Features that can be computed by hand: mean and deviation of each colour, of 0..255."""

    frechet_name, kernel_name, origin, digest, dimensions = "frechet_means", "kernel_means", "means", "0", 6

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.images += len(images)
        flat = images.float().flatten(2)
        return torch.cat((flat.mean(dim=2), flat.std(dim=2)), dim=1)


class Scale(nn.Module):
    """tanh-free generator: the image times a number; dropout where it is left in training mode."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Tensor:
        assert image.min() >= -1
        assert image.max() <= 1
        scaled: Tensor = self.dropout(image * self.factor)
        return scaled

    def check_size(self, height: int, width: int) -> None:
        if height % 4 or width % 4:
            raise UserError(f"{height}x{width} is not a multiple of 4")


def resized(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(rgb).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def scaled(rgb: NDArray[np.uint8], factor: float = 0.5) -> NDArray[np.uint8]:
    """What Scale makes of an image, rounded to 8 bits."""
    return np.clip(np.round(((rgb / 127.5 - 1) * factor + 1) * 127.5), 0, 255).astype(np.uint8)


def by_hand(images: list[NDArray[np.uint8]]) -> Tensor:
    rows = [[*image.reshape(-1, 3).mean(0), *image.reshape(-1, 3).std(0, ddof=1)] for image in images]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root, and no weights anywhere."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "root"


A = [noise(20, 24, seed) for seed in range(5)]
B = [noise(18, 18, seed) // 2 + 60 for seed in range(10, 17)]
TRAIN_A = [noise(16, 16, 30)]
TRAIN_B = [noise(22, 16, seed) // 3 for seed in range(40, 44)]
PAIRS = [(noise(20, 24, seed), noise(20, 24, seed + 50)) for seed in range(5)]


@pytest.fixture
def unpaired(root: Path) -> Path:
    def samples(a: list[Any], b: list[Any]) -> list[dict[str, Any]]:
        return [{"a.png": image} for image in a] + [{"b.png": image} for image in b]

    write_set(root / "horses" / "test", "unpaired", samples(A, B), split="test")
    write_set(root / "horses" / "train", "unpaired", samples(TRAIN_A, TRAIN_B))
    return root / "horses" / "test"


@pytest.fixture
def paired(root: Path) -> Path:
    joined = [{"ab.png": np.concatenate(pair, axis=1)} for pair in PAIRS]
    write_set(root / "shoes" / "test", "paired", joined, split="test")
    return root / "shoes" / "test"


def evaluator(
    folder: Path,
    kind: Any,
    real: Any = "test",
    direction: str = "AtoB",
    features: Any = None,
    **options: Any,
) -> TranslationEvaluator:
    protocol = TranslationProtocol(kind, direction, SIDE, real)
    return TranslationEvaluator({"set": folder}, protocol, [], features or Means(), None, **options)


@pytest.mark.parametrize("real", ["test", "train+test"])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_unpaired_sets_are_compared_as_sets(unpaired: Path, real: str, direction: str) -> None:
    found = evaluator(unpaired, "unpaired", real, direction).evaluate(Scale(), "set")
    sources, targets = (A, B) if direction == "AtoB" else (B, A)
    if real == "train+test":
        targets = [*(TRAIN_B if direction == "AtoB" else TRAIN_A), *targets]
    outputs = by_hand([scaled(resized(image)) for image in sources])
    reals = by_hand([resized(image) for image in targets])
    assert found.metrics["frechet_means"] == pytest.approx(frechet(moments(outputs), moments(reals)), rel=1e-4)
    size = min(len(sources), len(targets))
    assert found.metrics["kernel_means"] == pytest.approx(kid(outputs, reals, 100, size).mean, rel=1e-4)
    assert set(found.metrics) == {"frechet_means", "kernel_means"}
    assert (found.images, found.per_image) == (len(sources), [])


def test_statistics_from_a_file_stand_for_the_real_images(unpaired: Path, tmp_path: Path) -> None:
    reals = by_hand([resized(image) for image in (*TRAIN_B, *B)]).numpy()
    np.savez(tmp_path / "horses_B.npz", mu=reals.mean(axis=0), sigma=np.cov(reals, rowvar=False))
    statistics = read_statistics(tmp_path / "horses_B.npz", 6)
    made = evaluator(unpaired, "unpaired", "test", statistics=statistics)  # not of the test images alone
    found = made.evaluate(Scale(), "set").metrics
    expected = evaluator(unpaired, "unpaired", "train+test").evaluate(Scale(), "set").metrics
    assert found == {"frechet_means": pytest.approx(expected["frechet_means"], rel=1e-4)}  # without images no kernel
    about = made.describe()
    assert "real side statistics (horses_B.npz, sha256 " in about["note"]
    assert about["real"].startswith("statistics (horses_B.npz")
    assert not {"kernel_means", "real_images"} & set(about)


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_pairs_have_a_psnr_and_an_l1_each(paired: Path, direction: str) -> None:
    found = evaluator(paired, "paired", direction=direction).evaluate(Scale(), "set")
    values, levels = [], []
    for a, b in PAIRS:
        source, target = (a, b) if direction == "AtoB" else (b, a)
        values.append(peak_signal_noise_ratio(resized(target), scaled(resized(source)), data_range=255))
        levels.append(np.mean(np.abs(resized(target).astype(int) - scaled(resized(source)))))
    assert [row["l1"] for row in found.per_image] == pytest.approx(levels, rel=1e-12)
    assert found.metrics["l1"] == pytest.approx(np.mean(levels))
    assert [row["psnr"] for row in found.per_image] == pytest.approx(values, rel=1e-9)
    assert [row["name"] for row in found.per_image] == [f"image{n}" for n in range(5)]
    assert found.metrics["psnr"] == pytest.approx(math.fsum(values) / 5)
    assert "frechet_means" in found.metrics


def test_backwards_is_the_other_domain(unpaired: Path) -> None:
    both = evaluator(unpaired, "unpaired", "train+test", backwards=True)
    reverse = evaluator(unpaired, "unpaired", "train+test", "BtoA")
    assert both.evaluate(Scale(), "set", True) == reverse.evaluate(Scale(), "set")
    assert both.evaluate(Scale(), "set") != both.evaluate(Scale(), "set", True)


def test_eight_bits_are_rounded_and_clamped() -> None:
    output = torch.tensor([-1.5, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 3.0, math.nan, math.inf])
    assert eight_bits(output).tolist() == [0, 0, 0, 1, 128, 255, 255, 0, 255]
    assert eight_bits(output, "floor").tolist() == [0, 0, 0, 0, 127, 255, 255, 0, 255]
    same = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr_rgb(same, same).tolist() == [PSNR_CAP]


def test_outputs_cut_off_as_the_literature_does(paired: Path, tmp_path: Path) -> None:
    """floor is NumPy's astype, half a level darker; a run is measured so, says so, and is evaluated so later."""
    generators = {"student": Scale()}
    measured = run_evaluator(paired, "paired", generators, bits="floor")
    rounded = run_evaluator(paired, "paired", generators)
    shades, expected = [], []
    for a, b in PAIRS:
        cut = (((resized(a) / 127.5 - 1) * 0.5 + 1) * 127.5).astype(np.uint8)
        shades.append(np.mean(scaled(resized(a)).astype(float) - cut))
        expected.append(peak_signal_noise_ratio(resized(b), cut, data_range=255))
    assert np.mean(shades) == pytest.approx(0.5, abs=0.1)
    metrics = [one(generators, Accelerator(cpu=True)).metrics["student/set/psnr"] for one in (measured, rounded)]
    assert metrics[0] == pytest.approx(np.mean(expected), rel=1e-6)
    assert metrics[0] != metrics[1]
    assert [one.protocol()["bits"] for one in (measured, rounded)] == ["floor", "round"]
    assert ["floor" in one.protocol()["note"] for one in (measured, rounded)] == [True, False]
    file = tmp_path / "run" / "generators" / "last" / "student.safetensors"
    file.parent.mkdir(parents=True)
    for bits in ("floor", "round"):
        (tmp_path / "run" / "config.yaml").write_text(f"eval: {{bits: {bits}, size: {SIDE}, lpips: false}}\n")
        found, about = evaluate_translation(Scale(), file, paired, TranslationOptions(), "cpu")
        assert (about["bits"], found.metrics["psnr"]) == (bits, metrics[bits == "round"])


def test_l1_is_a_mean_for_each_image_and_does_not_wrap_around() -> None:
    produced, target = torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    target[0, :, 0] = 255  # half of the first image
    produced[1, 0, 1, 1] = 6  # one value of the second's twelve
    assert l1_rgb(produced, target).tolist() == [127.5, 0.5]
    assert L1_OF_PAIRS.better == "lower"


def test_modes_and_training_are_left_alone(paired: Path) -> None:
    generator = Scale().train()
    generator.dropout.eval()
    measured = evaluator(paired, "paired").evaluate(generator, "set")
    assert (generator.training, generator.dropout.training) == (True, False)
    assert measured == evaluator(paired, "paired").evaluate(Scale().eval(), "set")
    assert generator.factor.grad is None


def test_real_features_are_computed_once_for_what_they_depend_on(unpaired: Path, root: Path) -> None:
    first, second = Means(), Means()
    result = evaluator(unpaired, "unpaired", "train+test", features=first).evaluate(Scale(), "set")
    assert first.images == len(A) + len(B) + len(TRAIN_B)
    assert evaluator(unpaired, "unpaired", "train+test", features=second).evaluate(Scale(), "set") == result
    assert second.images == len(A)
    [kept] = (root / "features").iterdir()
    # Another real side, another domain, other weights, another size: other features.
    other = Means()
    other.digest = "1"
    evaluator(unpaired, "unpaired", "test").evaluate(Scale(), "set")
    evaluator(unpaired, "unpaired", "train+test", "BtoA").evaluate(Scale(), "set")
    evaluator(unpaired, "unpaired", "train+test", features=other).evaluate(Scale(), "set")
    assert len(list((root / "features").iterdir())) == 4
    # A damaged file is not believed.
    kept.write_bytes(kept.read_bytes()[:50])
    third = Means()
    assert evaluator(unpaired, "unpaired", "train+test", features=third).evaluate(Scale(), "set") == result
    assert third.images == first.images


def test_a_folder_that_cannot_be_written_costs_time_only(
    unpaired: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "features").write_text("a file in the way")
    assert "frechet_means" in evaluator(unpaired, "unpaired").evaluate(Scale(), "set").metrics
    assert "cannot be kept there" in capsys.readouterr().err


def test_the_real_side_s_folders(unpaired: Path, paired: Path, tmp_path: Path) -> None:
    beside = unpaired.parent / "train"
    assert real_folders(unpaired, "test", [str(beside)]) == [unpaired]
    assert real_folders(unpaired, "train+test", ["elsewhere"]) == [beside, unpaired]
    assert real_folders(beside, "train+test", [str(beside)]) == [beside]
    assert real_folders(paired, "train+test", [str(beside), str(paired)]) == [beside, paired]
    for elsewhere in ([], ["http://example.org/train"]):
        with pytest.raises(
            UserError, match=r"eval\.real=train\+test needs the training images.*or set eval\.real=test"
        ):
            real_folders(paired, "train+test", elsewhere)


class Diverged(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.where(image.mean(dim=(1, 2, 3), keepdim=True) > image.mean(), math.nan, image)


def test_refusals(paired: Path, unpaired: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"image[0-4]: the generator's output is not finite"):
        evaluator(paired, "paired").evaluate(Diverged(), "set")
    with pytest.raises(UserError, match=r"makes \[3, 15, 15\] of images of \[3, 16, 16\]"):
        evaluator(paired, "paired").evaluate(nn.Conv2d(3, 3, 2), "set")
    with pytest.raises(UserError, match=r"data\.eval\.set: .*test holds unpaired samples, not paired ones"):
        evaluator(unpaired, "paired")
    write_set(root / "one", "paired", [{"a.png": A[0], "b.png": A[0]}])
    with pytest.raises(UserError, match=r"one: one image is no set to compare"):
        evaluator(root / "one", "paired")
    write_set(root / "sr", "lr-hr", [{"hr.png": A[0]}])
    with pytest.raises(UserError, match=r"sr holds lr-hr samples"):
        evaluator(root / "sr", None)


# --- in a run --------------------------------------------------------------------------------------------------------


def run_evaluator(
    folder: Path, kind: Any, generators: Mapping[str, nn.Module], **options: Any
) -> TranslationRunEvaluator:
    data = DataConfig(eval={"set": str(folder)}, crop=SIDE)
    made = open_evaluator(data, EvalConfig(**options), "set", Needs(kind), generators, Accelerator(cpu=True))
    assert isinstance(made, TranslationRunEvaluator)
    return made


def test_a_run_without_any_weights(paired: Path, unpaired: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generators = {"teacher": Scale(0.2), "student": Scale()}
    measured = run_evaluator(paired, "paired", generators)
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "no FID and no KID" in said
    assert "prefetch --weights inception" in said
    assert "prefetch --weights alexnet" in said
    evaluation = measured(generators, Accelerator(cpu=True))
    assert set(evaluation.metrics) == {f"{name}/set/{metric}" for name in generators for metric in ("psnr", "l1")}
    assert (measured.selects, measured.larger_is_better) == ("student/set/psnr", True)
    protocol = measured.protocol()
    assert protocol["test_sets"] == {"set": 5}
    assert "fid" not in str(protocol).lower().replace("not fid", "")
    # Source, teacher, student, target: one row for each of the first four.
    picture = evaluation.pictures["translation"]
    assert picture.shape[0] == 4 * (SIDE + 18) + 5 * 4
    assert any(np.array_equal(picture[4 + 18 : 4 + 18 + SIDE, 4 : 4 + SIDE], resized(a)) for a, _ in PAIRS[:1])
    measured = run_evaluator(unpaired, "unpaired", generators)
    assert measured(generators, Accelerator(cpu=True)).metrics == {}
    assert measured.selects is None


def test_a_run_with_features(unpaired: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: Means())
    generators = {"student": Scale(), "teacher": Scale(0.2), "teacher_b2a": Scale(0.3)}
    measured = run_evaluator(unpaired, "unpaired", generators, samples=2)
    evaluation = measured(generators, Accelerator(cpu=True))
    assert set(evaluation.metrics) == {
        f"{name}/set/{metric}" for name in ("student", "teacher") for metric in ("frechet_means", "kernel_means")
    }
    direct = evaluator(unpaired, "unpaired", "train+test").evaluate(Scale(), "set")
    assert evaluation.metrics["student/set/frechet_means"] == direct.metrics["frechet_means"]
    assert (measured.selects, measured.larger_is_better) == ("student/set/frechet_means", False)
    protocol = measured.protocol()
    assert (protocol["real"], protocol["real_images"]) == ("train+test", {"set": len(B) + len(TRAIN_B)})
    assert "real side train+test (11 for set)" in protocol["note"]
    both = run_evaluator(unpaired, "unpaired", generators, both_directions=True, kid=False)
    evaluation = both(generators, Accelerator(cpu=True))
    assert set(evaluation.metrics) == {f"{name}/set/frechet_means" for name in generators}
    assert set(evaluation.pictures) == {"translation", "translation_b2a"}


def test_the_train_command_evaluates_and_says_how(
    unpaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps of a real method; its best weights are those of the smallest distance."""
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: Means())
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "run.yaml"
    config.write_text(
        "name: run\n"
        f"runs: {tmp_path / 'runs'}\n"
        "method: {name: cyclegan, crop: 16, ndf: 8, discriminator_strides: 1, generator: {ngf: 4}}\n"
        f"data: {{train: {unpaired.parent / 'train'}, eval: {{test: {unpaired}}}}}\n"
        "train: {steps: 6, batch_size: 1, device: cpu, trackers: [], log_every: 2}\n"
        "eval: {every: 2, spectral_error: true}\n"
    )
    assert train.main([str(config), "data.load_size=18", "data.crop=16", "data.workers=0"]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    metric = result["protocol"]["selects"]
    assert metric == "generator/test/frechet_means"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line[metric] for line in lines if metric in line}
    assert list(values) == [2, 4, 6]
    assert result["best"]["step"] == min(values, key=values.__getitem__)
    assert result["best"]["metrics"][metric] == min(values.values())
    assert len(list((folder / "samples").glob("translation-*.png"))) == 3
    curves = json.loads((folder / "samples" / "spectrum-00000006.json").read_text())
    assert {name: len(curve) for name, curve in curves["test"].items()} == {"real": 7, "generator": 7}
    assert result["last"]["metrics"]["generator/test/spectral_error"] > 0
    assert "real side train+test (11 for test)" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_nothing_can_be_measured_of_says_so(
    unpaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: None)
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: run\nruns: {tmp_path / 'runs'}\n"
        "method: {name: cyclegan, crop: 16, ndf: 8, discriminator_strides: 1, generator: {ngf: 4}}\n"
        f"data: {{train: {unpaired.parent / 'train'}, eval: {{test: {unpaired}}}, crop: 16, load_size: 18, "
        "workers: 0}\n"
        "train: {steps: 2, batch_size: 1, device: cpu, trackers: []}\n"
    )
    assert train.main([str(config)]) == 0
    captured = capsys.readouterr()
    assert "evaluated: nothing could be measured; the last weights are kept\n" in captured.err
    assert "nothing could be measured; the last weights are kept" in captured.out
    assert "best" not in captured.out


def test_the_real_side_is_part_of_the_identity(unpaired: Path, tmp_path: Path) -> None:
    """It decides which weights are the best; naming the default changes nothing."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"method: {{name: cyclegan}}\ndata: {{train: {unpaired.parent / 'train'}, eval: {{test: {unpaired}}}}}\n"
    )
    plain = load_run([str(config)]).identity
    assert plain["real"] == [index_digest(unpaired.parent / "train")]
    assert "real" not in load_run([str(config), "eval.real=test"]).identity
    operational = ["eval.kid=false", "eval.lpips=false", "eval.both_directions=true"]
    assert load_run([str(config), *operational]).identity == plain


# --- statistics in the place of real images --------------------------------------------------------------------------


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    reals = by_hand([resized(image) for image in (*TRAIN_B, *B)]).numpy()
    np.savez(tmp_path / "horses_B.npz", mu=reals.mean(axis=0), sigma=np.cov(reals, rowvar=False))
    return tmp_path / "horses_B.npz"


def pytorch_fid(outputs: Tensor, file: Path) -> float:
    torchvision_operators.ready()
    from pytorch_fid.fid_score import calculate_frechet_distance

    made = outputs.numpy()
    with np.load(file) as held:
        found = calculate_frechet_distance(made.mean(axis=0), np.cov(made, rowvar=False), held["mu"], held["sigma"])
    return float(found)


def test_a_run_whose_real_side_is_a_file(
    unpaired: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is pytorch-fid's of the same outputs and the same file, in the run and when it is evaluated later."""
    for module in (run_evaluators, trained_translation):
        monkeypatch.setattr(module, "features_if_there", lambda name, device: Means())
    generators = {"student": Scale()}
    measured = run_evaluator(unpaired, "unpaired", generators, real_stats=str(statistics))
    expected = pytest.approx(pytorch_fid(by_hand([scaled(resized(image)) for image in A]), statistics), rel=1e-4)
    assert measured(generators, Accelerator(cpu=True)).metrics == {"student/set/frechet_means": expected}  # no kernel
    assert measured.selects == "student/set/frechet_means"
    assert measured.protocol()["real"].startswith("statistics (horses_B.npz, sha256 ")
    names = EvalConfig(real_stats=str(statistics)).metrics("unpaired")
    assert names == ["fid"]
    file = tmp_path / "run" / "generators" / "last" / "student.safetensors"
    file.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(
        f"eval: {{real_stats: {statistics}, size: {SIDE}, spectral_error: false}}\n"
    )
    found, about = evaluate_translation(Scale(), file, unpaired, TranslationOptions(), "cpu")
    assert (found.metrics, about["real"]) == ({"frechet_means": expected}, measured.protocol()["real"])
    images, about = evaluate_translation(Scale(), file, unpaired, TranslationOptions(real="test"), "cpu")
    assert ("kernel_means" in images.metrics, about["real"]) == (True, "test")
    with pytest.raises(UserError, match=r"--kid: there is none with eval\.real_stats of the run, .*horses_B\.npz; add"):
        evaluate_translation(Scale(), file, unpaired, TranslationOptions(kid=True), "cpu")
    back = file.with_stem("student_b2a")  # the file is of the other direction's images
    _, about = evaluate_translation(Scale(), back, unpaired, TranslationOptions(), "cpu")
    assert about["real"] == "train+test"
    statistics.unlink()
    with pytest.raises(UserError, match=r"eval\.real_stats of the run, .*horses_B\.npz: no such file"):
        evaluate_translation(Scale(), file, unpaired, TranslationOptions(), "cpu")


def test_the_file_is_part_of_the_identity_by_its_content(unpaired: Path, statistics: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"method: {{name: cyclegan}}\ndata: {{train: {unpaired.parent / 'train'}, eval: {{test: {unpaired}}}}}\n"
    )

    def loaded(*more: str) -> Any:
        return load_run([str(config), *more])

    plain, given = loaded(), loaded(f"eval.real_stats={statistics}")
    assert given.short != plain.short
    assert "real_stats" not in json.dumps(plain.identity["values"])  # the default is in no identity
    digest = hashlib.sha256(statistics.read_bytes()).hexdigest()
    assert given.identity == {**plain.identity, "real": {"statistics": digest}}
    moved = statistics.rename(tmp_path / "moved.npz")
    assert loaded(f"eval.real_stats={moved}").short == given.short
    assert given.key != plain.key == loaded("eval.kid=false").key  # keys are known before the files are there
    moved.write_bytes(moved.read_bytes() + b"x")
    assert loaded(f"eval.real_stats={moved}").short != given.short


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.real_stats={folder}/absent.npz"], r"eval\.real_stats=.*absent\.npz: no such file; give the \.npz"),
        (["eval.real=test"], r"real_stats: takes the place of the real images; leave eval\.real out"),
        (["eval.both_directions=true"], "real_stats: is of one direction's images; leave eval.both_directions out"),
        (
            ["eval.real_stats={folder}/keys.npz"],
            r"eval\.real_stats=.*keys\.npz: has no mu, but m, s; ",
        ),
        (
            ["eval.real_stats={folder}/large.npz"],
            r"large\.npz: mu is 2048 instead of 6; .* of the same network",
        ),
        (["eval.real_stats={folder}/text.npz"], r"eval\.real_stats=.*text\.npz: not a readable \.npz file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_before_training(
    unpaired: Path,
    statistics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: Means())
    np.savez(tmp_path / "keys.npz", m=np.zeros(6), s=np.eye(6))
    np.savez(tmp_path / "large.npz", mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's
    (tmp_path / "text.npz").write_text("mu, sigma")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: run\nruns: {tmp_path / 'runs'}\n"
        "method: {name: cyclegan, crop: 16, ndf: 8, discriminator_strides: 1, generator: {ngf: 4}}\n"
        f"data: {{train: {unpaired.parent / 'train'}, eval: {{test: {unpaired}}}, crop: 16, load_size: 18, "
        "workers: 0}\n"
        f"train: {{steps: 2, batch_size: 1, device: cpu, trackers: []}}\neval: {{real_stats: {statistics}}}\n"
    )
    with pytest.raises(UserError, match=message) as error:
        train.main([str(config), *(part.format(folder=tmp_path) for part in overrides)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("measured_on", ["eval: {set5: FOLDER}", "held_out: 1"])
def test_super_resolution_has_no_such_file(measured_on: str, statistics: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "sr", "lr-hr", [{"hr.png": A[0]}])
    data = f"train: FOLDER, {measured_on}".replace("FOLDER", str(tmp_path / "sr"))
    (tmp_path / "run.yaml").write_text(f"method: {{name: plain_sr, scale: 4}}\ndata: {{{data}}}\n")
    with pytest.raises(UserError, match=r"eval\.real_stats: is for image translation; leave it out"):
        load_run([str(tmp_path / "run.yaml"), f"eval.real_stats={statistics}"]).identity  # noqa: B018


# --- sets of both kinds ----------------------------------------------------------------------------------------------


def test_each_test_set_is_measured_as_the_kind_it_is(
    unpaired: Path, paired: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the method trains on; the first, which is selected, decides what chooses without features."""
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: Means())
    data = DataConfig(eval={"horses": str(unpaired), "shoes": str(paired)}, crop=SIDE)
    generators = {"student": Scale()}
    measured = open_evaluator(data, EvalConfig(), "horses", Needs("paired"), generators, Accelerator(cpu=True))
    found = measured(generators, Accelerator(cpu=True)).metrics
    alone = {"horses": evaluator(unpaired, "unpaired", "train+test"), "shoes": evaluator(paired, "paired")}
    expected = {
        f"student/{name}/{metric}": value
        for name, one in alone.items()
        for metric, value in one.evaluate(Scale(), "set").metrics.items()
    }
    assert found == expected
    assert set(found) > {"student/shoes/psnr", "student/horses/kernel_means"}
    assert "student/horses/psnr" not in found
    monkeypatch.setattr(run_evaluators, "features_if_there", lambda name, device: None)
    for selected, chooses in (("horses", None), ("shoes", "student/shoes/psnr")):
        without = open_evaluator(data, EvalConfig(), selected, Needs("paired"), generators, Accelerator(cpu=True))
        assert without.selects == chooses
        assert without(generators, Accelerator(cpu=True)).pictures["translation"].shape[0] > SIDE


def test_the_size_is_checked_before_training(paired: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.size=18: 18x18 is not a multiple of 4"):
        run_evaluator(paired, "paired", {"student": Scale()}, size=18)


def test_damaged_weights_are_no_missing_ones(paired: Path, root: Path) -> None:
    (root / "weights").mkdir()
    (root / "weights" / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"not whole")
    with pytest.raises(UserError, match=r"6726825d\.pth: damaged"):
        run_evaluator(paired, "paired", {"student": Scale()})
