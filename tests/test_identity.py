"""What a run's identity depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdistill.data.index import Index
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.run import load_run, of_another_length
from hpcdistill.settings import identity_values
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


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# As they were before the default schedule changed, when every one of these had 100 epochs and one student update for
# each of the teacher: computed at commit 7bbf70d.
BEFORE = {
    ("original/horse2zebra", "schedule-100"): "d67fabebe0b8",
    ("original/summer2winter", "schedule-100"): "ab008950fcaa",
    ("original/monet2photo", "schedule-100"): "bb3a112493dd",
    ("original/edges2shoes", "schedule-100"): "5451cd9e3083",
    ("dcd/horse2zebra", "fesd-online-1"): "66ab35d4f996",
    ("dcd/summer2winter", "fesd-online-1"): "6009a442a684",
    ("dcd/monet2photo", "fesd-online-1"): "e3131a2b7bf5",
    ("dcd/edges2shoes", "schedule-100"): "810c358cbb83",
    ("fesd/horse2zebra", "fesd-online-1", "spectrum-shrunk"): "5b9ecab96edd",
    ("fesd/summer2winter", "fesd-online-1", "spectrum-shrunk"): "7ddb637dfd1b",
    ("fesd/monet2photo", "fesd-online-1", "spectrum-shrunk"): "2ede941bcfe1",
    ("fesd/edges2shoes", "fesd-online-1", "spectrum-shrunk"): "c1413ef15317",
    ("dcd/monet2photo", "gan-cpu"): "ba7043979610",
    ("fesd/horse2zebra", "gan-cpu"): "58b2045aac4e",
    ("fesd/edges2shoes", "gan-cpu", "gan-cpu-pairs"): "5e7b04a4c98e",
    ("original/edges2shoes", "gan-cpu-original"): "ddf9ed675b63",
    ("original/monet2photo", "gan-cpu-original"): "ec655655b97c",
    ("fesd/edges2shoes", "demo-gan"): "cc4506fa3b88",
}


@pytest.mark.parametrize("files", BEFORE, ids=" ".join)
def test_runs_of_the_older_schedule_keep_their_keys(files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCDISTILL_DATA", raising=False)
    first, *variants = files
    names = [f"{first}.yaml", *(f"variants/{name}.yaml" for name in variants)]
    assert load_run([str(CONFIGS / name) for name in names]).key == BEFORE[files]


def test_one_layer_of_the_discriminator_is_that_layer_however_it_is_written() -> None:
    given = [{"discriminator_layer": value} for value in (2, [2], [2, 2])]
    assert {repr(identity_values(DistilledGAN.Config(**values))) for values in given} == {"{'discriminator_layer': 2}"}
    sets = [identity_values(DistilledGAN.Config(discriminator_layer=layers)) for layers in ((4, 2), (2, 4))]
    assert sets[0] == sets[1] == {"discriminator_layer": (2, 4)}


def test_the_version_of_blocks_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only runs in blocks compute otherwise than before, so only they are other runs."""
    monkeypatch.delenv("HPCDISTILL_DATA", raising=False)
    blocks = DistilledGAN.Config(schedule="blocks", blocks=2, block_steps=3)
    assert (DistilledGAN.Config().version, blocks.version) == (1, 2)
    values = ["train.epochs=100", "method.schedule=blocks", "method.block_steps=13340", "method.blocks=2"]
    older = [str(CONFIGS / name) for name in ("fesd/horse2zebra.yaml", "variants/spectrum-shrunk.yaml")]
    run = [*older, *values]
    assert load_run(run).key != "fbb59c56dfb6"  # which it was for just these values
    monkeypatch.setattr(DistilledGAN.Config, "version", 1)
    assert load_run(run).key == "fbb59c56dfb6"
