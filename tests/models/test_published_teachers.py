"""A published generator, converted once, teaches, is started from and is evaluated as one of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import noise, write_set
from PIL import Image
from test_published import COMPRESSED, EVEN, published_discriminator, published_resnet, published_unet, saved, visible
from tiny_runs import CONFIGS, trained
from torch import Tensor, nn

from hpcdistill import convert, evaluate, infer
from hpcdistill.errors import UserError
from hpcdistill.models.registry import load_generator
from hpcdistill.run import load_run

SIDE = 32
DENSE = "ngf: 4, blocks: 9, levels: 5"
NARROW = f"separable: true, blocks: 9, widths: {[*COMPRESSED[0]]}, inner: {[*COMPRESSED[1]]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files, what `convert` makes of them, and packed sets "unpaired" and "paired" of noise."""
    place = tmp_path_factory.mktemp("published")
    for name, network in published().items():
        saved(place / f"{name}.pth", network.state_dict())
        assert convert.main([str(place / f"{name}.pth"), "--out", str(place / f"{name}.safetensors")]) == 0
    domains = [{f"{domain}.png": noise(SIDE, SIDE, seed)} for domain in "ab" for seed in range(2)]
    write_set(place / "unpaired", "unpaired", domains)
    write_set(place / "paired", "paired", [{"ab.png": noise(SIDE, 2 * SIDE, seed)} for seed in range(2)], split="test")
    return place


def published() -> dict[str, nn.Module]:
    return {
        "cyclegan": visible(published_resnet(*EVEN, separable=False, dropout=False)),
        "compressed": visible(published_resnet(*COMPRESSED, separable=True)),
        "pix2pix": visible(published_unet(4, 5)),
    }


def command(folder: Path, out: Path, kind: str, student: str, **teachers: str) -> list[str]:
    """Two steps of Wavelet KD whose teachers are converted files."""
    variant = out / "small.yaml"
    taught = ", ".join(f"{role}: {{weights: {folder / name}.safetensors}}" for role, name in teachers.items())
    variant.write_text(
        f"runs: {out / 'runs'}\n"
        f"data: {{train: {folder / kind}, eval: {{}}, crop: {SIDE}, load_size: {SIDE}, workers: 0}}\n"
        "train: {steps: 2, log_every: 1, trackers: [], device: cpu, batch_size: 1}\n"
        f"method: {{ndf: 4, discriminator_strides: 1, student: {{{student}}}}}\n"
        f"teachers: {{{taught}}}\n"
    )
    name = "edges2shoes" if kind == "paired" else "horse2zebra"
    return [str(CONFIGS / "wavelet_kd" / f"{name}.yaml"), str(variant)]


def lines(out: Path) -> list[dict[str, Any]]:
    [file] = out.glob("runs/wavelet_kd-*/metrics.jsonl")
    return [row for row in map(json.loads, file.read_text().splitlines()) if "images" in row]


def images() -> Tensor:
    return 2 * torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 1


def moved(network: nn.Module, start: Path) -> float:
    """The farthest that a weight has come from where `start` has it."""
    before = dict(load_generator(start)[0].named_parameters())
    return max((weight - before[name]).abs().max().item() for name, weight in network.named_parameters())


@pytest.mark.parametrize(
    ("kind", "teachers"),
    [
        ("unpaired", {"ab": "cyclegan", "ba": "compressed"}),
        ("paired", {"ab": "pix2pix"}),
        ("paired", {"ab": "cyclegan"}),
    ],
)
def test_the_teacher_is_the_published_network(
    kind: str, teachers: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    run = load_run(command(folder, tmp_path, kind, DENSE, **teachers))
    method: Any = run.untrained().train()
    networks = published()
    assert len(method.teachers) == len(teachers)
    for (way, teacher), name in zip(method.teachers.items(), teachers.values(), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(teacher(images()), networks[name](images()), rtol=0, atol=5e-5, msg=way)


def test_one_published_direction(folder: Path, tmp_path: Path) -> None:
    """The other role is left out of the shipped configuration."""
    arguments = command(folder, tmp_path, "unpaired", DENSE, ab="cyclegan")
    with pytest.raises(UserError, match=r"teachers\.ba: the method needs a teacher"):
        load_run([*arguments, "teachers.ba=null"]).untrained()
    trained(*arguments, "teachers.ba=null", "method.direction=a2b")
    terms = {key for key in lines(tmp_path)[0] if "wavelet" in key}
    assert terms == {"student/wavelet"}


@pytest.mark.parametrize(
    ("kind", "name", "student"),
    [("unpaired", "cyclegan", DENSE), ("unpaired", "compressed", NARROW), ("paired", "pix2pix", DENSE)],
)
def test_a_student_that_starts_as_its_teacher_has_nothing_to_learn_of_it(
    kind: str, name: str, student: str, folder: Path, tmp_path: Path
) -> None:
    """Both are the file's: the first step's term is 0 where the networks see one thing; a U-Net's BatchNorms do not."""
    start = {"ab": "student", **({"ba": "student_b2a"} if kind == "unpaired" else {})}
    file = folder / f"{name}.safetensors"
    init = [f"init.{generator}={file}" for generator in start.values()]
    trained(*command(folder, tmp_path, kind, student, **dict.fromkeys(start, name)), *init)
    first, second = lines(tmp_path)
    for role, generator in start.items():
        term = "student/wavelet" + ("_b2a" if role == "ba" else "")
        assert kind == "paired" or first[term] < 1e-5
        assert second[term] > 1e-4  # Adam has moved every weight
        [last] = tmp_path.glob(f"runs/*/generators/last/{generator}.safetensors")
        assert 0 < moved(load_generator(last)[0], file) < 5e-4  # two steps of 2e-4, from there


@pytest.mark.parametrize(
    ("kind", "teacher", "arguments"),
    [("unpaired", "cyclegan", (3, 4, nn.InstanceNorm2d)), ("paired", "pix2pix", (6, 4, nn.BatchNorm2d))],
)
def test_a_discriminator_starts_as_a_published_one_or_as_that_of_a_run(
    kind: str, teacher: str, arguments: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    saved(tmp_path / "latest_net_D.pth", visible(published_discriminator(*arguments)).state_dict())
    file = tmp_path / "d.safetensors"
    assert convert.main([str(tmp_path / "latest_net_D.pth"), "--out", str(file)]) == 0
    roles = dict.fromkeys(["ab"] if kind == "paired" else ["ab", "ba"], teacher)
    line = [*command(folder, tmp_path, kind, DENSE, **roles), "method.discriminator_strides=2"]
    trained(*line, f"init.discriminator={file}")
    [run] = tmp_path.glob("runs/*")
    first = run / "saved" / "last" / "discriminator.safetensors"
    assert 0 < moved(load_generator(first)[0], file) < 5e-4
    trained(*line, f"init.discriminator={run}", f"runs={tmp_path / 'more'}")
    [second] = tmp_path.glob("more/*/saved/last/discriminator.safetensors")
    assert 0 < moved(load_generator(second)[0], first) < 5e-4


def test_a_discriminator_is_no_generator(tmp_path: Path) -> None:
    saved(tmp_path / "d.pth", published_discriminator(3, 4).state_dict())
    assert convert.main([str(tmp_path / "d.pth"), "--out", str(tmp_path / "d.safetensors")]) == 0
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "horse.png")
    with pytest.raises(UserError, match=r"d\.safetensors"):
        infer.main([str(tmp_path / "d.safetensors"), str(tmp_path / "horse.png"), "--out", str(tmp_path / "out")])
    write_set(tmp_path / "set", "paired", [{"ab.png": noise(SIDE, 2 * SIDE, 0)}], split="test")
    with pytest.raises(UserError, match=r"makes \[1, \d+, \d+\] of images of \[3,"):
        evaluate.main([str(tmp_path / "d.safetensors"), "--data", str(tmp_path / "set")])


def test_a_start_of_other_widths_is_refused_with_what_to_set(folder: Path, tmp_path: Path) -> None:
    arguments = command(folder, tmp_path, "unpaired", DENSE, ab="cyclegan", ba="cyclegan")
    for name, message in (
        (
            "compressed",
            r"separable True, here False; widths \[4, 8, 32, 8, 4\], here None; inner .* alike in the section",
        ),
        ("pix2pix", "the class UNetGenerator, here ResNetGenerator"),
    ):
        with pytest.raises(UserError, match=rf"init\.student: .*{name}\.safetensors is a generator of {message}"):
            trained(*arguments, f"init.student={folder / name}.safetensors")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["cyclegan", "compressed", "pix2pix"])
def test_it_is_evaluated(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PSNR and L1 of the published network's own outputs, rounded to 8 bits, by hand."""
    data = folder / "paired"
    options = ["--size", str(SIDE), "--json", "--no-lpips"]
    assert evaluate.main([str(folder / f"{name}.safetensors"), "--data", str(data), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    pairs = np.stack([noise(SIDE, 2 * SIDE, seed) for seed in range(2)]).astype(np.float64)
    source = torch.from_numpy(pairs[:, :, :SIDE]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        made = published()[name](source).double().permute(0, 2, 3, 1).numpy()
    made = np.clip(np.round((made + 1) * 127.5), 0, 255)
    errors = ((made - pairs[:, :, SIDE:]) ** 2).mean((1, 2, 3))
    assert found["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    assert found["l1"] == pytest.approx(np.abs(made - pairs[:, :, SIDE:]).mean(), abs=1e-2)
