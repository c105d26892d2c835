"""The report as a page and the command that makes it: self-contained, nothing left out, sorted by a click."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import NAME, PSNR, grid, plan, run_cell, save_run
from phone import needs_chromium, sideways
from PIL import Image
from test_report import Strict

from hpcdistill.config import to_yaml
from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.sweep import grid_report
from hpcdistill.sweep.collect import main
from hpcdistill.sweep.grid import Cell, Metric, load_grid
from hpcdistill.sweep.grid_report import About, anchor_of, newest_sample, report_page, write_report
from hpcdistill.sweep.plan import make_plan
from hpcdistill.sweep.plots import axis_plots, cost_plots, curve, curve_charts, spectrum_charts
from hpcdistill.sweep.results import Found, find_results
from hpcdistill.sweep.status import TaskStatus
from hpcdistill.sweep.table_layout import lay_out
from hpcdistill.sweep.table_rows import ResultTable
from hpcdistill.sweep.tables import make_tables

ABOUT = About("A sweep <&>", "python slurm/collect.py", "runs", "2026-11-22 03:00 UTC")
GRID = """\
title: Seeds of a plain network
paper: Ours
table: "9"
metrics:
  psnr: {label: Set5 PSNR, of: student/set5/psnr, better: higher, digits: 2}
base: configs/fsrcnn/x4.yaml
axes:
  rate:
    slow: {set: [method.optimizer.learning_rate=0.0001]}
    fast: {set: [method.optimizer.learning_rate=0.01]}
printed:
  - {rate: slow, psnr: 30.5}
  - {rate: fast, psnr: 30.9}
"""


def save_picture(run: Path, name: str, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    file = run / "samples" / name
    file.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def made_table(runs: Path) -> tuple[ResultTable, Found]:
    """a, b and c with 31, 33 and 9.5; d failed; CARN reported. a and b have curves and pictures."""
    cells = [run_cell(name, value) for name, value in zip("abcd", (31.0, 34.0, 30.0, 29.0), strict=True)]
    cells.append(Cell({"method": "CARN"}, "reported", (), {"psnr": 32.13}, {"psnr": NAME}))
    for key, value in (("a-0-0", 31.0), ("b-1-0", 33.0), ("c-2-0", 9.5)):
        run = save_run(runs, key, value)
        if value > 10:
            rows = [{"step": 1, "loss": 3.0}, {"step": 50, NAME: value - 1}, {"step": 100, NAME: value}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            save_picture(run, "student-00000050.png", seed=1)
            save_picture(run, "student-00000100.png", seed=int(value))
    found = find_results(runs)
    failed = TaskStatus("d-3-0", "run", "failed", reason="no <memory>")
    return make_tables(plan(grid(cells)), found, {"d-3-0": failed})[0], found


def page_of(runs: Path) -> str:
    table, found = made_table(runs)
    return report_page([lay_out(table)], found, [], ABOUT)


def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    text = page_of(tmp_path)
    page = Strict(text)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert anchor_of("toy") in ids
    shown = " ".join(page.text)
    assert "no <memory>" in shown  # escaped, so that it is text
    assert "A sweep <&>" in shown


def test_newest_pictures_as_they_are(tmp_path: Path) -> None:
    page = Strict(page_of(tmp_path))
    images = [str(attributes["src"]) for attributes in page.all("img")]
    content = [base64.b64decode(image.partition("base64,")[2]) for image in images]
    assert content == [
        (tmp_path / f"run-{key}/samples/student-00000100.png").read_bytes() for key in ("a-0-0", "b-1-0")
    ]
    assert page.all("img")[0]["width"] == "40"


def test_large_pictures_are_named_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_report, "PICTURE_BYTES", 100)
    page = Strict(page_of(tmp_path))
    assert page.all("img") == []
    assert "run-a-0-0/samples/student-00000100.png" in " ".join(page.text)


def test_damaged_picture(tmp_path: Path) -> None:
    save_picture(save_run(tmp_path, "a-0-0", 1.0), "student-00000001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = find_results(tmp_path)
    (table,) = make_tables(plan(grid([run_cell("a")])), found, {})
    page = Strict(report_page([lay_out(table)], found, [], ABOUT))
    assert page.all("img") == []


def test_sample_of_the_measured_generator(tmp_path: Path) -> None:
    folder = save_run(tmp_path, "a", 1.0)
    (run,) = find_results(tmp_path).runs
    assert newest_sample(run, "student") is None
    teacher = save_picture(folder, "teacher-00000900.png")
    assert newest_sample(run, "student") == teacher
    student = save_picture(folder, "student-00000100.png")
    later = save_picture(folder, "student-00001000.png")
    assert newest_sample(run, "student") == later
    assert newest_sample(run, "generator") == later  # the latest of any
    later.unlink()
    assert newest_sample(run, "student") == student


def test_curves(tmp_path: Path) -> None:
    table, found = made_table(tmp_path)
    (chart,) = curve_charts(table)
    assert [(line.label, line.points) for line in chart.lines] == [
        ("a", ((50.0, 30.0), (100.0, 31.0))),
        ("b", ((50.0, 32.0), (100.0, 33.0))),
    ]
    run = found.by_key["a-0-0"]
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(f'{{"step": 150, "{NAME}": null}}\n{{"step": 200, "{NAME}": 31.')
    assert curve(run, NAME) == {50: 30.0, 100: 31.0}


def test_spectra_of_the_last_evaluation(tmp_path: Path) -> None:
    """Real in grey, the student before the teacher; what is damaged or was not measured is passed over."""
    table, found = made_table(tmp_path)
    assert spectrum_charts(table) == []
    curves = {"real": [100.0, 10.0, 1.0], "teacher": [1000.0, 1.0, 0.1], "student": [10.0, 1.0, 0.0]}
    for key, step in (("a-0-0", 50), ("a-0-0", 100), ("b-1-0", 100)):
        file = found.by_key[key].folder / "samples" / f"spectrum-{step:08d}.json"
        file.write_text(json.dumps({"set5": {**curves, "real": [float(step)] * 3, "real_b2a": [1.0]}, "other": {}}))
    (found.by_key["b-1-0"].folder / "samples" / "spectrum-00000100.json").write_text('{"set5": {"real": [1')
    (chart,) = spectrum_charts(table)
    assert chart.title == "Radial spectrum: a"
    assert chart.note == "Seed 0, step 100. spectral_error compares the right half of the axis."
    assert [(line.label, line.series, line.points) for line in chart.lines] == [
        ("real", 0, ((1.0, 2.0), (2.0, 2.0), (3.0, 2.0))),
        ("student", 1, ((1.0, 1.0), (2.0, 0.0), (3.0, -3.0))),
        ("teacher", 2, ((1.0, 3.0), (2.0, 0.0), (3.0, -1.0))),
    ]
    page = report_page([lay_out(table)], found, [], ABOUT)
    assert "Radial spectrum: a" in page


def test_spectra_say_their_errors_and_that_some_are_not_drawn(tmp_path: Path) -> None:
    """The student's error as result.json has it, of the last evaluation alone; ten rows, of which eight are drawn."""
    cells = [run_cell(name) for name in "abcdefghij"]
    for number, cell in enumerate(cells):
        last = {NAME: 1.0, "student/set5/spectral_error": 0.25 + number}
        run = save_run(tmp_path, f"{cell.labels['method']}-{number}-0", {NAME: 2.0}, last, seed=3)
        (run / "samples").mkdir()
        step = 100 if number else 50
        curves = {"set5": {"real": [9.0, 3.0], "student": [9.0, 1.0]}}
        (run / "samples" / f"spectrum-{step:08d}.json").write_text(json.dumps(curves))
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    charts = spectrum_charts(table)
    said = "spectral_error compares the right half of the axis"
    assert [chart.note for chart in charts[:2]] == [
        f"Seed 3, step 50. {said}.",
        f"Seed 3, step 100. {said}: student 1.250.",
    ]
    assert len(charts) == 8
    assert charts[-1].note == f"Seed 3, step 100. {said}: student 7.250. No more than 8 rows are drawn."


def test_axis_plot_says_its_numbers(tmp_path: Path) -> None:
    table, _ = made_table(tmp_path)
    (plot,) = axis_plots(table, "x")
    label = re.search(r'aria-label="([^"]*)"', plot.svg)
    assert label
    assert label.group(1) == (
        "Set5 PSNR by method. a: 31.00 in the paper; a: 31.00; b: 34.00 in the paper; b: 33.00; c: 30.00 in the paper; "
        "c: 9.50; d: 29.00 in the paper; CARN: 32.13 in the paper"
    )


def test_costs_printed_and_counted(tmp_path: Path) -> None:
    cells = [run_cell("a", 31.0), run_cell("b", 32.0)]
    cells[0].printed["macs"] = 6.0
    save_run(tmp_path, "a-0-0", 31.0)
    save_run(tmp_path, "b-1-0", 32.0)
    macs = Metric("macs", "MACs (G)", None, "lower", 1)
    found = find_results(tmp_path)
    (table,) = make_tables(plan(grid(cells, (PSNR, macs))), found, {})
    asked = []

    def counted(row: object) -> float:
        asked.append(row)
        return 4.6

    (plot,) = cost_plots(table, "x", counted)
    assert asked == [table.rows[1]]
    assert "counted" in plot.note
    (without,) = make_tables(plan(grid(cells[1:])), found, {})
    assert cost_plots(without, "x", counted) == []


def test_files(tmp_path: Path) -> None:
    table, found = made_table(tmp_path / "runs")
    page = write_report(tmp_path / "report", [table], found, [], ABOUT)
    files = sorted(str(file.relative_to(tmp_path / "report")) for file in page.parent.rglob("*") if file.is_file())
    assert files == ["index.html", "results.csv"] + [f"tables/toy.{kind}" for kind in ("html", "json", "md", "tex")]


def collected(tmp_path: Path, *arguments: str) -> tuple[int, Path]:
    out = tmp_path / "report"
    (tmp_path / "mine.yaml").write_text(GRID, encoding="utf-8")
    words = [str(tmp_path / "runs"), "--out", str(out), "--folder", str(tmp_path / "sweeps"), *arguments]
    return main(words), out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "mine.yaml").write_text(GRID, encoding="utf-8")
    made = make_plan([load_grid(tmp_path / "mine.yaml")], [0, 1])
    keys = [made.cells["mine", number, seed] for number, seed in ((0, 0), (0, 1), (1, 0))]
    for key, value in zip(keys, (30.0, 31.0, 32.0), strict=True):
        save_run(runs, str(key), value)
    save_run(runs, "stray", math.nan)
    code, out = collected(tmp_path, "--grid", str(tmp_path / "mine.yaml"), "--seeds", "0", "1")
    assert code == 0
    content = json.loads((out / "tables" / "mine.json").read_text(encoding="utf-8"))
    assert [cell["metrics"]["psnr"]["best"]["mean"] for cell in content["cells"]] == [30.5, 32.0]
    assert [[run["state"] for run in cell["runs"]] for cell in content["cells"]] == [
        ["finished", "finished"],
        ["finished", "missing"],
    ]
    assert "run-stray" in (out / "index.html").read_text(encoding="utf-8")
    said = capsys.readouterr()
    assert "3 of 4" in said.out
    assert "belong to none" in said.err
    save_run(runs, "broken", 1.0).joinpath("result.json").write_text("{", encoding="utf-8")
    arguments = ("--grid", str(tmp_path / "mine.yaml"), "--seeds", "0", "1")
    assert collected(tmp_path, *arguments)[0] == 0
    assert "run-broken/result.json: damaged" in capsys.readouterr().err
    assert collected(tmp_path, *arguments, "--strict")[0] == 1
    assert "run-broken/result.json" in (out / "index.html").read_text(encoding="utf-8")


def test_the_command_prints_labels_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`[/b]` would end in a traceback, `[red]` would be gone."""
    path = tmp_path / "own [red].yaml"
    text = GRID.replace("axes:", 'within: [part]\naxes:\n  part: {"[/b]": {}}').replace(
        "- {rate", '- {part: "[/b]", rate'
    )
    path.write_text(text, encoding="utf-8")
    for number, key in enumerate(make_plan([load_grid(path)]).runs):
        save_run(tmp_path / "runs", key, 30.0 + number)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--grid", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "own [red]" in shown
    assert "[/b]" in shown


def test_the_data_root_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that the variable does not reach: an old result's key is that of its place below the data root."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "packed"))
    old = load_run(["configs/fsrcnn/x4.yaml", "method.optimizer.learning_rate=0.0001"])
    folder = save_run(tmp_path / "runs", "old", 30.0, key=None)
    (folder / "config.yaml").write_text(to_yaml(old.config), encoding="utf-8")
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "elsewhere"))
    _, out = collected(tmp_path, "--grid", str(tmp_path / "mine.yaml"), "--data-root", str(tmp_path / "packed"))
    content = json.loads((out / "tables" / "mine.json").read_text(encoding="utf-8"))
    assert content["cells"][0]["runs"][0]["state"] == "finished"
    assert os.environ["HPCDISTILL_DATA"] == str(tmp_path / "packed")


def test_command_with_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        collected(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no result of any grid"):
        collected(tmp_path)
    shutil.rmtree(tmp_path / "report")
    (tmp_path / "report").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        collected(tmp_path)


@needs_chromium
@pytest.mark.parametrize("word", ["", "a_name_without_any_space_that_is_longer_than_a_phone_is_wide"])
def test_a_sweep_s_page_fits_a_phone(word: str, tmp_path: Path) -> None:
    table, found = made_table(tmp_path / "runs")
    if word:
        (found.runs[0].folder / "samples/student-00000100.png").rename(found.runs[0].folder / f"samples/{word}.png")
        cells = [replace(cell, labels={"method": f"{word}{n}", word: word}) for n, cell in enumerate(table.grid.cells)]
        grid_of = replace(table.grid, title=word, cells=tuple(cells))
        rows = [replace(row, cell=cell) for row, cell in zip(table.rows, cells, strict=True)]
        table = replace(table, grid=grid_of, rows=tuple(rows), flags=[word])
    about = replace(ABOUT, title=word or ABOUT.title, runs=word or "runs", command=f"python slurm/collect.py {word}")
    page = report_page([lay_out(table)], found, found.runs, about)
    assert sideways(page, tmp_path / "phone") == 0


@needs_chromium
def test_in_a_browser(tmp_path: Path) -> None:
    """Three clicks on `ours`: ascending, descending, as it was; what has no number stays last. No console error."""
    clicks = """<script>
      const order = () => [...document.querySelectorAll("table.results tbody tr")].map(row => row.cells[0].textContent);
      const head = document.querySelector("th.ours");
      const seen = [0, 1, 2].map(() => { head.click(); return [...order(), head.getAttribute("aria-sort")]; });
      document.querySelector("th.difference").click();
      seen.push(order());
      document.querySelector("thead th.label").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
      seen.push(order());
      const pictures = [...document.images].map(image => image.complete && image.naturalWidth);
      document.body.textContent = JSON.stringify({ seen, pictures });
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(page_of(tmp_path / "runs").replace("</body>", clicks + "</body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    done = subprocess.run(["chromium", *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    content = json.loads(body.group(1))
    assert content["seen"] == [
        ["c", "a", "b", "d", "CARN", "ascending"],  # 9.5 before 31: as numbers, not as text
        ["b", "a", "c", "d", "CARN", "descending"],
        ["a", "b", "c", "d", "CARN", "none"],
        ["c", "b", "a", "d", "CARN"],  # -20.5, -1, 0
        ["a", "b", "c", "CARN", "d"],
    ]
    assert content["pictures"] == [40, 40]


@pytest.mark.parametrize(
    "label", ["PSNR at $\\lambda_{$", "$", "a $x^$ b", "_psnr", "x_1^2", "\\frac{", '<b> & "q"', "50 % #1 ~ {", "$a$"]
)
def test_what_a_grid_says_is_shown_as_it_is(tmp_path: Path, label: str, plain: list[int]) -> None:
    """A metric's label, a cell's labels and a title are words: no formula, no markup; in the plots as well."""
    assert said_of(tmp_path / "it", label) == plain
    content = (tmp_path / "it/report/tables/toy.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)\$", content), "GitHub would begin a formula"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What `said_of` comes to where nothing is special."""
    return said_of(tmp_path_factory.mktemp("plain"), "plain")


def said_of(folder: Path, label: str) -> list[int]:
    """How often a report with plots of each kind shows the label itself, and those of its cells."""
    metric, macs = Metric("psnr", label, NAME, "higher", 2), Metric("macs", "MACs (G)", None, "lower", 1)
    cells = [run_cell(f"{label} {n}", second=f"{label} {m}") for n in "ab" for m in "cd"]
    for number, cell in enumerate(cells):
        cell.printed["macs"] = number + 1.0
        run = save_run(folder, str(number), 30.0 + number, key=f"{cell.labels['method']}-{number}-0")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 5, NAME: 30.0 + number}) + "\n", encoding="utf-8")
    made = grid(cells, (metric, macs), title=label)
    found = find_results(folder)
    (table,) = make_tables(plan(made), found, {})
    assert curve_charts(table)
    assert len(axis_plots(table, "x")) == 2
    assert cost_plots(table, "x", lambda _: None)
    write_report(folder / "report", [table], found, [], ABOUT)
    page = Strict((folder / "report/index.html").read_text(encoding="utf-8"))
    texts = [" ".join(text.split()) for text in page.text]
    return [
        sum(text == f"{label}{end}" for text in texts) for end in ("", " a", " b", " c", " d", " a, " + label + " c")
    ]


def test_grids_whose_names_look_alike_have_ids_of_their_own(tmp_path: Path) -> None:
    made_table(tmp_path)
    found = find_results(tmp_path)
    cells = [run_cell(name) for name in "abc"]
    tables = [make_tables(plan(grid(cells, name=name)), found, {})[0] for name in ("my_grid", "my-grid")]
    page = Strict(report_page([lay_out(table) for table in tables], found, [], ABOUT))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_without_a_paper_no_word_of_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(GRID.partition("printed:")[0], encoding="utf-8")
    for number, key in enumerate(make_plan([load_grid(tmp_path / "mine.yaml")]).runs):
        save_run(tmp_path / "runs", key, 30.0 + number)
    words = [str(tmp_path / "mine.yaml"), "--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "sweeps")]
    assert main([*words, "--out", str(tmp_path / "report")]) == 0
    assert "paper" not in capsys.readouterr().out
    page = Strict((tmp_path / "report/index.html").read_text(encoding="utf-8"))
    assert not [text for text in page.text if "paper's" in text or "printed ones" in text]
