"""The demo: end to end with a handful of steps, and the words that it puts on numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from phone import needs_chromium, sideways

from hpcdistill import demo, demo_gan
from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import Cost
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.registry import save_generator
from hpcdistill.sweep.demos import super_resolution
from hpcdistill.sweep.demos.base import clock, compared, digits, resolve
from hpcdistill.sweep.demos.super_resolution import METHODS, Enlarged, middle, training_arguments, verdict

STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `demo --steps 3` has run, from outside the clone, beside a student that was trained longer."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    file = folder / "trained.safetensors"
    save_generator(FSRCNN(4), file, {"steps": 20000, "data": "images <of a test>", "licence": "none"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(super_resolution, "PRETRAINED", file)
        assert demo.main(["--out", "out/demo", "--steps", str(STEPS), "--data", "packed"]) == 0
        yield folder


def results(folder: Path) -> dict[str, dict[str, float]]:
    """results.json's rows by name."""
    return {row["name"]: row for row in json.loads((folder / "out/demo/results.json").read_text())["rows"]}


def test_results_have_the_rows_and_fields_that_are_promised(finished: Path) -> None:
    rows = results(finished)
    assert list(rows) == ["bicubic", "fsrcnn", "residual", "dssd", "trained"]
    for row in rows.values():
        assert isinstance(row["psnr"], float)
        assert isinstance(row["ssim"], float)
        assert all(isinstance(row[key], int) for key in ("params", "macs", "steps"))
        assert row["images"] == 3
    assert [row["steps"] for row in rows.values()] == [0, STEPS, STEPS, STEPS, 20000]


def test_costs_are_the_literatures(finished: Path) -> None:
    rows = results(finished)
    assert [rows["bicubic"][key] for key in ("params", "macs")] == [0, 0]
    # By hand, 320x180 pixels of LR: 5x5x56, 56x12, four times 3x3x12x12, 12x56; then 9x9x56 at each output pixel.
    lr = 320 * 180
    before = lr * (25 * 56 + 56 * 12 + 4 * 9 * 12 * 12 + 12 * 56)
    enlargement = {"residual": lr * 5 * (4 + 16), "dssd": lr * 5 * (4 + 16)}  # counted in what it really takes
    for name in ("fsrcnn", "residual", "dssd", "trained"):
        assert rows[name]["params"] == 12644
        assert rows[name]["macs"] == before + 1280 * 720 * 81 * 56
        assert rows[name]["true_macs"] == before + lr * 81 * 56 + enlargement.get(name, 0)


def test_bicubic_is_the_one_that_evaluate_measures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpcdistill.evaluate import main

    capsys.readouterr()
    assert main(["--baseline", "bicubic", "--scale", "4", "--data", "packed/photos/test", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    row = results(finished)["bicubic"]
    assert (row["psnr"], row["ssim"]) == (measured["psnr"], measured["ssim"])


def test_the_rows_are_the_last_weights(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpcdistill.evaluate import main

    for name, pattern in (("fsrcnn", "fsrcnn-x4-*"), ("residual", "fsrcnn-bicubic-x4-*"), ("dssd", "dssd-x4-*")):
        (run,) = (finished / "out/demo").glob(pattern)
        capsys.readouterr()
        assert main([str(run), "--which", "last", "--data", "packed/photos/test", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["psnr"] == results(finished)[name]["psnr"]
        assert json.loads((run / "result.json").read_text())["steps"] == STEPS


def test_the_page_shows_what_was_measured(finished: Path) -> None:
    html = (finished / "out/demo/report/index.html").read_text(encoding="utf-8")
    for row in results(finished).values():
        assert f">{row['psnr']:.2f}<" in html
        assert f">{row['ssim']:.4f}<" in html
    assert html.count("data:image/jpeg") == 3
    assert html.count("data:image/png") == 3 * 2 * 7  # photographs, crops of each, what is given to original
    assert "images &lt;of a test&gt;" in html
    assert "public domain and CC0" in html
    assert "says nothing about which of them is better" in html
    assert "runs=out/demo" in html
    assert not re.search(r"https?:|<script", html)
    assert str(finished) not in html


def test_the_same_command_again_uses_what_is_finished(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("out/demo/*/result.json")}
    assert len(before) == 4
    rows = results(finished)
    capsys.readouterr()
    assert demo.main(["--out", "out/demo", "--steps", str(STEPS), "--data", "packed"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("has finished already") == 3
    assert {path: path.stat().st_mtime_ns for path in finished.glob("out/demo/*/result.json")} == before
    assert results(finished) == rows
    assert "29.58" in captured.out  # bicubic's, in the table


def test_a_clone_without_the_trained_student_warns_and_leaves_its_row_out(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(super_resolution, "PRETRAINED", finished / "absent.safetensors")
    shutil.copytree(finished / "out/demo", finished / "without/out/demo")
    capsys.readouterr()
    assert demo.main(["--out", "without/out/demo", "--steps", str(STEPS), "--data", "packed"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "absent.safetensors" in warning
    assert list(results(finished / "without")) == ["bicubic", "fsrcnn", "residual", "dssd"]
    html = (finished / "without/out/demo/report/index.html").read_text(encoding="utf-8")
    assert "its row is missing" in html
    assert "trained for longer" not in html


def test_a_trained_student_that_does_not_say_its_steps_is_refused() -> None:
    assert super_resolution.trained_steps({"steps": 7}) == 7
    with pytest.raises(UserError, match="how many steps"):
        super_resolution.trained_steps({"data": "x"})


def test_fewer_steps_shorten_the_teacher_in_proportion(tmp_path: Path) -> None:
    full = resolve(training_arguments("dssd", Path("runs/demo"), None, None))
    short = resolve(training_arguments("dssd", tmp_path / "a b", 100, tmp_path))
    assert full.teacher is not None
    assert short.teacher is not None
    assert full.config.train.steps is not None
    assert short.config.train.steps == 100
    assert short.teacher.config.train.steps == round(100 * full.teacher.config.train.steps / full.config.train.steps)
    assert short.config.runs == short.teacher.config.runs == str(tmp_path / "a b")
    assert short.config.data.eval == {"photos": str(tmp_path / "photos/test")}
    assert short.config.data.train == (str(tmp_path / "photos/train"),)


@pytest.mark.parametrize("name", ["123", "true", "1e5", "a: b", "runs/demo", "with space/x", "x/y.yaml"])
def test_any_folder_may_be_the_output(name: str) -> None:
    loaded = resolve(training_arguments("fsrcnn", Path(name), None, None))
    assert loaded.config.runs == name


def test_the_students_have_as_many_steps_as_each_other_and_the_papers_recipe_a_million() -> None:
    steps = {
        resolve(training_arguments(name, Path("runs/demo"), None, None)).config.train.steps
        for name in super_resolution.CONFIGS
    }
    assert len(steps) == 1
    assert super_resolution.paper_steps() == 1_000_000


def row(name: str, psnr: float, steps: int = 10) -> Enlarged:
    image = {"name": "a", "psnr": psnr, "ssim": 0.5}
    return Enlarged(name, *METHODS[name], {"psnr": psnr, "ssim": 0.5}, (image,), Cost(1, 2, 1), steps, 1.0, ())


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (-2.346, "2.35 dB below bicubic"),
        (-0.06, "0.06 dB below bicubic"),
        (-0.04, "level with bicubic (-0.04 dB)"),
        (0.04, "level with bicubic (+0.04 dB)"),
        (0.06, "0.06 dB above bicubic"),
        (1.2, "1.20 dB above bicubic"),
    ],
)
def test_the_words_say_what_the_numbers_say(gain: float, words: str) -> None:
    assert compared(row("fsrcnn", 30 + gain), row("bicubic", 30)) == words


def test_the_verdict_claims_nothing_about_the_methods() -> None:
    rows = [row("bicubic", 29, 0), row("fsrcnn", 28, 2000), row("residual", 29.6, 2000), row("dssd", 29.5, 2000)]
    lines = verdict(rows)
    assert lines[0].startswith("After 2,000 steps, plain FSRCNN is 1.00 dB below bicubic, the same network over the")
    assert "bicubic image 0.60 dB above bicubic and the DSSD student over it 0.50 dB above bicubic" in lines[0]
    assert "says nothing about which of them is better" in lines[-1]
    assert len(lines) == 3
    longer = verdict([*rows, row("trained", 30, 20000)])
    assert "20,000 steps on other images is 1.00 dB above bicubic" in longer[2]


def test_the_middle_of_a_photograph_begins_with_a_whole_lr_pixel() -> None:
    assert middle(np.zeros((300, 448, 3), np.uint8), 72, 4) == (112, 188, 72, 72)
    assert middle(np.zeros((40, 200, 3), np.uint8), 72, 4) == (0, 64, 40, 72)


def test_numbers_are_rounded_to_what_they_are_worth() -> None:
    assert [digits(percent, 2) for percent in (0.2, 0.00234, 50)] == ["0.2", "0.0023", "50"]
    assert [digits(ratio, 2) for ratio in (16, 4_170_000 / 1_020_000, 3 / 2)] == ["16", "4.1", "1.5"]
    assert [digits(ratio, 1) for ratio in (61234.0, 7.4, 0.25)] == ["60,000", "7", "0.2"]
    assert [clock(seconds) for seconds in (None, 42.4, 65, 3725)] == ["-", "42 s", "1 min 05 s", "1 h 02 min"]


@pytest.mark.parametrize("main", [demo.main, demo_gan.main])
@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_an_impossible_number_of_steps_is_refused(main: Callable[[list[str]], int], steps: str) -> None:
    with pytest.raises(UserError, match=f"--steps: {steps}: must be a whole number"):
        main(["--steps", steps])


@needs_chromium
def test_the_page_fits_a_phone(finished: Path, tmp_path: Path) -> None:
    assert sideways((finished / "out/demo/report/index.html").read_text(encoding="utf-8"), tmp_path) == 0
