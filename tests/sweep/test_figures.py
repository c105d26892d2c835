"""The page of figures: where it looks and what it shows, of networks whose differences are known."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import Strict
from torch import Tensor, nn

from hpcdistill import figures
from hpcdistill.deploy.candidates import Candidate, open_candidates, sources_of, split_label
from hpcdistill.errors import UserError
from hpcdistill.figures import main
from hpcdistill.metrics.sr_evaluation import bicubic_upsampler
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import save_generator
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.sweep.comparison import error_crops, gain, spectra
from hpcdistill.sweep.crop import Wanted, parse_crop
from hpcdistill.sweep.encoder_figures import window
from hpcdistill.sweep.figures import Figures, figures_page
from hpcdistill.sweep.report import Crops, Page, Text

sys.path.insert(0, str(Path(__file__).parents[1]))
from whole_set import evaluate_sr

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the support modules of the data tests
from packed_sets import noise, write_set


class Painted(nn.Module):
    """Bicubic enlargement, 0.1 lighter (25.5 levels of luma) in boxes (top, left, height, width) of HR pixels."""

    takes, scale, channels = "lr", 4, 1

    def __init__(self, *boxes: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.bicubic, self.boxes = bicubic_upsampler(4), boxes
        self.nothing = nn.Conv2d(1, 1, 1, bias=False)  # something to be counted
        nn.init.zeros_(self.nothing.weight)

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    def forward(self, lr: Tensor) -> Tensor:
        image: Tensor = self.bicubic(lr) + self.nothing(self.bicubic(lr))
        for top, left, height, width in self.boxes:
            image[..., top : top + height, left : left + width] += 0.1
        return image


class EveryFourth(nn.Module):
    """An encoder that takes every fourth pixel, some levels lighter."""

    def __init__(self, levels: float) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, hr: Tensor) -> Tensor:
        return hr[..., ::4, ::4] + self.levels / 255


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two grey images of 96x128 with a soft slope, so that nothing is clamped; LR is every fourth pixel."""
    samples = []
    for start in (60, 90):
        slope = (start + np.arange(96)[:, None] // 4 + np.arange(128)[None] // 4).astype(np.uint8)
        grey = np.repeat(slope[..., None], 3, axis=2)
        samples.append({"hr.png": grey, "lr4.png": grey[::4, ::4]})
    write_set(tmp_path / "set", "lr-hr", samples, scales=(4,))
    return tmp_path / "set"


def candidate(label: str, network: nn.Module) -> Candidate:
    return Candidate(label, label, Path(label), network)


def measured(
    images: Path,
    *candidates: Candidate,
    pictures: int = 1,
    crops: Sequence[Wanted] = (),
    shown: Sequence[str] = (),
) -> Figures:
    """The figures of x4, with places of 32 pixels."""
    test_set = load_test_set(images, 4)
    sources = sources_of(candidates, test_set)
    figures = Figures(candidates, sources, test_set, "pisr", pictures, 32, crops, shown=shown)
    figures.measure()
    return figures


def page_of(images: Path, *candidates: Candidate, pictures: int = 1) -> Page:
    return figures_page([measured(images, *candidates, pictures=pictures)], images, "python -m ...")


def crops_of(page: Page) -> list[Crops]:
    return [block for section in page.sections for block in section.blocks if isinstance(block, Crops)]


def test_the_place_where_the_networks_differ_is_found(images: Path) -> None:
    """One place of the grid is painted by one network; another by both, which is a difference from bicubic alone."""
    both = (0, 0, 32, 32)
    runs = [candidate("a", Painted(both)), candidate("b", Painted(both, (48, 80, 32, 32)))]
    (choice,) = measured(images, *runs).choices
    assert choice.box == (48, 80, 32, 32)
    assert choice.difference == pytest.approx(25.5, abs=0.6)  # two pictures of 8 bits


def test_one_network_is_looked_at_where_it_differs_from_bicubic(images: Path) -> None:
    (choice,) = measured(images, candidate("painted", Painted((16, 64, 32, 32)))).choices
    assert choice.box == (16, 64, 32, 32)


def test_a_crop_shows_the_pixels_of_its_place(images: Path) -> None:
    """HR, bicubic and the networks, in this order, each cut at the box; the box is drawn where it is."""
    runs = [candidate("plain", Painted()), candidate("painted", Painted((48, 80, 32, 32)))]
    (crops,) = crops_of(page_of(images, *runs))
    view = crops.views[0]
    assert [crop.label for crop in view.crops] == ["HR", "Bicubic", "plain", "painted"]
    hr = load_test_set(images, 4)[0][1]
    np.testing.assert_array_equal(view.crops[0].image, hr[48:80, 80:112])
    bicubic, plain, painted = (crop.image.astype(int) for crop in view.crops[1:])
    assert np.abs(plain - bicubic).max() <= 1  # rounded at ties, by way of luma and not
    # 25.5 levels of luma are 25.5 * 255 / 219 of grey.
    lighter = painted - plain
    assert np.abs(lighter - 25.5 * 255 / 219).max() <= 1
    assert crops.frame(view) == {"top": 50.0, "left": 62.5, "height": 33.333, "width": 25.0}


def test_errors_are_magnified_alike(images: Path) -> None:
    """At the painted place: HR is a soft slope, so bicubic is right there and the painted one 25.5 levels off."""
    page = page_of(images, candidate("plain", Painted()), candidate("painted", Painted((48, 80, 32, 32))))
    (crops,) = crops_of(page)
    errors = crops.views[1]
    assert [crop.label for crop in errors.crops] == ["Bicubic, error", "plain, error", "painted, error"]
    assert "|SR - HR| on luma, times " in errors.label
    factor = float(errors.label.rpartition("times ")[2])
    hr, *made = (luma_uint8(crop.image).astype(float) * 255 for crop in crops.views[0].crops)
    assert factor == pytest.approx(255 / np.percentile(np.abs(made[2] - hr), 99.5), rel=0.1)
    for crop, output in zip(errors.crops, made, strict=True):
        error = np.abs(output - hr)
        np.testing.assert_allclose(crop.image[..., 0], np.minimum(255, error * factor), atol=0.6)
        assert crop.note == f"{error.mean():.2f} levels on average"
    assert errors.crops[2].image.mean() > 10 * errors.crops[0].image.mean()


def test_where_nothing_is_magnified_there_is_no_error() -> None:
    hr = noise(16, 16, 0)
    said, (crop,) = error_crops(hr, {"same": hr}, (0, 0, 16, 16))
    assert said.endswith("times 1")
    assert not crop[1].any()


def test_spectra_are_those_of_the_whole_pictures() -> None:
    """White noise is flat: half as much is 6.02 dB lower at every frequency; a wave has its own frequency."""
    generator = np.random.default_rng(0)
    rough = generator.normal(0, 1, (128, 128, 1)).repeat(3, axis=2)
    loud, quiet = (np.rint(128 + rough * levels).clip(0, 255).astype(np.uint8) for levels in (24, 12))
    chart = spectra(loud, {"quiet": quiet}, 4, "noise")
    assert [(line.label, line.series) for line in chart.lines] == [("quiet", 0), ("HR", 6)]
    (x, low), (same_x, high) = (np.array(line.points).T for line in chart.lines)
    np.testing.assert_array_equal(x, same_x)
    np.testing.assert_allclose(high - low, 6.02, atol=0.6)
    # 219/255 of the levels are luma's; white noise of 1 level is at -2.5 dB.
    assert high.mean() == pytest.approx(20 * np.log10(24 * 219 / 255) - 2.5, abs=0.3)
    assert (x[0], x[-1]) == (pytest.approx(200 / 128 * 1.5, abs=1.7), pytest.approx(137, abs=5))
    # Noise of one frequency, 32 of 64 cycles, in all directions.
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(128, 1 / 128), np.fft.fftfreq(128, 1 / 128)))
    ring = np.fft.ifft2(np.fft.fft2(rough[..., 0]) * (np.abs(radius - 32) < 2)).real
    ring = np.rint(128 + 100 * ring[..., None].repeat(3, axis=2)).clip(0, 255).astype(np.uint8)
    line = spectra(ring, {}, 4, "ring").lines[0]
    assert max(line.points, key=lambda point: point[1])[0] == pytest.approx(50, abs=2)


def test_of_many_methods_the_first_are_drawn() -> None:
    picture = noise(16, 16, 0)
    chart = spectra(picture, {f"m{number}": picture for number in range(8)}, 2, "x")
    assert [line.series for line in chart.lines] == [0, 1, 2, 3, 4, 5, 6]
    assert "Drawn are the first 6 of 8." in chart.note


def test_methods_that_are_alike_are_shown_where_bicubic_differs(images: Path) -> None:
    """A run and its export: at no place do they differ, and any place would do."""
    box = (48, 80, 32, 32)
    figures = measured(images, candidate("a", Painted(box)), candidate("b", Painted(box)))
    assert figures.choices[0].box == box
    (text,) = [block for block in next(figures.sections()).blocks if isinstance(block, Text)]
    assert "hardly differ among themselves" in text.paragraphs[0]


def test_the_numbers_are_those_of_the_whole_image(images: Path) -> None:
    painted = Painted((48, 80, 32, 32))
    page = page_of(images, candidate("painted", painted), pictures=2)
    rows = {row["name"]: row for row in evaluate_sr(painted, load_test_set(images, 4), 4).per_image}
    for crops in crops_of(page):
        row = rows[crops.title]
        assert crops.views[0].crops[2].note == f"{row['psnr']:.2f} dB / {row['ssim']:.4f}"
    assert len(crops_of(page)) == 2


def test_a_named_place_is_shown_on_the_grid_of_lr(images: Path) -> None:
    found = measured(images, candidate("a", Painted()), crops=[Wanted("image1", 5, 11, 30)])
    assert [(choice.image, choice.box) for choice in found.choices] == [(1, (4, 8, 28, 28))]


def test_a_named_image_is_shown_where_the_methods_differ(images: Path) -> None:
    """By name or number, behind the places that are named; what is said of them says so."""
    runs = [candidate("a", Painted()), candidate("b", Painted((48, 80, 32, 32)))]
    places = [(choice.image, choice.box) for choice in measured(images, *runs, shown=["1", "image0"]).choices]
    assert places == [(1, (48, 80, 32, 32)), (0, (48, 80, 32, 32))]
    figures = measured(images, *runs, crops=[Wanted("0", 0, 0, 32)], shown=["image1"])
    assert [(choice.image, choice.box) for choice in figures.choices] == [(0, (0, 0, 32, 32)), (1, (48, 80, 32, 32))]
    (text,) = [block for block in next(figures.sections()).blocks if isinstance(block, Text)]
    assert text.paragraphs[0].startswith("The images were named by who made this page; places that were not are those")


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (Wanted("imaeg1", 0, 0, 32), "no such image; did you mean 'image1'"),
        (Wanted("2", 0, 0, 32), "there are 2 images; the last is number 1"),
        (Wanted("image1", 80, 0, 32), "leads out of the image of 128x96"),
        (Wanted("image1", 0, 100, 32), "leads out of the image of 128x96"),
    ],
)
def test_a_place_that_is_not_there_is_one_line_before_anything_is_measured(
    images: Path, crop: Wanted, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figures, "measure", lambda *_, **__: pytest.fail("measured first"))
    with pytest.raises(UserError, match=message):
        measured(images, candidate("a", Painted()), crops=[crop])


def test_what_an_encoder_adds_to_bicubic_is_magnified(images: Path) -> None:
    """LR is every fourth pixel: the encoder is 10 levels above it everywhere; 127 / 10 magnifies, by two digits 12."""
    teacher = PrivilegedTeacher(4, encoder="pisr", degradation="none")
    teacher.encoder = EveryFourth(10)
    (crops,) = crops_of(page_of(images, candidate("PISR", teacher)))  # no networks, no figure 6
    whole, magnified = crops.views
    assert [crop.label for crop in whole.crops] == ["Bicubic", "PISR", "PISR, less bicubic"]
    assert [crop.label for crop in magnified.crops] == ["HR", "Bicubic", "PISR", "PISR, less bicubic"]
    assert crops.letters == {1: "A"}  # the whole has no box
    assert whole.crops[2].note == "times 12; root mean square 10.0 levels"
    assert np.unique(whole.crops[2].image).tolist() == [128 + 120]
    assert (whole.crops[1].image.astype(int) - whole.crops[0].image == 10).all()
    assert magnified.crops[2].image.shape == (8, 8, 3)
    assert magnified.crops[0].image.shape == (32, 32, 3)


def test_an_encoding_far_from_black_and_white_is_stretched(images: Path) -> None:
    """The slope, 1000 levels up: its darkest pixels are black, its lightest white."""
    teacher = PrivilegedTeacher(4, encoder="pisr", degradation="none")
    teacher.encoder = EveryFourth(1000)
    (crops,) = crops_of(page_of(images, candidate("PISR", teacher)))
    encoded = crops.views[0].crops[1]
    assert encoded.image.min() == 0
    assert encoded.image.max() >= 250
    low, high = (float(number) for number in re.findall(r"-?[0-9]+", encoded.note))
    shown = {name: lr for name, _, lr in load_test_set(images, 4)}[crops.title]
    slope = luma_uint8(shown) * 255 + 1000
    assert encoded.note == f"black is {low:.0f}, white {high:.0f}"
    assert (low, high) == (pytest.approx(slope.min(), abs=2), pytest.approx(slope.max(), abs=2))


def test_values_beyond_black_and_white_are_shown_with_their_range() -> None:
    assert window(np.linspace(0, 255, 1001)) == (0, 255)
    assert window(np.linspace(-10, 260, 1001)) == (0, 255)
    low, high = window(np.linspace(-1000, 1000, 1001))
    assert (low, high) == (-990, 990)  # 0.5 % on either side
    assert window(np.full(9, 400.0)) == (400, 401)


def test_differences_are_magnified_by_two_digits() -> None:
    assert gain([np.zeros(4)], 127) == 1
    assert gain([np.full(4, 1.0), np.full(4, -3.0)], 127) == 42  # 127 / 3 = 42.3
    assert gain([np.full(4, 1000.0)], 127) == pytest.approx(0.12)  # 0.127
    assert gain([np.full(4, 127.0)], 127) == 1


# From the command line.


def run_folder(runs: Path, name: str, generator: nn.Module, role: str, **result: Any) -> Path:
    folder = runs / f"{name}-00000000"
    (folder / "generators" / "last").mkdir(parents=True)
    save_generator(generator, folder / "generators" / "last" / f"{role}.safetensors")
    none = {"step": 1, "metrics": {}}
    (folder / "result.json").write_text(json.dumps({"name": name, "best": none, "last": none, **result}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    runs = tmp_path / "runs"
    run_folder(runs, "dssd-teacher-x4", PrivilegedTeacher(4), "teacher")
    run_folder(runs, "dssd-x4", FSRCNN(4), "student", teacher="dssd-teacher-x4-00000000")
    run_folder(runs, "fsrcnn-x2", FSRCNN(2), "student")
    return runs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(noise(64, 80, number)).save(folder / f"p{number}.png")
    return folder


def test_a_page_of_two_scales(runs: Path, photographs: Path, tmp_path: Path) -> None:
    """Well-formed, alone, in both colours; the student's teacher is found; every picture decodes."""
    page = tmp_path / "new" / "page.html"
    words = [str(runs / "fsrcnn-x2-00000000"), f"Ours={runs / 'dssd-x4-00000000'}"]
    assert main([*words, "--images", str(photographs), "--out", str(page), "--pictures", "1", "--side", "32"]) == 0
    text = page.read_text()
    parsed = Strict(text)
    assert [tag for tag, _ in parsed.elements if tag == "script"] == []
    addresses = [attributes.get(name) or "" for _, attributes in parsed.elements for name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses if address)
    assert "color-scheme" in text
    assert "prefers-color-scheme: dark" in text
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == [
        "x2: the same place by each method",
        "x4: the same place by each method",
        "x4: what each teacher&#39;s encoder extracts",
        "How it was made",
    ]
    assert "teacher of Ours, less bicubic" in text
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 2 * (3 + 2) + 3 + 4  # with how far bicubic and the run are from HR
    assert text.count('<svg class="chart"') == 2
    assert {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures} == {
        (32, 32),
        (20, 16),
        (8, 8),
    }
    assert main([*words, "--images", str(photographs), "--out", str(page), "--pictures", "1"]) == 0  # its own page


def test_best_weights_on_request(runs: Path, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no best weights yet"):
        open_candidates([str(runs / "dssd-x4-00000000")], "best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda r: ["--crop", "p0:1,2"], r"--crop p0:1,2: expected IMAGE:TOP,LEFT,SIDE"),
        (lambda r: ["--crop", "p0:1,2,3"], "a side of 3 is too small; use 8"),
        (lambda r: ["--side", "4"], "--side 4: too small"),
        (lambda r: ["--out", str(r)], "is a folder; name the page"),
        (lambda r: [f"A={r / 'fsrcnn-x2-00000000'}", f"A={r / 'dssd-x4-00000000'}"], "two are called A"),
        (lambda r: [str(r / "nothing")], "no such run folder or checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line(
    runs: Path, photographs: Path, tmp_path: Path, arguments: Callable[[Path], list[str]], message: str
) -> None:
    command = [str(runs / "dssd-x4-00000000"), *arguments(runs), "--images", str(photographs)]
    with pytest.raises(UserError, match=message):
        main([*command, *([] if "--out" in command else ["--out", str(tmp_path / "page.html")])])
    assert not (tmp_path / "page.html").exists()


def test_nobody_elses_page_is_replaced(runs: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match="is not a report"):
        main([str(runs / "dssd-x4-00000000"), "--images", str(photographs), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text() == "mine"


def test_labels_and_places_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_label("DSSD=runs/a") == ("DSSD", Path("runs/a"))
    assert split_label("runs/a") == (None, Path("runs/a"))
    (tmp_path / "a=b").mkdir()
    assert split_label("a=b") == (None, Path("a=b"))
    assert parse_crop("my:photo:1,2,30") == Wanted("my:photo", 1, 2, 30)


def test_the_parser_needs_no_torch() -> None:
    import subprocess

    code = "import sys; from hpcdistill import figures; figures._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert figures.SMALLEST_CROP == 8
