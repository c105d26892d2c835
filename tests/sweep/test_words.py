"""One form of naming grids for submit, status and collect: names, files, overlays, and which could be either."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdistill.errors import UserError
from hpcdistill.sweep.grid import GRIDS, grid_file, load_grids
from hpcdistill.sweep.grid_file import GridFile
from hpcdistill.sweep.plan import RUN_KEYS, Words, sort_words

CLONE = Path(__file__).resolve().parents[2]


def test_the_keys_of_runs_and_of_grids_are_told_apart() -> None:
    assert not set(RUN_KEYS) & set(GridFile.model_fields)


def test_every_file_of_the_clone_is_what_it_is() -> None:
    grids = [str(path) for path in sorted(CLONE.glob("configs/grids/*.yaml"))]
    overlays = [str(path) for path in sorted(CLONE.glob("configs/variants/*.yaml"))]
    assert grids
    assert overlays
    assert sort_words([*overlays, *grids]) == Words(tuple(grids), tuple(overlays))


def test_content_decides_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "grids"
    folder.mkdir(parents=True)
    (folder / "over.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "mine.yml").write_text("include: [a.yaml]\n")
    (tmp_path / "a=b.yaml").write_text("data: {workers: 0}\n")
    words = ["dssd-1", "mine.yml", "configs/grids/over.yaml", "train.steps=2", "a=b.yaml", "nope.yaml"]
    found = sort_words(words)
    assert found.grids == ("dssd-1", "mine.yml", "nope.yaml"), "what is not there, the reader of grids says"
    assert found.overrides == ("configs/grids/over.yaml", "train.steps=2", "a=b.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metrics: {}\ntrain: {steps: 3}\n", "train: is a key of a run, metrics one of a grid; make two files of it"),
        ("trian: {steps: 3}\n", "trian: no key of a grid or of a run; did you mean 'train'?"),
        ("titel: x\n", "titel: no key of a grid or of a run; did you mean 'title'?"),
    ],
)
def test_what_could_be_both_or_is_neither_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        sort_words([str(path)])
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]\n", "a: [\n", "\0", "3\n"])
def test_what_is_no_file_of_keys_is_left_to_the_reader_of_grids(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert sort_words([str(path)]) == Words((str(path),), ())


GRID = """\
metrics: {psnr: {of: student/set5/psnr, better: higher}}
cells: [{labels: {a: b}, base: configs/fsrcnn/x4.yaml}]
"""


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
