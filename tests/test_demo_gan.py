"""The GAN demo: end to end with a handful of steps, its pairs, and the words that it puts on numbers."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

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
from hpcdistill.sweep.demos.base import Measured, resolve
from hpcdistill.sweep.demos.edge_pairs import (
    FlatColour,
    edge_drawing,
    mean_colour,
    pairs_of,
    photographs,
    write_pairs,
    write_random_vgg16,
)
from hpcdistill.sweep.demos.translation import CONFIG, GENERATORS, VARIANT, training_arguments, verdict

STEPS = 2
COMMAND = ["--out", "out/gan", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `demo_gan --steps 2` has run, from outside the clone."""
    folder = tmp_path_factory.mktemp("demo-gan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("HPCDISTILL_DATA", raising=False)
        assert demo_gan.main(COMMAND) == 0
        yield folder


def results(folder: Path) -> dict[str, dict[str, float]]:
    """results.json's rows by name."""
    return {row["name"]: row for row in json.loads((folder / "out/gan/results.json").read_text())["rows"]}


def tiles(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The test pairs as Pillow reads them: edges and photograph."""
    found = {}
    for path in sorted((folder / "out/gan/pairs/test").glob("*.png")):
        pixels = np.asarray(Image.open(path))
        found[path.stem] = pixels[:, :64], pixels[:, 64:]
    return found


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((image.astype(float) - reference.astype(float)) ** 2))


def test_the_pairs_are_tiles_of_the_photographs_beside_their_edges(finished: Path) -> None:
    pairs = tiles(finished)
    assert len(pairs) == 18  # three photographs of 192x128
    assert {name.split("-")[0] for name in pairs} == {"chelsea", "coffee", "rocket"}
    for edges, photograph in pairs.values():
        assert edges.shape == photograph.shape == (64, 64, 3)
        assert (edges == edges[:, :, :1]).all()
    # Side by side again they are the photograph that Pillow shrinks.
    source = next(source for source in photographs()["test"] if source.name.startswith("coffee"))
    small = np.asarray(Image.open(source.path).convert("RGB").resize((192, 128), Image.Resampling.LANCZOS))
    rows = [np.concatenate([pairs[f"coffee-128-{row}{column}"][1] for column in range(3)], axis=1) for row in (0, 1)]
    assert np.array_equal(np.concatenate(rows), small)


def test_a_step_in_brightness_is_drawn_as_a_dark_line_on_white() -> None:
    photograph = np.full((40, 200, 3), 40, np.uint8)
    photograph[:, 100:] = 200
    drawing = edge_drawing(photograph)
    assert (drawing[:, [99, 100]] == 0).all()
    assert (np.delete(drawing, [99, 100], axis=1) == 255).all()
    assert (edge_drawing(np.full((40, 40, 3), 90, np.uint8)) == 255).all()


def test_the_rows_are_the_last_weights_on_the_test_tiles(finished: Path) -> None:
    pairs, rows = tiles(finished), results(finished)
    assert list(rows) == ["flat", "teacher", "student"]
    (run,) = (finished / "out/gan").glob("demo-gan-*")
    for name in ("teacher", "student"):
        generator = load_generator(run / f"generators/last/{name}.safetensors")[0].eval()
        expected = []
        for edges, photograph in pairs.values():
            with torch.no_grad():
                output = generator(torch.tensor(edges.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32))[0]
            image = ((output.numpy().transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).round()
            expected.append(decibels(image, photograph))
        assert rows[name]["psnr"] == pytest.approx(np.mean(expected), abs=2e-3)
        assert rows[name]["tiles"] == 18


def test_the_baseline_is_the_mean_colour_of_what_was_trained_on(finished: Path) -> None:
    shrunk = [pair.photograph for source in photographs()["train"] for pair in pairs_of(source, "train")]
    colour = np.mean(np.concatenate([image.reshape(-1, 3) for image in shrunk]), axis=0).round()
    expected = np.mean([decibels(np.broadcast_to(colour, b.shape), b) for _, b in tiles(finished).values()])
    assert results(finished)["flat"]["psnr"] == pytest.approx(expected, abs=2e-3)
    flat = FlatColour(mean_colour([np.full((2, 3, 3), 51, np.uint8)]))
    assert torch.allclose(flat(torch.zeros(2, 3, 4, 5)), torch.tensor(51 / 127.5 - 1))


def test_the_same_metric_is_in_the_runs_own_log(finished: Path) -> None:
    (run,) = (finished / "out/gan").glob("demo-gan-*")
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == STEPS
    for name in ("teacher", "student"):
        measured = results(finished)[name]["psnr"]
        assert result["last"]["metrics"][f"{name}/tiles/psnr"] == pytest.approx(measured, abs=1e-9)


def test_the_page_shows_what_was_measured(finished: Path) -> None:
    html = (finished / "out/gan/report/index.html").read_text(encoding="utf-8")
    for row in results(finished).values():
        assert f">{row['psnr']:.2f}<" in html
        if row["params"]:
            assert f">{row['params']:,}<" in html
            assert f">{row['macs'] / 1e9:.3f} G<" in html
    # fesd.md's table: the U-Net of base width 64 and the paper's student at 256x256.
    assert re.search(r">3,404,\d{3}<", html)
    assert re.search(r">54,41\d,\d{3}<", html)
    assert ">1.219 G<" in html
    assert html.count("data:image/jpeg") == 3 + 2
    assert html.count("data:image/png") == 4 * (3 * 3 + 2)  # edges, teacher, student, photograph
    assert "proves nothing" in html
    assert "4,982,500 pairs of 256x256 pixels, this one showed 16 of 64x64" in " ".join(html.split())
    assert "public domain and CC0" in html
    for term in ("reconstruction", "L_dcd", "L_spectral", "fooling", "spectral classifier"):
        assert term.lower() in html.lower()
    assert "has random filters and was never trained" in html
    assert "ten times the paper's weight" in html.replace("&#39;", "'")
    assert not re.search(r"https?:|<script", html)
    assert str(finished) not in html


def test_the_pictures_on_the_page_are_the_students(finished: Path) -> None:
    html = (finished / "out/gan/report/index.html").read_text(encoding="utf-8")
    (run,) = (finished / "out/gan").glob("demo-gan-*")
    student = load_generator(run / "generators/last/student.safetensors")[0].eval()
    edges, shown = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(address))))
        for address in re.findall(r'base64,([^"]*)" alt="coffee, all of it: (?:Edges|Student)"', html)
    )
    assert edges.shape == (128, 192, 3)
    with torch.no_grad():
        output = student(torch.tensor(edges.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32))[0]
    expected = ((output.numpy().transpose(1, 2, 0) + 1) * 127.5).clip(0, 255)
    assert np.abs(shown - expected).max() < 0.51


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
    assert config.runs == str(tmp_path / "a b")
    assert config.data.train == (str(tmp_path / "a b/packed/train"),)
    assert config.data.eval == {"tiles": str(tmp_path / "a b/packed/test")}


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
    assert small.weight_feature == 10 * full.weight_feature  # type: ignore[attr-defined]


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


def row(name: str, psnr: float) -> Measured:
    return Measured(name, *GENERATORS[name], {"psnr": psnr}, ({"name": "a-128-00", "psnr": psnr},), Cost(1, 2, 1))


def test_the_verdict_claims_nothing() -> None:
    lines = verdict(
        [row("flat", 14), row("teacher", 15), row("student", 13.5)], 2000, {"train": "abcdef", "test": "xyz"}
    )
    assert lines[0].startswith(
        "After 2,000 steps the teacher is 1.00 dB above one flat colour and the student 0.50 dB below one flat colour"
    )
    assert "on 1 tiles of 3 photographs" in lines[0]
    assert "on 6 photographs proves nothing" in lines[1]


@needs_chromium
def test_the_page_fits_a_phone(finished: Path, tmp_path: Path) -> None:
    assert sideways((finished / "out/gan/report/index.html").read_text(encoding="utf-8"), tmp_path) == 0
