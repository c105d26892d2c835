"""Grid files: the papers' tables against their numbers, and one line for whatever is wrong in a file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcdistill.errors import UserError
from hpcdistill.sweep.grid import Grid, load_grid, load_grids

ROOT = Path(__file__).resolve().parents[2]

# Counted in the papers: cells, of these reported, printed numbers. edges2shoes' Original has 1 of 3 numbers in print,
# and its FID from table 2; the gains in brackets count.
TABLES = {
    "fesd-1": (22, 9, 79),
    "fesd-2": (2, 0, 6),
    "fesd-3": (5, 0, 5),
    "fesd-4": (4, 0, 4),
    "fesd-5": (4, 0, 4),
    "fesd-6": (6, 0, 6),
    "fesd-7": (4, 0, 12),
    "dssd-1": (3, 0, 3),
    "dssd-2": (4, 0, 4),
    "dssd-3": (3, 0, 3),
    "dssd-4": (9, 0, 27),
    "dssd-A1": (36, 27, 387),
}
NOT_TRAINABLE = {"Co-evolutionary", "DMAD", "GAN compression", "CAT", "AutoGAN-Distiller"}
NOT_TRAINABLE |= {"DRCN", "DRRN", "MemNet", "CARN", "SRFBN", "IMDN", "IDN", "FSRCNN", "Bicubic"}

SMALL = """
title: mine
metrics:
  psnr: {of: "student/{set}/psnr", better: higher}
base: configs/dssd/x4.yaml
axes:
  set: {set5: {}, b100: {set: [data.workers=0]}}
  steps: {1: {set: [train.steps=1]}, 2: {set: [train.steps=2]}}
printed:
  - {set: b100, steps: 2, psnr: 27.5}
cells:
  - {labels: {set: other, steps: none}, kind: reported, printed: {psnr: 30}}
"""


@pytest.fixture(autouse=True)
def _clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def grids() -> dict[str, Grid]:
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        return {grid.name: grid for grid in load_grids()}
    finally:
        os.chdir(here)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_every_table_has_every_printed_number(grids: dict[str, Grid]) -> None:
    counts = {
        name: (
            len(grid.cells),
            sum(cell.kind == "reported" for cell in grid.cells),
            sum(len(cell.printed) for cell in grid.cells),
        )
        for name, grid in grids.items()
    }
    assert counts == TABLES


def test_only_what_cannot_be_trained_is_reported(grids: dict[str, Grid]) -> None:
    reported = {cell.labels["method"] for grid in grids.values() for cell in grid.cells if cell.kind == "reported"}
    assert reported == NOT_TRAINABLE
    for grid in grids.values():
        for cell in grid.cells:
            assert (cell.kind == "run") == bool(cell.arguments)
            # In table 4 FSRCNN and IDN are networks that we train; in attached I the literature's own numbers.
            assert cell.kind == "reported" or cell.labels.get("method") not in NOT_TRAINABLE


def numbers(grid: Grid, metric: str, *labels: str) -> dict[tuple[str, ...], float]:
    """A metric's printed numbers by the values of some labels."""
    return {
        tuple(cell.labels[label] for label in labels): cell.printed[metric]
        for cell in grid.cells
        if metric in cell.printed
    }


def test_small_tables_by_hand(grids: dict[str, Grid]) -> None:
    assert numbers(grids["dssd-1"], "psnr", "encoder") == {("bicubic",): 30.93, ("PISR",): 30.96, ("HFRM",): 31.04}
    assert numbers(grids["fesd-5"], "fid", "alpha") == {
        ("none",): 74.09,
        ("1/16",): 74.18,
        ("1/8",): 73.96,
        ("1/4",): 74.25,
    }
    assert numbers(grids["dssd-4"], "b100", "network", "setting")["IDN", "DSSD"] == 27.61


@pytest.fixture(scope="module")
def papers() -> dict[str, Any]:
    """Every number as it was read from the papers; not part of the repository."""
    folder = os.environ.get("HPCDISTILL_TEST_DATA")
    files = {
        name: Path(folder or "-").resolve().parent / "papers" / f"{name}_results.yaml" for name in ("fesd", "dssd")
    }
    if not all(path.is_file() for path in files.values()):
        pytest.skip("the papers' numbers are not beside HPCDISTILL_TEST_DATA")
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in files.items()}


def test_table_1_of_fesd(grids: dict[str, Grid], papers: dict[str, Any]) -> None:
    names = {"fid": "fid", "delta_fid_vs_original": "gain", "macs_G": "macs", "params_M": "params"}
    expected: dict[tuple[str, str], dict[str, float]] = {}
    for row in papers["fesd"]["table1"]:
        values = {names[key]: row[key] for key in names if row[key] is not None}
        if "provenance" in row:
            del values["params"]  # counted, not printed
        expected[row["dataset"], row["method"]] = values
    found = {(cell.labels["dataset"], cell.labels["method"]): cell.printed for cell in grids["fesd-1"].cells}
    assert found == expected


def test_printed_rows_of_edges2shoes_are_of_the_re_split(grids: dict[str, Grid]) -> None:
    cells = [cell for cell in (*grids["fesd-1"].cells, *grids["fesd-2"].cells) if "edges2shoes" in str(cell.arguments)]
    assert len(cells) >= 5
    for cell in cells:
        assert cell.arguments[0].endswith("/edges2shoes-r.yaml")
        assert cell.test_sets == {"edges2shoes-r"}
    assert grids["fesd-1"].printed_images == {"horse2zebra": 120, "summer2winter": 309, "edges2shoes-r": 2048}


def test_tables_2_to_7_of_fesd(grids: dict[str, Grid], papers: dict[str, Any]) -> None:
    fesd = papers["fesd"]
    rows = {row["method"]: row for row in fesd["table2_edges2shoes"]}
    for metric, key in (("fid", "fid"), ("lpips", "lpips"), ("psnr", "psnr_db")):
        assert numbers(grids["fesd-2"], metric, "method") == {(name,): row[key] for name, row in rows.items()}
    for table, (key, label) in {
        "fesd-3": ("table3_direction_summer2winter", "direction"),
        "fesd-4": ("table4_amplitude_summer2winter", "amplitude"),
        "fesd-5": ("table5_alpha_summer2winter", "alpha"),
    }.items():
        expected = {(str(row[label] or "none"),): row["fid"] for row in fesd[key]}
        assert numbers(grids[table], "fid", label) == expected
    expected = {
        (row["method"], name): row[name]
        for row in fesd["table6_ablation_fid"]
        for name in ("horse2zebra", "summer2winter")
    }
    assert numbers(grids["fesd-6"], "fid", "method", "dataset") == expected
    rows = {(row["dataset"], row["method"]): row for row in fesd["table7_latency_bs1_rtx3080ti"]}
    for metric, key in (("latency", "latency_ms"), ("macs", "macs_G"), ("params", "params_M")):
        expected = {place: row[key] for place, row in rows.items()}
        assert numbers(grids["fesd-7"], metric, "dataset", "method") == expected


def test_tables_of_dssd(grids: dict[str, Grid], papers: dict[str, Any]) -> None:
    dssd = papers["dssd"]
    for table, key in (
        ("dssd-1", "table1_hfrm_ablation_x4_Set5_psnr"),
        ("dssd-2", "table2_sdm_ablation_x4_Set5_psnr"),
        ("dssd-3", "table3_deep_supervision_x4_Set5_psnr"),
    ):
        assert [cell.printed["psnr"] for cell in grids[table].cells] == list(dssd[key].values())
    settings = {"div2k_no_kd": "alone", "PISR": "PISR", "DSSD": "DSSD"}
    for metric, key in (("set5", "Set5_psnr"), ("b100", "B100_psnr"), ("params", "params_k")):
        expected = {(row["model"], settings[row["setting"]]): row[key] for row in dssd["table4_x4"]}
        assert numbers(grids["dssd-4"], metric, "network", "setting") == expected


def test_attached_table_of_dssd(grids: dict[str, Grid], papers: dict[str, Any]) -> None:
    names = {"params_k": "params", "multadds_G": "macs", "runtime_ms": "runtime"}
    expected: dict[tuple[str, str], dict[str, float]] = {}
    for row in papers["dssd"]["attached_table_I"]:
        method = "FSRCNN*" if row["method"] == "FSRCNN_div2k" else row["method"]
        values = expected.setdefault((f"x{row['scale']}", method), {})
        values |= {names[key]: row[key] for key in names if row[key] is not None}
        values |= {f"{row['dataset'].lower()}_{metric}": row[metric] for metric in ("psnr", "ssim")}
    found = {(cell.labels["scale"], cell.labels["method"]): cell.printed for cell in grids["dssd-A1"].cells}
    assert found == expected


def test_bicubic_has_our_own_numbers_near_the_printed_ones(grids: dict[str, Grid]) -> None:
    for cell in grids["dssd-A1"].cells:
        if cell.labels["method"] == "Bicubic":
            assert len(cell.measured) == 6
            for metric, value in cell.measured.items():
                assert math.isclose(value, cell.printed[metric], abs_tol=0.1 if metric.endswith("psnr") else 0.002)


def test_a_product_an_explicit_cell_and_labels_filled_in(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path, SMALL))
    assert [cell.labels for cell in grid.cells] == [
        {"set": "set5", "steps": "1"},
        {"set": "set5", "steps": "2"},
        {"set": "b100", "steps": "1"},
        {"set": "b100", "steps": "2"},
        {"set": "other", "steps": "none"},
    ]
    last = grid.cells[3]
    assert last.arguments == ("configs/dssd/x4.yaml", "data.workers=0", "train.steps=2")
    assert last.of == {"psnr": "student/b100/psnr"}
    assert [cell.printed for cell in grid.cells] == [{}, {}, {}, {"psnr": 27.5}, {"psnr": 30.0}]
    assert grid.cells[4].kind == "reported"
    assert (grid.name, grid.title, grid.seeds, grid.metrics[0].label) == ("mine", "mine", (0,), "psnr")


def test_braces_that_are_no_labels_are_left_alone(tmp_path: Path) -> None:
    overrides = "['data.eval={mine: x}', 'method.crop=${data.crop}', 'name=a-{set}']"
    grid = load_grid(written(tmp_path, SMALL.replace("[data.workers=0]", overrides)))
    assert grid.cells[2].arguments[1:4] == ("data.eval={mine: x}", "method.crop=${data.crop}", "name=a-b100")


def test_names_paths_and_include() -> None:
    assert [grid.name for grid in load_grids(["dssd-2", "configs/grids/dssd-1.yaml", "dssd-2"])] == ["dssd-2", "dssd-1"]
    assert {grid.name for grid in load_grids(["all"])} == set(TABLES)


@pytest.mark.parametrize("label", ["1e-4", "010", "1:30", "1_000", "on", "0.10", "1e5", "7"])
def test_a_label_is_as_it_is_written(tmp_path: Path, label: str) -> None:
    text = SMALL.replace("{1: {", f"{{{label}: {{").replace("steps: 2, psnr", f"steps: {label}, psnr")
    text = text.replace("train.steps=1]", "'train.log_every={steps}']").replace("steps: none", f"steps: x{label}")
    cells = load_grid(written(tmp_path, text)).cells
    assert cells[0].labels["steps"] == label
    assert cells[0].arguments[-1] == f"train.log_every={label}"
    assert cells[2].printed == {"psnr": 27.5}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("base:", "bases:"), "bases: unknown key; did you mean 'base'?"),
        (("better: higher", "better: more"), "metrics.psnr.better: expected 'higher' or 'lower', got \"more\""),
        (
            ("{set: [data.workers=0]}", "{sets: [data.workers=0]}"),
            "axes.set.b100.sets: unknown key; did you mean 'set'?",
        ),
        (("[data.workers=0]", "[data.workers]"), "'data.workers' is not an override; write key=value"),
        (("[data.workers=0]", "[seed=3]"), "the seed is not an override here; name it under seeds"),
        (("set: b100, steps", "set: b10, steps"), "printed[0]: matches no cell: set 'b10'; did you mean 'b100'?"),
        (("steps: 2, psnr", "psnr"), "printed[0]: does not say which steps; valid: 1, 2"),
        (("psnr: 27.5", "psmr: 27.5"), "printed[0]: unknown key 'psmr'; did you mean 'psnr'?"),
        (("psnr: 27.5", "psnr: high"), "printed[0]: psnr: expected a number, got 'high'"),
        (("{psnr: 30}", "{ssim: 30}"), "cells[0]: no metric 'ssim'"),
        (("{set: other, steps: none}", '{set: set5, steps: "1"}'), "the cell (set5, 1) is there twice"),
        (("set5: {}, b100", "set5: {}, set5"), "'set5' is there twice"),
        (
            ("set: {set5: {}, b100: {set: [data.workers=0]}}", "set: {}"),
            "axes.set: has no values, so the product is empty",
        ),
        (("{set}/psnr", "{sets}/psnr"), "student/{sets}/psnr: no label 'sets'; did you mean 'set'?"),
        (("steps: {1:", "steps: {null:"), "a label is text, got null"),
        (("- {set: b100, steps: 2, psnr: 27.5}", "- 3"), "printed.0: expected a valid dictionary, got 3"),
        (("title: mine", "? [a]\n: b"), "mine.yaml: not valid YAML"),
        (("base: configs/dssd/x4.yaml", ""), "has no base; name its configuration, or say `kind: reported`"),
        (
            ("{set: other, steps: none}", "{set: other, steps: true}"),
            "a label is read as true or false; put it in quotes",
        ),
        (("title: mine", "seeds: [1, 1]"), "seeds: expected different whole numbers"),
        (("title: mine", "within: [sets]"), "within: no label 'sets'; did you mean 'set'?"),
        (
            ("title: mine", "printed_images: {b10: 5}"),
            "printed_images: no cell has the test set 'b10'; did you mean 'b100'?",
        ),
        (("title: mine", "include: [a.yaml]"), "include: stands alone"),
        (("title: mine", "title: [mine"), "not valid YAML"),
        (("kind: reported, printed: {psnr: 30}", "kind: reportd"), "cells.0.kind: expected 'run' or 'reported'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in SMALL
    path = written(tmp_path, SMALL.replace(*change))
    with pytest.raises(UserError) as caught:
        load_grid(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_unknown_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dsd-1: no such grid in configs/grids; did you mean 'dssd-1'\?"):
        load_grids(["dsd-1"])
    with pytest.raises(UserError, match=r"configs/grids/dssd-9.yaml: no such grid file; did you mean"):
        load_grids(["configs/grids/dssd-9.yaml"])
    (tmp_path / "both.yaml").write_text("include: [both.yaml]\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_grid(tmp_path)
    with pytest.raises(UserError, match="includes itself"):
        load_grids([str(tmp_path / "both.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="expected `key: value` lines"):
        load_grids([str(tmp_path / "list.yaml")])
    (tmp_path / "dssd-1.yaml").write_text(SMALL)
    with pytest.raises(UserError, match="rename one"):
        load_grids(["dssd-1", str(tmp_path / "dssd-1.yaml")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run the command in the clone's folder"):
        load_grids(["dssd-1"])
