"""The page without a grid's name: every sweep, each by its own words; nothing of an earlier one is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import save_run
from toy_sweep import put_grid

from hpcdistill.errors import UserError
from hpcdistill.sweep import status_command, submit
from hpcdistill.sweep.collect import main
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.plan import make_plan
from hpcdistill.sweep.submission_folder import SubmissionFolder

NAME = "student/toy/psnr"
OWN = """\
title: {title}
metrics: {{psnr: {{of: student/toy/psnr, better: higher}}}}
base: plain.yaml
cells: [{{labels: {{method: {title}}}, set: [method.optimizer.learning_rate={rate}]}}]
"""


class Clone:
    """A folder with grids in configs/grids and one beside them, in which commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.grids = folder, folder / "configs/grids"
        self.grids.mkdir(parents=True)
        put_grid(folder)
        (folder / "toy.yaml").unlink()
        self.page, self.tables = folder / "sweeps/report/index.html", folder / "sweeps/report/tables"

    def grid(self, name: str, rate: str, place: Path | None = None) -> Path:
        file = (place or self.grids) / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(OWN.format(title=name.capitalize(), rate=rate))
        return file

    def submit(self, word: str, *words: str, seeds: tuple[int, ...] | None = None, runs: str = "runs") -> list[str]:
        """Write a submission down, as if its runs had finished; their keys."""
        plan = make_plan(load_grids([word]), seeds, words)
        SubmissionFolder(self.folder / "sweeps", plan, profile={"name": "local"}, command=[word, *words]).save()
        for number, key in enumerate(plan.runs):
            save_run(self.folder / runs, key, {NAME: 30.0 + number}, key=key)
        return list(plan.runs)

    def shown(self) -> set[str]:
        return {file.stem for file in self.tables.glob("*.json")}

    def states(self, name: str) -> list[str]:
        content = json.loads((self.tables / f"{name}.json").read_text(encoding="utf-8"))
        return [run["state"] for cell in content["cells"] for run in cell["runs"]]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    monkeypatch.chdir(tmp_path)
    return Clone(tmp_path)


def test_every_grid_with_a_result_and_every_submitted_one(clone: Clone, tmp_path: Path) -> None:
    clone.grid("mine", "0.001")
    clone.grid("never", "0.002")
    by_hand = next(iter(make_plan(load_grids([str(clone.grid("hand", "0.003"))])).runs))
    elsewhere = clone.grid("other", "0.004", tmp_path / "elsewhere")
    clone.submit("mine")
    clone.submit(str(elsewhere))
    save_run(tmp_path / "runs", by_hand, {NAME: 29.0}, key=by_hand)
    assert main([]) == 0
    assert clone.shown() == {"mine", "other", "hand"}
    for title in ("Mine", "Other", "Hand"):
        assert title in clone.page.read_text(encoding="utf-8")


def test_a_sweep_s_end_keeps_the_sweeps_before_it(clone: Clone, tmp_path: Path) -> None:
    """Each by its own overrides, seeds and folder of runs: those of the newest command are not the others'."""
    clone.grid("mine", "0.001")
    elsewhere = clone.grid("other", "0.004", tmp_path / "elsewhere")
    clone.submit("mine", "train.batch_size=3", "runs=aside", seeds=(4, 5), runs="aside")
    clone.submit(str(elsewhere), "train.batch_size=5")
    words = submit.collect_command([str(elsewhere)], ["train.batch_size=5"], None, Path("runs"), Path("sweeps"))
    assert main(words[1:]) == 0
    assert clone.shown() == {"mine", "other"}
    assert clone.states("mine") == ["finished", "finished"]
    assert clone.states("other") == ["finished"]
    assert main([]) == 0
    assert (clone.states("mine"), clone.states("other")) == (["finished", "finished"], ["finished"])


def test_the_newest_submission_counts(clone: Clone) -> None:
    clone.grid("mine", "0.001")
    clone.submit("mine", "train.batch_size=3")
    [folder] = Path("sweeps/submissions").iterdir()
    older = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(older | {"time": "2020-01-01T00:00:00Z"}))
    plan = make_plan(load_grids(["mine"]), None, ["train.batch_size=5"])
    SubmissionFolder(Path("sweeps").absolute(), plan, profile={}, command=["mine", "train.batch_size=5"]).save()
    assert main([]) == 0
    assert clone.states("mine") == ["missing"]
    assert main(["mine"]) == 0
    assert clone.states("mine") == ["missing"]
    for words in (["train.batch_size=3"], ["mine", "train.batch_size=3"]):  # words given here are meant
        assert main(words) == 0
        assert clone.states("mine") == ["finished"]


def test_what_was_submitted_and_had_nothing_to_do_counts_too(clone: Clone) -> None:
    """Its runs were there already, made by other words than those of the submission before."""
    clone.grid("mine", "0.001")
    clone.submit("mine", "train.batch_size=3")
    [folder] = Path("sweeps/submissions").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"time": "2020-01-01T00:00:00Z"}))
    [key] = make_plan(load_grids(["mine"]), None, ["train.batch_size=5"]).runs
    save_run(Path("runs"), key, {NAME: 27.0}, key=key)
    for _ in range(2):
        assert submit.main(["mine", "--local", "train.batch_size=5"]) == 0
    assert len(list(Path("sweeps/submissions").iterdir())) == 2
    assert main([]) == 0
    content = json.loads((clone.tables / "mine.json").read_text(encoding="utf-8"))
    assert content["cells"][0]["metrics"]["psnr"]["best"]["mean"] == 27.0


def test_a_submission_of_older_code_is_planned_by_its_command(clone: Clone) -> None:
    clone.grid("mine", "0.001")
    clone.submit("mine", "train.batch_size=3")
    [file] = Path("sweeps/submissions").glob("*/plan.json")
    content = json.loads(file.read_text())
    for key in ("overrides", "seeds", "place"):
        del content[key]
    file.write_text(json.dumps(content))
    assert main([]) == 0
    assert clone.states("mine") == ["finished"]


def test_old_tables_go_and_foreign_files_stay(clone: Clone, tmp_path: Path) -> None:
    clone.grid("mine", "0.001")
    elsewhere = clone.grid("other", "0.004", tmp_path / "elsewhere")
    clone.submit("mine")
    clone.submit(str(elsewhere))
    assert main([]) == 0
    (clone.tables / "notes.md").write_text("by hand")
    (clone.tables / "notes.json").write_text('{"grid": "something else"}')
    assert main(["mine"]) == 0
    assert {file.name for file in clone.tables.iterdir()} == {
        *(f"mine.{kind}" for kind in ("md", "tex", "html", "json")),
        *("notes.md", "notes.json"),
    }
    assert "Other" not in clone.page.read_text(encoding="utf-8")


def test_what_is_wrong_with_one_grid_is_said_and_leaves_the_others(
    clone: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clone.grid("mine", "0.001")
    elsewhere = clone.grid("other", "0.004", tmp_path / "elsewhere")
    clone.submit("mine")
    clone.submit(str(elsewhere))
    elsewhere.unlink()
    (clone.grids / "broken.yaml").write_text("title: [broken\n")
    damaged = Path("sweeps/submissions/20200101T000000Z-lost/plan.json")
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert main([]) == 0
    assert clone.shown() == {"mine"}
    said = capsys.readouterr().err
    page = clone.page.read_text(encoding="utf-8")
    for name in ("broken.yaml", "other.yaml"):
        assert f"{name}: no" in said  # not valid YAML; no such grid file
        assert name in page
    assert f"{damaged}: cannot be read" in said
    assert str(damaged) in page
    assert main(["--strict"]) == 1
    with pytest.raises(UserError, match=r"train.bach_size: unknown key; did you mean 'batch_size'"):
        main(["train.bach_size=3"])


def test_two_grids_of_one_name(clone: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone.grid("mine", "0.001")
    clone.submit(str(clone.grid("mine", "0.004", tmp_path / "elsewhere")))
    assert main([]) == 0
    assert clone.states("mine") == ["finished"]
    assert "configs/grids/mine.yaml: has the name of" in capsys.readouterr().err


def test_names_files_overlays_and_the_old_spelling(clone: Clone, tmp_path: Path) -> None:
    """One form as everywhere; RUNS as a word and --grid are still taken."""
    clone.grid("mine", "0.001")
    elsewhere = clone.grid("other", "0.004", tmp_path / "elsewhere")
    (tmp_path / "over.yaml").write_text("train: {batch_size: 3}\n")
    clone.submit("mine", "over.yaml", runs="aside")
    clone.submit(str(elsewhere))
    for words in (
        ["mine", "--runs", "aside"],
        ["mine", "over.yaml", "--runs", "aside"],
        ["configs/grids/mine.yaml", "over.yaml", "runs=aside"],
        ["aside", "train.batch_size=3", "--grid", "mine"],
    ):
        assert main(words) == 0
        assert clone.shown() == {"mine"}
        assert clone.states("mine") == ["finished"]
    assert main(["other"]) == 0  # from elsewhere, by the name it was submitted with
    assert clone.shown() == {"other"}
    with pytest.raises(UserError, match="one folder of runs"):
        main(["aside", "--runs", "runs"])
    with pytest.raises(UserError, match=r"othr: no such grid in configs/grids; did you mean 'other'\?"):
        main(["othr"])


def test_from_another_folder_grids_are_planned_where_they_were_submitted(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone.grid("mine", "0.001")
    clone.submit("mine")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert main(["--folder", str(tmp_path / "sweeps"), "--out", str(tmp_path / "sweeps/report")]) == 0
    assert clone.states("mine") == ["finished"]
    assert main(["mine", "--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "sweeps"), "--out", "out"]) == 0
    assert json.loads(Path("out/tables/mine.json").read_text())["cells"][0]["runs"][0]["state"] == "finished"
    assert Path.cwd() == tmp_path / "away"


def test_status_and_tables_say_the_same_of_a_damaged_result(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    """`"last": 3` was finished to one and damaged to the other; now both name the file, the fault and the remedy."""
    clone.grid("mine", "0.001")
    [key] = clone.submit("mine")
    file = Path(f"runs/run-{key}/result.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"last": 3}))
    task = Path(f"sweeps/tasks/{key}/state.json")
    task.parent.mkdir(parents=True)
    task.write_text(json.dumps({"key": key, "state": "finished", "run": str(file.parent.absolute())}))
    assert status_command.main(["--json"]) == 1
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert run["state"] == "failed"
    line = f"{file}: damaged (last: expected a step and metrics); submit again with --retry failed"
    assert run["reason"].startswith(line)
    assert main([]) == 0
    assert clone.states("mine") == ["unreadable"]
    assert line in capsys.readouterr().err
    assert line in clone.page.read_text(encoding="utf-8")
