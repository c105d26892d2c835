"""Figures of networks that translate: the pixels are the networks' own, at the places and images that the rules say."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from phone import needs_chromium, sideways
from PIL import Image
from safetensors.torch import load_file, save_file
from test_report import Strict
from torch import nn

from hpcdistill.data.index import index_digest
from hpcdistill.deploy.candidates import Candidate, open_candidates
from hpcdistill.errors import UserError
from hpcdistill.figures import main
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.unet_generator import UNetGenerator
from hpcdistill.sweep.crop import Wanted
from hpcdistill.sweep.report import Crops, Table, Text
from hpcdistill.sweep.translation_figures import TranslationFigures, with_teachers_beside
from hpcdistill.sweep.translation_page import translation_page, translation_picture
from hpcdistill.sweep.translation_scores import score_of

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the support modules of the data tests
from packed_sets import noise, write_set

SIDE = 16
BUSY = [(8, 24), (16, 0), (0, 8), (32, 16), (24, 32)]  # of each image of domain a: where its noise is
Rgb = NDArray[np.uint8]


def busy_at(top: int, left: int, seed: int, size: int = 48) -> Rgb:
    """A flat picture with noise in 16x16 pixels."""
    image = np.full((size, size, 3), 90 + seed, np.uint8)
    image[top : top + SIDE, left : left + SIDE] = noise(SIDE, SIDE, seed)
    return image


A = [busy_at(top, left, seed) for seed, (top, left) in enumerate(BUSY)]
B = [noise(48, 48, 50 + seed) for seed in range(3)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of domain a and three of b, 48x48."""
    folder = tmp_path_factory.mktemp("set") / "toy" / "test"
    write_set(folder, "unpaired", [{"a.png": image} for image in A] + [{"b.png": image} for image in B])
    return folder


def run_folder(
    runs: Path, name: str, networks: dict[str, nn.Module], images: Path, *, data: str = "one", **values: Any
) -> Path:
    """A finished run as training leaves it: FID 61.25 at best, 65.5 at last, of the first network."""
    folder = runs / f"{name}-00000000"
    for which in ("best", "last"):
        (folder / "generators" / which).mkdir(parents=True)
        for role, network in networks.items():
            save_generator(network, folder / "generators" / which / f"{role}.safetensors")
    role = next(iter(networks))
    result: dict[str, Any] = {
        "name": name,
        "best": {"step": 5, "metrics": {f"{role}/toy/fid": 61.25}},
        "last": {"step": 9, "metrics": {f"{role}/toy/fid": 65.5}},
        "evaluations": 7,
        "protocol": {"selects": f"{role}/toy/fid", "real": "test", "note": "FID of a test; real side test"},
    }
    (folder / "result.json").write_text(json.dumps(result | values))
    identity = {"data": [data], "selection": index_digest(images) if data == "one" else "another"}
    (folder / "environment.json").write_text(json.dumps({"identity": identity}))
    settings = {"data": {"crop": 48, "direction": "AtoB", "train": data, "eval": {"toy": str(images)}}, "eval": {}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


def resnet(seed: int) -> ResNetGenerator:
    torch.manual_seed(seed)
    return ResNetGenerator(ngf=2, blocks=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """CycleGAN in both directions; a student with its teachers; a U-Net of another data set, at 64 pixels."""
    runs = tmp_path_factory.mktemp("runs")
    run_folder(runs, "original", {"generator": resnet(1), "generator_b2a": resnet(2)}, images)
    students = {"student": resnet(3), "teacher": resnet(4), "teacher_b2a": resnet(5)}
    run_folder(runs, "fesd", students, images)
    run_folder(runs, "shoes", {"generator": UNetGenerator(ngf=2, levels=4)}, images, data="other")
    return runs


def by_hand(file: Path, image: Rgb) -> Rgb:
    """The network's 8-bit output, with no part of the evaluator."""
    network = load_generator(file)[0].eval()
    given = torch.tensor(image.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        output = network(given)[0].double().numpy().transpose(1, 2, 0)
    return np.rint(np.clip((output + 1) * 127.5, 0, 255)).astype(np.uint8)


def last(runs: Path, name: str, role: str) -> Path:
    return runs / f"{name}-00000000" / "generators" / "last" / f"{role}.safetensors"


def opened(runs: Path, *names: str) -> list[Candidate]:
    return open_candidates([str(runs / f"{name}-00000000") for name in names], "last")


def figures(images: Path, candidates: Sequence[Candidate], **options: Any) -> TranslationFigures:
    return TranslationFigures(candidates, images, **({"side": SIDE, "pictures": 2} | options))


def times_in(picture: Rgb, tile: Rgb) -> int:
    """How often the tile stands in the picture, to the last bit."""
    height, width = tile.shape[:2]
    corners = np.argwhere((picture[: 1 - height, : 1 - width] == tile[0, 0]).all(axis=-1))
    found = (picture[top : top + height, left : left + width] for top, left in corners)
    return sum(np.array_equal(piece, tile) for piece in found)


def test_pictures_are_the_networks_outputs_to_the_last_bit(images: Path, runs: Path) -> None:
    """In the order given: the input, CycleGAN's a to b, the student; images 0 and 2 of 5 are spread evenly."""
    found = figures(images, opened(runs, "original", "fesd")).rows[False]
    assert [(shown.place.number, shown.place.name) for shown in found] == [(0, "image0"), (2, "image2")]
    for shown, source in zip(found, (A[0], A[2]), strict=True):
        labels, pictures = zip(*((label, image) for label, image, *_ in shown.pictures), strict=True)
        assert labels == ("input", "original", "fesd")
        np.testing.assert_array_equal(pictures[0], source)
        files = (last(runs, "original", "generator"), last(runs, "fesd", "student"))
        for picture, file in zip(pictures[1:], files, strict=True):
            expected = by_hand(file, source)
            assert (picture != expected).mean() < 1e-3  # ties of rounding
            assert np.abs(picture.astype(int) - expected).max() <= 1


def test_the_place_is_where_the_input_has_most_contrast(images: Path, runs: Path) -> None:
    found = figures(images, opened(runs, "fesd"), pictures=5).rows[False]
    assert [shown.place.box for shown in found] == [(top, left, SIDE, SIDE) for top, left in BUSY]


def test_the_picture_has_all_magnified_by_whole_factors(images: Path, runs: Path) -> None:
    """48 pixels take 192, 4 times; a place of 16 is as wide, 12 times. The line around it is outside, in the input."""
    made = figures(images, opened(runs, "original", "fesd"))
    picture = translation_picture(made)
    for shown in made.rows[False]:
        top, left, *_ = shown.place.box
        for column, (_, image, *_) in enumerate(shown.pictures):
            place = image[top : top + SIDE, left : left + SIDE]
            assert times_in(picture, np.kron(place, np.ones((12, 12, 1), np.uint8))) == 1
            whole = np.kron(image, np.ones((4, 4, 1), np.uint8))
            assert times_in(picture, whole) == (0 if column == 0 else 1)
            inner = np.kron(place, np.ones((4, 4, 1), np.uint8))
            assert times_in(picture, inner) >= 1


def test_the_page_shows_whole_and_magnified(images: Path, runs: Path) -> None:
    made = figures(images, opened(runs, "original", "fesd"))
    page = translation_page(made, "last", "python -m ...")
    first = page.sections[0]
    assert first.title == "A to B: 2 of 5 images"
    crops = [block for block in first.blocks if isinstance(block, Crops)]
    for block, shown in zip(crops, made.rows[False], strict=True):
        top, left, *_ = shown.place.box
        whole, magnified = block.views
        for one, other, (_, image, *_) in zip(whole.crops, magnified.crops, shown.pictures, strict=True):
            np.testing.assert_array_equal(one.image, image)
            np.testing.assert_array_equal(other.image, image[top : top + SIDE, left : left + SIDE])
        percent = {"top": top / 0.48, "left": left / 0.48, "height": 100 / 3, "width": 100 / 3}
        assert block.frame(magnified) == pytest.approx(percent, abs=1e-3)
    (table,) = [block for block in first.blocks if isinstance(block, Table)]
    assert table.caption == "A to B: FID of the whole set, as the runs measured it"
    assert table.columns == ("Method", "Best", "Last", "Evaluations", "Parameters", "MACs")
    assert [row.cells[:4] for row in table.rows] == [
        ("original", "61.25", "65.50", "7"),
        ("fesd", "61.25", "65.50", "7"),
    ]
    parameters = sum(tensor.numel() for tensor in load_file(last(runs, "fesd", "student")).values())
    assert table.rows[1].cells[4] == f"{parameters:,}"


def test_both_directions_where_a_run_has_both(images: Path, runs: Path) -> None:
    """B has three images: 0 and 1. The student has no way back, its teacher has."""
    made = figures(images, with_teachers_beside(opened(runs, "original", "fesd"), "last"))
    assert [method.label for method in made.methods(False)] == ["original", "teacher of fesd", "fesd"]
    assert [method.label for method in made.methods(True)] == ["original", "teacher of fesd"]
    back = made.rows[True]
    assert [shown.place.number for shown in back] == [0, 1]
    np.testing.assert_array_equal(back[1].pictures[0][1], B[1])
    files = [last(runs, "original", "generator_b2a"), last(runs, "fesd", "teacher_b2a")]
    for (_, picture, *_), file in zip(back[1].pictures[1:], files, strict=True):
        assert np.abs(picture.astype(int) - by_hand(file, B[1])).max() <= 1
    forth = made.rows[False][0].pictures[2][1]
    assert np.abs(forth.astype(int) - by_hand(last(runs, "fesd", "teacher"), A[0])).max() <= 1
    titles = [section.title for section in translation_page(made, "last", "").sections]
    assert titles == ["A to B: 2 of 5 images", "B to A: 2 of 3 images", "How it was made"]


def test_a_teacher_for_each_direction_is_shown_from_a_to_b(images: Path, runs: Path, tmp_path: Path) -> None:
    """Wavelet KD's: result.json names them by role."""
    shutil.copytree(runs / "original-00000000", tmp_path / "original-00000000")
    taught = {"teacher": None, "teachers": {"ba": "nobody-00000000", "ab": "original-00000000"}}
    run_folder(tmp_path, "wavelet", {"student": resnet(6), "student_b2a": resnet(7)}, images, **taught)
    found = with_teachers_beside(opened(tmp_path, "wavelet"), "last")
    assert [(one.label, one.path) for one in found] == [
        ("teacher of wavelet", last(tmp_path, "original", "generator")),
        ("wavelet", last(tmp_path, "wavelet", "student")),
    ]


def test_btoa_exchanges_the_domains(images: Path, runs: Path) -> None:
    made = figures(images, opened(runs, "fesd"), direction="BtoA")
    np.testing.assert_array_equal(made.rows[False][0].pictures[0][1], B[0])
    assert made.title(False) == "B to A"


def test_named_images_and_places(images: Path, runs: Path) -> None:
    """A name or a number; what is in one direction alone is shown there, and a number in both."""
    both = opened(runs, "original")
    made = figures(images, both, crops=[Wanted("image4", 1, 2, 10)], shown=["image5", "1"])
    places = {
        backwards: [(shown.place.number, shown.place.box) for shown in rows] for backwards, rows in made.rows.items()
    }
    assert places[False] == [(4, (1, 2, 10, 10)), (1, (16, 0, SIDE, SIDE))]
    assert [number for number, _ in places[True]] == [0, 1]  # image5 is b's first
    only = figures(images, both, shown=["image5"])
    assert list(only.rows) == [True]


def test_a_target_stands_beside_the_input_of_a_pair(tmp_path: Path) -> None:
    pairs = [np.concatenate([noise(48, 48, seed), noise(48, 48, 20 + seed)], axis=1) for seed in range(2)]
    write_set(tmp_path / "pairs", "paired", [{"ab.png": pair} for pair in pairs])
    save_generator(UNetGenerator(ngf=2, levels=4), tmp_path / "unet.safetensors")
    made = TranslationFigures(open_candidates([str(tmp_path / "unet.safetensors")]), tmp_path / "pairs", size=48)
    assert [[label for label, *_ in shown.pictures] for shown in made.rows[False]] == [["input", "target", "unet"]] * 2
    np.testing.assert_array_equal(made.rows[False][1].pictures[1][1], pairs[1][:, 48:])


def test_pictures_of_any_program_are_a_column(images: Path, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for number in range(5):
        Image.fromarray(noise(48, 48, 70 + number)).save(tmp_path / "theirs" / f"image{number}_fake.png")
    candidates = open_candidates([str(runs / "original-00000000"), str(tmp_path / "theirs")], "last")
    made = figures(images, candidates)
    np.testing.assert_array_equal(made.rows[False][1].pictures[2][1], noise(48, 48, 72))
    assert [method.label for method in made.methods(True)] == ["original"]
    alone = TranslationFigures(candidates[1:], images)
    assert alone.size == 48


def test_images_are_resized_as_in_training(images: Path, runs: Path) -> None:
    """Pillow's bicubic to 32x32."""
    made = figures(images, opened(runs, "fesd"), size=32)
    expected = np.asarray(Image.fromarray(A[0]).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(made.rows[False][0].pictures[0][1], expected)


def test_what_a_run_says_of_itself(images: Path, runs: Path, tmp_path: Path) -> None:
    """By the digest of the set that chose its weights, else by where data.eval has a set of that digest."""
    file, digest = last(runs, "original", "generator"), index_digest(images)
    score = score_of(file, digest)
    assert score is not None
    assert (score.metric, score.numbers) == ("FID", "61.25 best of 7, 65.50 last")
    assert score_of(last(runs, "original", "generator_b2a"), digest) is None  # not measured
    assert score_of(file, "other images") is None
    environment = runs / "original-00000000" / "environment.json"
    before = environment.read_text()
    environment.write_text(json.dumps({"identity": {"selection": "moved"}}))
    assert score_of(file, digest) == score
    environment.write_text(before)
    save_generator(resnet(0), tmp_path / "alone.safetensors")
    assert score_of(tmp_path / "alone.safetensors", digest) is None
    half = run_folder(tmp_path, "half", {"student": resnet(0)}, images, last=None, evaluations=1)
    found = score_of(half / "generators/last/student.safetensors", digest)
    assert found is not None
    assert found.numbers == "61.25 best of 1"
    (half / "result.json").unlink()
    assert score_of(half / "generators/last/student.safetensors", digest) is None


def test_numbers_of_different_protocols_are_flagged(images: Path, runs: Path, tmp_path: Path) -> None:
    protocol = {"selects": "student/toy/fid", "real": "train+test", "note": "FID; real side train+test"}
    run_folder(tmp_path, "other", {"student": resnet(6)}, images, protocol=protocol)
    page = translation_page(figures(images, [*opened(runs, "fesd"), *opened(tmp_path, "other")]), "last", "")
    said = [block for block in page.sections[0].blocks if isinstance(block, Text) and block.tone == "caution"]
    assert ["do not compare" in paragraph for text in said for paragraph in text.paragraphs] == [True]
    alike = translation_page(figures(images, opened(runs, "fesd", "original")), "last", "")
    assert not [block for block in alike.sections[0].blocks if isinstance(block, Text) and block.tone == "caution"]


# From the command line.


def test_the_command_writes_a_page_and_a_picture(images: Path, runs: Path, tmp_path: Path) -> None:
    """Well-formed, alone; the page's pictures decode; the same command again replaces its own files."""
    out = tmp_path / "new" / "page.html"
    command = [f"Theirs={runs / 'original-00000000'}", str(runs / "fesd-00000000"), "--teachers"]
    command += ["--images", str(images), "--out", str(out), "--pictures", "1", "--side", "16"]
    assert main(command) == 0
    text = out.read_text()
    parsed = Strict(text)
    assert not parsed.all("script")
    addresses = [attributes.get(name) or "data:" for _, attributes in parsed.elements for name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["A to B: 1 of 5 images", "B to A: 1 of 3 images", "How it was made"]
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 2 * 4 + 2 * 3
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]
    assert set(sizes) == {(48, 48), (16, 16)}
    assert "FID 61.25 best of 7, 65.50 last" in text
    before = (tmp_path / "new" / "page.png").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "new" / "page.png").read_bytes() == before


@needs_chromium
def test_the_page_fits_a_phone(images: Path, runs: Path, tmp_path: Path) -> None:
    """With labels and scores longer than a picture is wide there."""
    command = [f"{'Long' * 20}={runs / 'original-00000000'}", str(runs / "fesd-00000000"), "--images", str(images)]
    assert main([*command, "--teachers", "--out", str(tmp_path / "page.html")]) == 0
    assert sideways((tmp_path / "page.html").read_text(), tmp_path / "phone") <= 0


def refused(runs: Path, tmp: Path) -> dict[str, list[str]]:
    """A message, and what is wrong in a command that would otherwise be right."""
    fesd, sr = str(runs / "fesd-00000000"), str(tmp / "sr.safetensors")
    shoes = str(runs / "shoes-00000000")
    return {
        "sr enlarges them; compare those of one kind": [fesd, sr],
        "fesd is of one and shoes of other: networks of different data sets": [fesd, shoes],
        "--show imgae1: no such image; did you mean 'image1'": [fesd, "--show", "imgae1"],
        "--show 5: there are 5 images; the last is number 4": [fesd, "--show", "5"],
        "leads out of the image of 48x48": [fesd, "--crop", "image1:40,0,16"],
        "--scale 2: fesd translates images and enlarges none": [fesd, "--scale", "2"],
        "fesd: --size 50: .*multiples of 4": [fesd, "--size", "50"],
        "end it in .html": [fesd, "--out", str(tmp / "page.png")],
        "input: the input image is called so": [f"input={fesd}"],
        "--teachers: none of these is a student": [str(runs / "original-00000000"), "--teachers"],
        "--side 4: too small": [fesd, "--side", "4"],
        "leave it out for super-resolution": [sr, "--teachers"],
    }


@pytest.mark.parametrize("case", range(12))
def test_what_cannot_be_is_one_line(case: int, images: Path, runs: Path, tmp_path: Path) -> None:
    save_generator(FSRCNN(2), tmp_path / "sr.safetensors")
    message, words = list(refused(runs, tmp_path).items())[case]
    words += [] if "--out" in words else ["--out", str(tmp_path / "page.html")]
    with pytest.raises(UserError, match=message) as error:
        main([*words, "--images", str(images)])
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sr.safetensors"]


@pytest.mark.parametrize(("key", "value"), [("crop", 64), ("direction", "BtoA")])
def test_runs_that_were_made_for_other_pictures(key: str, value: Any, images: Path, runs: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path, "other", {"student": resnet(6)}, images)
    settings = json.loads((other / "config.yaml").read_text())
    settings["data"][key] = value
    (other / "config.yaml").write_text(json.dumps(settings))
    candidates = [*opened(runs, "fesd"), *opened(tmp_path, "other")]
    option = {"crop": "size"}.get(key, key)
    with pytest.raises(UserError, match=f"fesd has {option} .* and other {value}; say with --{option}"):
        figures(images, candidates)
    assert figures(images, candidates, size=48, direction="AtoB").size == 48


def test_a_diverged_network_is_named(images: Path, runs: Path, tmp_path: Path) -> None:
    file = run_folder(tmp_path, "nan", {"student": resnet(6)}, images) / "generators" / "last" / "student.safetensors"
    tensors = load_file(file)
    notes = file.read_bytes()
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    header = json.loads(notes[8 : 8 + int.from_bytes(notes[:8], "little")])
    save_file(tensors, file, header["__metadata__"])
    with pytest.raises(UserError, match="nan: image0: the generator's output is not finite"):
        _ = figures(images, opened(tmp_path, "nan")).rows


def test_nobody_elses_picture_is_replaced(images: Path, runs: Path, tmp_path: Path) -> None:
    Image.fromarray(A[0]).save(tmp_path / "page.png")
    before = (tmp_path / "page.png").read_bytes()
    with pytest.raises(UserError, match=r"page\.png is there, and was not saved by this command"):
        main([str(runs / "fesd-00000000"), "--images", str(images), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.png").read_bytes() == before
    assert not (tmp_path / "page.html").exists()
