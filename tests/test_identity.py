"""What a run's identity depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdistill.data.index import Index
from hpcdistill.run import load_run, of_another_length
from hpcdistill.training.run_folder import RunFolder


@pytest.fixture
def student(tmp_path: Path) -> list[str]:
    """A student's and its teacher's configuration, and a data set that is nothing but an index."""
    for name, licence in (("packed", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        Index("toy", "all", "lr-hr", (2, 3, 4), licence, "test", (), ()).save(tmp_path / name)
    (tmp_path / "teacher.yaml").write_text("name: t\nmethod: {name: privileged_teacher, scale: 4}\n")
    text = "name: s\nteacher: {config: teacher.yaml}\nmethod: {name: privileged_student, scale: 4}\n"
    (tmp_path / "student.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text("name: p\nmethod: {name: plain_sr, scale: 4}\n")
    return [str(tmp_path / "student.yaml"), f"data.train={tmp_path / 'packed'}", f"runs={tmp_path / 'runs'}"]


def short(arguments: list[str], *more: str) -> str:
    return load_run([*arguments, *more]).short


@pytest.mark.parametrize(
    "override",
    [
        "train.log_every=7",
        "train.checkpoint_every=7",
        "train.device=cpu",
        "train.threads=3",
        "train.accumulation=2",
        "train.trackers=[]",
        "data.workers=9",
        "data.cache=ram",
        "runs=elsewhere",
        "name=another",
        "teacher.overrides.train.log_every=3",
        "method.scale=4",  # the value it has
        "data.held_out=0",
    ],
)
def test_how_a_run_is_carried_out_is_not_part_of_it(student: list[str], override: str) -> None:
    assert short(student, override) == short(student)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "method.weight_vid=1e-5",
        "method.scale=2",
        "method.optimizer.eps=1e-7",
        "train.batch_size=8",
        "train.precision=bf16",
        "train.steps=5",
        "train.ema=0.9",
        "data.patch=96",
        "data.flip=false",
        "data.held_out=3",
        "eval.every=7",
        "teacher.checkpoint=best",
        "teacher.overrides.method.encoder=pisr",
        "teacher.overrides.seed=5",
    ],
)
def test_what_the_result_depends_on_is_part_of_it(student: list[str], override: str) -> None:
    # scale 2 needs the teacher at 2 as well to be trained, not to be identified
    assert short(student, override) != short(student)


def test_two_methods_with_equal_values_are_two_runs(student: list[str], tmp_path: Path) -> None:
    teacher = [str(tmp_path / "teacher.yaml"), *student[1:]]
    plain = [str(tmp_path / "plain.yaml"), *student[1:]]
    assert len({short(student), short(teacher), short(plain)}) == 3


def test_the_data_counts_by_content_not_by_place(student: list[str], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (tmp_path / "packed").rename(moved)
    assert short(student, f"data.train={moved}") != short(student, f"data.train={tmp_path / 'other'}")
    before = short(student, f"data.train={moved}")
    moved.rename(tmp_path / "packed")
    assert short(student) == before


def test_initial_weights_count_by_content(student: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    first = short(student, f"init.student={weights}")
    weights.write_bytes(b"two")
    assert len({first, short(student, f"init.student={weights}"), short(student)}) == 3


def test_the_version_of_the_mathematics_counts(student: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcdistill.methods.privileged_student import PrivilegedStudent

    before = short(student)
    monkeypatch.setattr(PrivilegedStudent.Config, "VERSION", PrivilegedStudent.Config.VERSION + 1)
    assert short(student) != before


def test_a_run_of_the_same_identity_is_found_under_its_other_name(student: list[str], tmp_path: Path) -> None:
    folder = load_run(student).folder
    assert folder == tmp_path / "runs" / f"s-{short(student)}"
    folder.mkdir(parents=True)
    assert load_run([*student, "name=renamed"]).folder == folder


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        (("train.steps=7",), True),
        (("train.epochs=3",), True),
        (("train.epochs=3", "data.workers=9"), True),
        (("train.steps=7", "seed=1"), False),
        (("train.steps=7", "train.batch_size=3"), False),
        (("train.steps=7", "name=other"), False),
        (("train.steps=7", "teacher.overrides.train.steps=5"), True),
        (("train.steps=7", "teacher.overrides.seed=5"), False),
        (("train.steps=7", "teacher.checkpoint=best"), False),
    ],
)
def test_a_run_of_another_length_is_found(
    student: list[str], tmp_path: Path, asked: tuple[str, ...], near: bool
) -> None:
    first = load_run([*student, "train.steps=5"])
    assert first.teacher
    for one in (first, first.teacher):
        RunFolder(one.folder).create("", {"short": one.short, **one.identity})
    for name, text in (("s-01234567", "{"), ("s-12345678", "[]"), ("s-23456789", '{"identity": 3}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "environment.json").write_text(text)
    assert of_another_length(load_run([*student, *asked])) == ([first.folder] if near else [])
