"""One form of naming grids for submit, status and collect: names, files, overlays, and the nearest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdistill.errors import UserError
from hpcdistill.sweep.grids.grid import GRIDS, grid_file, load_grids
from hpcdistill.sweep.grids.words import is_overlay, sort_words

GRID = """\
metrics: {psnr: {of: student/set5/psnr, better: higher}}
cells: [{labels: {a: b}, base: configs/fsrcnn/x4.yaml}]
"""


def test_words_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(GRID)
    (tmp_path / "over.yaml").write_text("train: {steps: 5}\n")
    own, over = str(tmp_path / "own.yaml"), str(tmp_path / "over.yaml")
    words = sort_words(
        ["dssd-1", over, own, "train.batch_size=4", "configs/variants/cpu.yaml", "configs/grids/all.yaml"]
    )
    assert words.grids == ("dssd-1", own, "configs/grids/all.yaml")
    assert words.overrides == (over, "train.batch_size=4", "configs/variants/cpu.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "title: [mine\n", "titel: a typo beside\nmetrics: {}\n"])
def test_what_is_no_overlay_is_left_to_the_reader_of_grids(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert not is_overlay(tmp_path / "own.yaml")


def test_a_grid_is_found_by_name_file_and_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_text(GRID)
    submitted = {"mine": elsewhere}
    assert grid_file("dssd-1") == grid_file("configs/grids/dssd-1.yaml") == grid_file("dssd-1.yaml")
    assert grid_file("mine", submitted) == grid_file(str(elsewhere)) == elsewhere
    assert [grid.name for grid in load_grids(["mine", "dssd-1"], submitted)] == ["mine", "dssd-1"]
    with pytest.raises(UserError, match=r"min: no such grid in configs/grids; did you mean 'mine'\?"):
        grid_file("min", submitted)
    with pytest.raises(UserError, match=r"dssd-9.yaml: no such grid file; did you mean 'dssd-"):
        grid_file("dssd-9.yaml")
    monkeypatch.chdir(tmp_path)
    assert not GRIDS.is_dir()
    assert grid_file("mine", submitted) == elsewhere
