"""A folder of images as teacher: from the files to a trained student, measured against real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_sets import noise, write_set
from PIL import Image
from tiny_runs import CONFIGS, trained
from torch import Tensor

from hpcdistill import evaluate, pack
from hpcdistill.errors import UserError
from hpcdistill.metrics import run_evaluators, trained_translation
from hpcdistill.metrics.frechet import frechet, moments
from hpcdistill.models.registry import load_generator
from hpcdistill.run import load_run

SIDE = 48
TEST_A = [noise(SIDE, SIDE, seed) for seed in range(20, 23)]
TEST_T = [noise(SIDE, SIDE, seed) // 2 + 90 for seed in range(30, 33)]  # what the teacher makes of them
REAL_B = [noise(SIDE, SIDE, seed) // 3 for seed in range(40, 44)]
REAL_TRAIN_B = [noise(SIDE, SIDE, seed) // 4 for seed in range(50, 52)]


class Means:
    """The mean of each colour, of 0..255."""

    frechet_name, kernel_name, origin, digest, dimensions = "frechet_means", "kernel_means", "means", "0", 3

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(2).mean(dim=2)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root: real images without pairs, and what `pack` made of a folder of images and a folder of theirs."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (run_evaluators, trained_translation):
        monkeypatch.setattr(module, "features_if_there", lambda name, device: Means())
    data = tmp_path / "data"
    for split, a, b in (("train", TEST_A[:1], REAL_TRAIN_B), ("test", TEST_A, REAL_B)):
        write_set(data / "horse2zebra" / split, "unpaired", [{"a.png": x} for x in a] + [{"b.png": x} for x in b])
    of_training = [noise(SIDE, SIDE, seed) for seed in range(4)], [noise(SIDE, SIDE, seed) for seed in range(10, 14)]
    for split, (a, b) in {"train": of_training, "test": (TEST_A, TEST_T)}.items():
        for side, images in (("a", a), ("b", b)):
            folder = tmp_path / "images" / split / side
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / f"n{number}.png")
        folders = [f"--{side}={tmp_path / 'images' / split / side}" for side in "ab"]
        pack.main(["paired", *folders, "--out", str(data / "horse2zebra-taught" / split), "--processes", "1"])
    return data


def command(root: Path, vgg: Path, *more: str) -> list[str]:
    """The shipped configuration, for two steps of small images; measured on the teacher's test images as well."""
    variant = root.parent / "small.yaml"
    variant.write_text(
        f"runs: {root.parent / 'runs'}\n"
        f"data: {{load_size: {SIDE}, crop: {SIDE}, workers: 0}}\n"
        "train: {steps: 2, batch_size: 2, log_every: 1, trackers: [], device: cpu}\n"
        "eval: {every: 1, spectral_error: false}\n"
        f"method: {{vgg: '{vgg}', style_layers: [relu1_1], student: {{ngf: 8, blocks: 1}}}}\n"
    )
    taught = f"data.eval.taught={root / 'horse2zebra-taught' / 'test'}"
    return [str(CONFIGS / "taught" / "horse2zebra.yaml"), str(variant), taught, *more]


def outputs(network: torch.nn.Module) -> list[NDArray[np.uint8]]:
    x = torch.from_numpy(np.stack(TEST_A).transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        made = ((network.eval()(x) + 1) * 127.5).round().clamp(0, 255)
    return list(made.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def distance(made: list[Any], real: list[Any]) -> float:
    """The Frechet distance of the images' means."""
    rows = [torch.tensor(np.stack([image.reshape(-1, 3).mean(0) for image in images])) for images in (made, real)]
    return frechet(moments(rows[0]), moments(rows[1]))


def test_from_two_folders_to_a_measured_student(
    root: Path, vgg: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = trained(*command(root, vgg))
    folder = root.parent / "runs" / f"{result['name']}-{result['identity']}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in rows if "images" in row]
    assert [row["step"] for row in lines] == [1, 2]
    assert all(row[f"student/{term}"] > 0 for row in lines for term in ("output", "style", "feature"))
    made = outputs(load_generator(folder / "generators" / "last" / "student.safetensors")[0])
    metrics = result["last"]["metrics"]
    # Real zebras, of both splits: none of the images that were learnt from.
    of_real = pytest.approx(distance(made, [*REAL_TRAIN_B, *REAL_B]), rel=1e-4)
    assert metrics["student/horse2zebra/frechet_means"] == of_real
    assert "student/horse2zebra/l1" not in metrics
    levels = np.mean([np.abs(x.astype(int) - y).mean() for x, y in zip(made, TEST_T, strict=True)])
    assert metrics["student/taught/l1"] == pytest.approx(levels, rel=1e-9)  # how far it is from its teacher
    assert metrics["student/taught/frechet_means"] == pytest.approx(distance(made, TEST_T), rel=1e-4)
    protocol = result["protocol"]
    assert protocol["selects"] == "student/horse2zebra/frechet_means"
    assert (protocol["real"], protocol["real_images"]) == ("train+test or test", {"horse2zebra": 6, "taught": 3})
    assert "real side train+test (6 for horse2zebra), test (3 for taught)" in protocol["note"]
    capsys.readouterr()
    data = ["--data", str(root / "horse2zebra" / "test"), "--which", "last", "--json"]
    assert evaluate.main([str(folder), *data]) == 0
    assert json.loads(capsys.readouterr().out)["frechet_means"] == of_real


def test_the_teacher_s_images_are_never_the_real_side(root: Path, vgg: Path) -> None:
    """Where the training set is all that could stand for real images, it is an error and no number."""
    alone = root / "shoes"
    write_set(alone, "paired", [{"a.png": a, "b.png": b} for a, b in zip(TEST_A, TEST_T, strict=True)])
    words = command(root, vgg, f"data.eval={{shoes: {alone}}}", "eval.real=train+test")
    assert "real" not in load_run(words).identity
    with pytest.raises(UserError, match=r"eval\.real=train\+test needs the training images.*or set eval\.real=test"):
        trained(*words)
    result = trained(*words, "eval.real=test")
    folder = root.parent / "runs" / f"{result['name']}-{result['identity']}"
    with pytest.raises(UserError, match=r"eval\.real=train\+test needs the training images"):
        evaluate.main([str(folder), "--data", str(alone), "--real", "train+test"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.crop=40"], r"method\.crop: is 48, data\.crop is 40; set both alike"),
        (["data.train={root}/horse2zebra/train"], "holds unpaired samples, the method needs paired"),
        (["data.train={root}/none"], "none: does not exist; pack one with"),
        (["method.vgg=nowhere.pth"], r"nowhere\.pth: no such file"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(root: Path, vgg: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        trained(*command(root, vgg, *(part.format(root=root) for part in more), "method.crop=48"))
    assert "\n" not in str(error.value)
    assert not (root.parent / "runs").exists()
