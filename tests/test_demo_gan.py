"""The GAN demo: end to end with a handful of steps, its pairs, and the words that it puts on numbers."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from phone import needs_chromium, sideways
from PIL import Image

from hpcdistill import demo_gan
from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import Cost
from hpcdistill.models.registry import load_generator
from hpcdistill.models.vgg import load_vgg16
from hpcdistill.sweep.demos import shape_pairs
from hpcdistill.sweep.demos.base import Measured, resolve
from hpcdistill.sweep.demos.shape_pairs import (
    COLOURS,
    RADII,
    FlatColour,
    Shape,
    drawn,
    mean_colour,
    painted,
    pairs_of,
    some_shapes,
    write_pairs,
    write_random_vgg16,
)
from hpcdistill.sweep.demos.translation import VARIANT, training_arguments
from hpcdistill.sweep.demos.translation_page import verdict
from hpcdistill.sweep.demos.translation_story import CONFIG, ROWS, solved

STEPS = 2
COMMAND = ["--out", "out/gan", "--steps", str(STEPS)]
COUNTS = {"train": 16, "test": 12}  # the demo's pictures, but for their number


@pytest.fixture(scope="module", autouse=True)
def few_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_pairs, "COUNTS", COUNTS)
        pairs_of.cache_clear()
        yield
    pairs_of.cache_clear()


@pytest.fixture(scope="module")
def finished(few_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `demo_gan --steps 2` has run, from outside the clone."""
    folder = tmp_path_factory.mktemp("demo-gan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("HPCDISTILL_DATA", raising=False)
        assert demo_gan.main(COMMAND) == 0
        yield folder


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """results.json's rows by name."""
    return {row["name"]: row for row in json.loads((folder / "out/gan/results.json").read_text())["rows"]}


def pairs_on_disk(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The test pairs as Pillow reads them: drawing and painting."""
    found = {}
    for path in sorted((folder / "out/gan/pairs/test").glob("*.png")):
        pixels = np.asarray(Image.open(path))
        found[path.stem] = pixels[:, :64], pixels[:, 64:]
    return found


def translated(folder: Path, role: str) -> dict[str, np.ndarray]:
    """What the last weights make of the test drawings, 8 bits, with no part of the evaluator."""
    (run,) = (folder / "out/gan").glob("demo-gan-*")
    generator = load_generator(run / f"generators/last/{role}.safetensors")[0].eval()
    found = {}
    for name, (drawing, _) in pairs_on_disk(folder).items():
        with torch.no_grad():
            output = generator(torch.tensor(drawing.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32))[0]
        found[name] = ((output.numpy().transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).round()
    return found


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((image.astype(float) - reference.astype(float)) ** 2))


def levels(image: np.ndarray, reference: np.ndarray) -> float:
    return float(np.mean(np.abs(image.astype(float) - reference.astype(float))))


def test_the_pairs_are_drawings_beside_paintings(finished: Path) -> None:
    pairs = pairs_on_disk(finished)
    assert len(pairs) == COUNTS["test"]
    for drawing, painting in pairs.values():
        assert drawing.shape == painting.shape == (64, 64, 3)
        assert (drawing == drawing[:, :, :1]).all()
    trained = {path.read_bytes() for path in (finished / "out/gan/pairs/train").glob("*.png")}
    assert len(trained) == COUNTS["train"]
    assert trained.isdisjoint(path.read_bytes() for path in (finished / "out/gan/pairs/test").glob("*.png"))


# How far a pixel's centre is outside a shape of radius 20 around (32, 32), by hand: the square's half side is 14, the
# triangle's inner circle has radius 10, its corners lie 20 from the middle, the first one straight above.
@pytest.mark.parametrize(
    ("kind", "row", "column", "outside"),
    [
        ("disc", 31, 51, math.hypot(19.5, 0.5) - 20),
        ("disc", 12, 12, math.hypot(19.5, 19.5) - 20),
        ("square", 31, 45, 13.5 - 14),
        ("square", 17, 20, 14.5 - 14),
        ("triangle", 42, 32, 10.5 - 10),
        ("triangle", 41, 20, 9.5 - 10),
        ("triangle", 11, 31, 0.5 * math.cos(math.radians(30)) + 20.5 * math.sin(math.radians(30)) - 10),
    ],
)
def test_how_far_a_pixel_is_from_an_outline(kind: Any, row: int, column: int, outside: float) -> None:
    shape = Shape(kind, 32, 32, 20)
    assert shape.distance()[row, column] == pytest.approx(outside)
    assert shape.distance(3)[row, column] == pytest.approx(Shape(kind, 35, 35, 20).distance()[row, column])
    # The ink goes from full at the outline to none 1.2 pixels off.
    grey = 255 * (1 - min(max(1.2 - abs(outside), 0), 1))
    assert drawn([shape])[row, column].tolist() == [math.floor(grey + 0.5)] * 3


def test_a_painting_has_the_kinds_colour_the_light_and_the_shadow() -> None:
    shape = Shape("square", 32, 32, 20)
    painting = painted([shape]).astype(float)
    middle = painting[31:33, 31:33].mean(axis=(0, 1))
    assert middle == pytest.approx(np.array(COLOURS["square"]) * 0.85, abs=2)
    assert (painting[20, 20] > middle).all()
    assert (painting[43, 43] < middle).all()
    assert painting[0, 0].tolist() == [235, 228, 214]
    assert painting[63, 0].tolist() == [185, 178, 164]
    assert (painting[32, 47] < painting[32, 16] - 30).all()  # right of it in the shadow, left of it in the light
    # A ball shines at the upper left, where no other kind does.
    ball = painted([Shape("disc", 32, 32, 20)]).astype(float)
    assert ball[25, 25].min() > 150 > COLOURS["disc"][1]


def test_shapes_lie_side_by_side_inside_the_picture() -> None:
    found = [some_shapes(np.random.default_rng(seed)) for seed in range(40)]
    assert {shape.kind for shapes in found for shape in shapes} == set(COLOURS)
    assert {len(shapes) for shapes in found} >= {2, 3}
    for shapes in found:
        for place, shape in enumerate(shapes):
            inside = shape.distance() < 0
            rows, columns = np.nonzero(inside)
            assert RADII[0] <= shape.radius <= RADII[1]
            assert np.hypot(columns + 0.5 - shape.x, rows + 0.5 - shape.y).max() <= shape.radius
            assert not inside[[0, -1]].any()
            assert not inside[:, [0, -1]].any()
            for other in shapes[:place]:
                assert not (inside & (other.distance() < 0)).any()


def test_the_rows_are_the_last_weights_on_the_test_drawings(finished: Path) -> None:
    pairs, rows = pairs_on_disk(finished), results(finished)
    assert list(rows) == ["flat", "drawing", "teacher", "student"]
    made = {role: translated(finished, role) for role in ("teacher", "student")}
    made["drawing"] = {name: drawing for name, (drawing, _) in pairs.items()}
    for name, pictures in made.items():
        wanted = [decibels(pictures[pair], painting) for pair, (_, painting) in pairs.items()]
        assert rows[name]["psnr"] == pytest.approx(np.mean(wanted), abs=2e-3)
        wanted = [levels(pictures[pair], painting) for pair, (_, painting) in pairs.items()]
        assert rows[name]["l1"] == pytest.approx(np.mean(wanted), abs=0.01)
        assert rows[name]["pictures"] == COUNTS["test"]
    near = [decibels(made["student"][pair], made["teacher"][pair]) for pair in pairs]
    assert rows["student"]["to_teacher"]["psnr"] == pytest.approx(np.mean(near), abs=0.02)
    near = [levels(made["student"][pair], made["teacher"][pair]) for pair in pairs]
    assert rows["student"]["to_teacher"]["l1"] == pytest.approx(np.mean(near), abs=0.01)
    assert rows["teacher"]["to_teacher"] is None


def test_the_baseline_is_the_mean_colour_of_what_was_trained_on(finished: Path) -> None:
    paths = (finished / "out/gan/pairs/train").glob("*.png")
    colour = np.mean([np.asarray(Image.open(path))[:, 64:].mean(axis=(0, 1)) for path in paths], axis=0).round()
    wanted = [decibels(np.broadcast_to(colour, b.shape), b) for _, b in pairs_on_disk(finished).values()]
    assert results(finished)["flat"]["psnr"] == pytest.approx(np.mean(wanted), abs=2e-3)
    flat = FlatColour(mean_colour([np.full((2, 3, 3), 51, np.uint8)]))
    assert torch.allclose(flat(torch.zeros(2, 3, 4, 5)), torch.tensor(51 / 127.5 - 1))


def test_the_same_metric_is_in_the_runs_own_log(finished: Path) -> None:
    (run,) = (finished / "out/gan").glob("demo-gan-*")
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == STEPS
    for name in ("teacher", "student"):
        measured = results(finished)[name]["psnr"]
        assert result["last"]["metrics"][f"{name}/shapes/psnr"] == pytest.approx(measured, abs=1e-9)


def test_the_page_shows_what_was_measured(finished: Path) -> None:
    html = (finished / "out/gan/report/index.html").read_text(encoding="utf-8")
    for row in results(finished).values():
        assert f">{row['psnr']:.2f}<" in html
        assert f">{row['l1']:.1f}<" in html
        if row["params"]:
            assert f">{row['params']:,}<" in html
            assert f">{row['macs'] / 1e9:.3f} G<" in html
    # fesd.md's table: the U-Net of base width 64 and the paper's student at 256x256.
    assert re.search(r">3,404,\d{3}<", html)
    assert re.search(r">54,41\d,\d{3}<", html)
    assert ">1.219 G<" in html
    assert html.count("data:image/jpeg") == 2
    assert html.count("data:image/png") == 4 * (8 + 4)  # drawing, teacher, student, painting
    words = " ".join(html.replace("&#39;", "'").split())
    assert "The task is NOT solved after 2 steps" in words
    assert "Nothing is shown about photographs" in words
    assert "Nor is it shown that a teacher is needed" in words
    assert "4,982,500 pairs of 256x256 pixels, this one showed 16 of 64x64" in words
    for term in ("reconstruction", "L_dcd", "L_spectral", "fooling", "spectral classifier"):
        assert term.lower() in html.lower()
    assert "has random filters and was never trained" in html
    assert "100 times the paper's weight" in words
    assert not re.search(r"https?:|<script", html)
    assert str(finished) not in html


def test_the_pictures_on_the_page_are_the_networks(finished: Path) -> None:
    html = (finished / "out/gan/report/index.html").read_text(encoding="utf-8")
    pairs = pairs_on_disk(finished)
    made = {role: translated(finished, role) for role in ("teacher", "student")}
    shown = re.findall(r'base64,([^"]*)" alt="test, number ([\d-]+): (Drawing|Teacher|Student|Painting)"', html)
    assert len(shown) == 4 * 8
    for address, name, label in shown:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(address)))).astype(int)
        wanted = {"Drawing": pairs[name][0], "Painting": pairs[name][1]}.get(label)
        if wanted is None:
            wanted = made[label.lower()][name]
        assert np.abs(picture - wanted).max() <= (1 if label.lower() in made else 0)
    # The two that the student did worst close the list, the very worst at the end.
    quality = {name: decibels(made["student"][name], painting) for name, (_, painting) in pairs.items()}
    order = list(dict.fromkeys(name for _, name, _ in shown))
    assert order[-2:] == sorted(quality, key=lambda name: -quality[name])[-2:]


def test_the_same_command_again_uses_what_is_finished(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (before,) = finished.glob("out/gan/*/result.json")
    changed, rows = before.stat().st_mtime_ns, results(finished)
    capsys.readouterr()
    assert demo_gan.main(COMMAND) == 0
    errors = capsys.readouterr().err
    assert "has finished already" in errors
    assert errors.count("nothing to do") == 2
    assert [path.stat().st_mtime_ns for path in finished.glob("out/gan/*/result.json")] == [changed]
    assert results(finished) == rows


def test_a_damaged_pair_is_made_again_and_a_foreign_image_refused(tmp_path: Path) -> None:
    assert write_pairs(tmp_path)
    assert not write_pairs(tmp_path)
    victim = next((tmp_path / "test").glob("*.png"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-5])
    assert write_pairs(tmp_path)
    assert victim.read_bytes() == whole
    (tmp_path / "train" / "mine.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"mine\.png: is none of the demo's images"):
        write_pairs(tmp_path)


def test_fewer_steps_are_logged_and_evaluated_more_often(tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path / "a b", 40)
    config = resolve(arguments).config
    assert config.train.steps == 40
    assert config.train.log_every < 10
    assert config.seed == 0
    assert resolve(training_arguments(tmp_path, None, 7)).config.seed == 7
    assert config.runs == str(tmp_path / "a b")
    assert config.data.train == (str(tmp_path / "a b/packed/train"),)
    assert config.data.eval == {"shapes": str(tmp_path / "a b/packed/test")}


@pytest.mark.parametrize("name", ["123", "true", "1e5", "a: b", "runs/demo-gan", "with space/x", "x/y.yaml"])
def test_any_folder_may_be_the_output(name: str) -> None:
    loaded = resolve(training_arguments(Path(name), None))
    assert loaded.config.runs == name


def test_the_demo_is_fesd_as_printed_but_for_the_feature_losses_weight() -> None:
    full = resolve([CONFIG]).config.method
    small = resolve([CONFIG, VARIANT]).config.method
    names = ("student", "style", "dcd", "spectral", "reconstruction")
    for name in ("name", "family", "shift", "projection", "schedule", *(f"weight_{name}" for name in names)):
        assert getattr(small, name) == getattr(full, name)
    assert small.weight_feature == 100 * full.weight_feature  # type: ignore[attr-defined]


def test_the_untrained_vgg_is_vgg16_with_hes_weights(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "vgg.safetensors"
    assert write_random_vgg16(path)
    assert not write_random_vgg16(path)
    network = load_vgg16(path, ("relu1_2", "relu2_2"))
    first, deeper = network.features[0], network.features[7]
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 3)), rel=0.05)
    assert deeper.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert first.bias.abs().max() == 0
    path.write_bytes(b"half")
    assert write_random_vgg16(path)


def story(student: float, near: float, flat_near: float = 13.0) -> Any:
    """What `verdict` reads: PSNR of the student, and of student and flat colour to the teacher."""
    quality = {"flat": 14.0, "drawing": 9.0, "teacher": 22.0, "student": student}
    rows = [
        Measured(name, *ROWS[name], {"psnr": psnr}, ({"name": "2-0000", "psnr": psnr},), Cost(1, 2, 1))
        for name, psnr in quality.items()
    ]
    to_teacher = {"student": {"psnr": near, "l1": 4.0}, "flat": {"psnr": flat_near, "l1": 30.0}}
    return SimpleNamespace(rows=rows, to_teacher=to_teacher, stage=SimpleNamespace(steps=2000))


def test_the_verdict_says_what_is_shown_and_what_is_not() -> None:
    lines = verdict(story(20.5, 25.0))
    assert lines[0].startswith(
        "The task is solved after 2,000 steps: the student is 6.50 dB above one flat colour, the"
    )
    assert "25.00 dB (4.0 levels) from the teacher's, the flat colour is 13.00 dB (30.0 levels)" in lines[0]
    assert "Nothing is shown about photographs, about FESD against another method, or about FID" in lines[1]
    lines = verdict(story(13.5, 25.0))
    assert lines[0].startswith("The task is NOT solved after 2,000 steps: the student is 0.50 dB below one flat colour")
    assert "So nothing is shown of learning" in lines[1]


@pytest.mark.parametrize(
    ("student", "near", "is_solved"), [(16.0, 15.0, True), (15.9, 25.0, False), (20.0, 14.9, False)]
)
def test_a_task_is_solved_by_two_decibels_beside_painting_and_teacher(
    student: float, near: float, is_solved: bool
) -> None:
    assert solved(story(student, near)) is is_solved


@needs_chromium
def test_the_page_fits_a_phone(finished: Path, tmp_path: Path) -> None:
    assert sideways((finished / "out/gan/report/index.html").read_text(encoding="utf-8"), tmp_path) == 0
