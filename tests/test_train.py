"""The train command on every configuration that ships, for two steps, and its behaviour as users meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ranked_commands import Ranks
from tiny_runs import CONFIGS, tiny_variant, trained
from whole_set import evaluate_sr

from hpcdistill.config import config_files
from hpcdistill.errors import UserError
from hpcdistill.metrics.sr_evaluation import bicubic_upsampler
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.models.registry import load_generator
from hpcdistill.run import load_run
from hpcdistill.train import main
from hpcdistill.trainer import train

# Translation has tests of its own, test_train_translation.py.
TRANSLATION = ("fesd", "dcd", "omgd", "original", "taught", "wavelet_kd")
STUDENTS = [
    path
    for path in config_files(CONFIGS)
    if "teacher" not in path.name and path.parent.name not in ("demo", *TRANSLATION)
]
TRANSLATION_VARIANTS = ("schedule-100", "schedule-200", "dcd-batch4", "dcd-relu2_2", "pcs-after", "bl-pcs", "demo-gan")
TRANSLATION_VARIANTS += ("gan-cpu", "gan-cpu-pairs", "gan-cpu-original", "student-alone-resnet", "student-alone-unet")
TRANSLATION_VARIANTS += ("fesd-online-1", "fesd-online-4", "fesd-blocks", "fesd-blocks-6")
TRANSLATION_VARIANTS += ("spectrum-maps", "spectrum-mixed", "spectrum-shrunk")
# Variants that only say where and how long to train say nothing about the method.
METHOD_VARIANTS = [
    path
    for path in sorted((CONFIGS / "variants").glob("*.yaml"))
    if path.stem not in ("cpu", "short", "bsd-t91", "first-hour", "quality", "shipped", "demo", *TRANSLATION_VARIANTS)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A variant that trains two steps on three images of noise, and looks at everything in each."""
    return tiny_variant(tmp_path_factory.mktemp("tiny"), checkpoint_every=1, gradient_norms_every=1)


@pytest.mark.parametrize("config", STUDENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_configuration_trains(config: Path, tiny: str, tmp_path: Path) -> None:
    result = trained(str(config), tiny, f"runs={tmp_path}")
    folder = tmp_path / f"{result['name']}-{result['identity']}"
    assert result["steps"] == 2
    assert np.isfinite(result["last"]["metrics"]["student/tiny/psnr"])
    student, notes = load_generator(folder / "generators" / "last" / "student.safetensors")
    assert student.scale == int(config.stem[1:])
    assert notes["step"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "samples", "result.json"} <= names


@pytest.mark.parametrize("variant", METHOD_VARIANTS, ids=lambda path: path.stem)
def test_every_cell_of_tables_1_to_3_trains(variant: Path, tiny: str, tmp_path: Path) -> None:
    result = trained(str(CONFIGS / "dssd" / "x4.yaml"), str(variant), tiny, f"runs={tmp_path}")
    assert result["last"]["step"] == 2
    if variant.stem == "supervision-first":
        teacher = next(tmp_path.glob("dssd-teacher-*"))
        row = json.loads((teacher / "metrics.jsonl").read_text().splitlines()[0])
        assert "teacher/encoder_lr2" in row
        assert "teacher/encoder_lr4" not in row


def test_a_teacher_is_trained_once_for_all_its_students(tiny: str, tmp_path: Path) -> None:
    dssd = str(CONFIGS / "dssd" / "x2.yaml")
    first = trained(dssd, tiny, f"runs={tmp_path}")
    [teacher] = tmp_path.glob("dssd-teacher-*")
    written = (teacher / "result.json").stat().st_mtime_ns
    second = trained(dssd, str(CONFIGS / "variants" / "vid-only.yaml"), tiny, f"runs={tmp_path}")
    assert first["teacher"] == second["teacher"] == teacher.name
    assert first["identity"] != second["identity"]
    assert (teacher / "result.json").stat().st_mtime_ns == written


def test_a_finished_run_is_not_trained_again(tiny: str, tmp_path: Path) -> None:
    arguments = (str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path}")
    first = trained(*arguments)
    [folder] = tmp_path.iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert trained(*arguments) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_run_asked_for_more_steps_is_named_with_the_way_on(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path}")
    trained(*arguments)
    [first] = tmp_path.iterdir()
    assert "differs from this run only in its length" not in capsys.readouterr().err
    more = trained(*arguments, "train.steps=3")
    said = capsys.readouterr().err
    assert f"{first} differs from this run only in its length (train.steps, train.epochs)" in said
    assert f"add init.student={first}\n" in said
    on = trained(*arguments, "train.steps=3", f"init.student={first}")
    assert on["identity"] != more["identity"]
    assert "differs from this run only in its length" not in capsys.readouterr().err


def test_the_result_counts_the_evaluations_that_the_best_is_chosen_from(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every 2 of 5 steps and at the end, stopped at none of them."""
    arguments = (str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path}", "train.steps=5", "eval.every=2")
    assert trained(*arguments)["evaluations"] == 3
    assert main([*arguments]) == 0
    assert "of 3 evaluations" in " ".join(capsys.readouterr().out.split())


def test_a_result_that_is_lost_is_written_again_without_training(tiny: str, tmp_path: Path) -> None:
    """What the message about a damaged one says; also of the teacher of the run that is asked for."""
    arguments = (str(CONFIGS / "dssd" / "x2.yaml"), tiny, f"runs={tmp_path}")
    first = trained(*arguments)
    student, teacher = tmp_path / f"dssd-x2-{first['identity']}", tmp_path / first["teacher"]
    trained_files = ("metrics.jsonl", "checkpoints/step-00000002/state.json", "generators/last/*.safetensors")
    for folder in (student, teacher):
        file = folder / "result.json"
        whole = json.loads(file.read_text())
        before = {path: path.stat().st_mtime_ns for name in trained_files[:2] for path in folder.glob(name)}
        weights = {path: path.read_bytes() for path in folder.glob(trained_files[2])}
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(
            UserError, match=rf"{folder.name}/result\.json: damaged \(.*; remove it, and the same command"
        ):
            trained(*arguments)
        file.unlink()
        assert trained(*arguments)["name"] == "dssd-x2"
        again = json.loads(file.read_text())
        assert again.pop("images_per_second") > 0
        assert whole.pop("images_per_second") > 0
        assert again == whole
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert {path: path.read_bytes() for path in weights} == weights


def test_a_run_folder_is_no_configuration(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"/run: is a run folder; its configuration is .*/run/config\.yaml"):
        load_run([str(tmp_path / "run"), tiny])
    with pytest.raises(UserError, match=r": is a folder; name a configuration file"):
        load_run([str(tmp_path), tiny])


def test_the_saved_configuration_is_the_same_run(tiny: str, tmp_path: Path) -> None:
    result = trained(
        str(CONFIGS / "dssd" / "x4.yaml"), str(CONFIGS / "variants" / "encoder-pisr.yaml"), tiny, f"runs={tmp_path}"
    )
    saved = tmp_path / f"{result['name']}-{result['identity']}" / "config.yaml"
    assert trained(str(saved)) == result


def test_a_run_starts_from_another_runs_weights(tiny: str, tmp_path: Path) -> None:
    config = str(CONFIGS / "fsrcnn" / "x4.yaml")
    first = trained(config, tiny, f"runs={tmp_path}")
    source = tmp_path / f"fsrcnn-x4-{first['identity']}"
    second = trained(config, tiny, f"runs={tmp_path}", f"init.student={source}", "method.optimizer.learning_rate=1e-30")
    assert second["identity"] != first["identity"]
    start = load_generator(source / "generators" / "last" / "student.safetensors")[0].state_dict()
    target = tmp_path / f"fsrcnn-x4-{second['identity']}"
    end = load_generator(target / "generators" / "last" / "student.safetensors")[0].state_dict()
    for name, tensor in end.items():
        np.testing.assert_allclose(tensor.numpy(), start[name].numpy(), atol=2e-5)  # the last step's 1e-5, twice


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=nowhere"], "nowhere: does not exist; pack one with"),
        (["data.eval.extra=nowhere"], "nowhere"),
        (["data.patch=480"], "smaller than data.patch=480"),
        (["data.patch=26"], "data.patch=26 is not a multiple of 4"),
        (["eval.select=set9"], "eval.select: 'set9' is not one of data.eval"),
        (["train.device=cuda"], "train.device: no CUDA device"),
        (["train.precision=fp16"], "fp16 needs a GPU"),
        (["train.accumulation=3"], "train.accumulation"),
        (["init.student=nowhere.safetensors"], "init.student: nowhere.safetensors does not exist"),
    ],
)
def test_what_cannot_work_is_one_line(tiny: str, tmp_path: Path, overrides: list[str], message: str) -> None:
    import torch

    if torch.cuda.is_available() and overrides[0].endswith(("cuda", "fp16")):
        pytest.skip("this machine has the GPU that is asked for")
    with pytest.raises(UserError, match=message):
        train(load_run([str(CONFIGS / "fsrcnn" / "x4.yaml"), tiny, f"runs={tmp_path / 'runs'}", *overrides]))
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_architecture_are_refused(tiny: str, tmp_path: Path) -> None:
    config, runs = str(CONFIGS / "fsrcnn" / "x2.yaml"), f"runs={tmp_path}"
    other = trained(config, tiny, str(CONFIGS / "variants" / "rgb.yaml"), runs)
    with pytest.raises(UserError, match="not the weights of this FSRCNN"):
        trained(config, tiny, runs, f"init.student={tmp_path / 'fsrcnn-x2-'}{other['identity']}")


def test_weights_of_another_residual_are_refused(tiny: str, tmp_path: Path) -> None:
    """All tensors fit, the function is another one."""
    config, runs = str(CONFIGS / "fsrcnn" / "x2.yaml"), f"runs={tmp_path}"
    other = trained(config, tiny, "method.residual=bicubic", runs)
    start = f"init.student={tmp_path / 'fsrcnn-x2-'}{other['identity']}"
    with pytest.raises(UserError, match=r"has the residual bicubic, this run has none; set method\.residual=bicubic"):
        trained(config, tiny, runs, start)
    assert trained(config, tiny, runs, start, "method.residual=bicubic")["steps"] == 2
    config = str(CONFIGS / "dssd" / "teacher_x2.yaml")
    teacher = trained(config, tiny, runs)
    start = f"init.teacher={tmp_path / 'dssd-teacher-x2-'}{teacher['identity']}"
    with pytest.raises(UserError, match="has the residual none, this run has bicubic"):
        trained(config, tiny, runs, start, "method.residual=bicubic")


def test_the_command_prints_the_result(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(CONFIGS / "fsrcnn" / "x3.yaml"), tiny, f"runs={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "student/tiny/psnr" in said.out
    # Two steps teach nothing: a reader is told what enlarging without a network comes to, as `evaluate` measures it.
    packed = load_run(words).config.data.eval["tiny"]
    expected = evaluate_sr(bicubic_upsampler(3), load_test_set(packed, 3), 3)
    [file] = tmp_path.glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["bicubic"] == {"tiny": expected.metrics}
    assert result["protocol"]["lr"] == {"tiny": load_test_set(packed, 3).lr}
    assert re.search(rf"bicubic/tiny/psnr\W+{expected.metrics['psnr']:.4f}", said.out)
    below = "dB below bicubic"
    assert below in said.err
    assert main(words) == 0  # finished: the same
    again = capsys.readouterr()
    assert re.search(rf"bicubic/tiny/psnr\W+{expected.metrics['psnr']:.4f}", again.out)
    assert below in again.err
    del result["bicubic"]  # of older code
    file.write_text(json.dumps(result))
    assert main(words) == 0
    assert "bicubic" not in "".join(capsys.readouterr())


@pytest.mark.distributed
def test_a_teacher_and_its_student_train_on_two_processes(tiny: str, tmp_path: Path) -> None:
    config = str(CONFIGS / "dssd" / "x4.yaml")
    with Ranks(2, lambda rank, ranks: main([config, tiny, f"runs={tmp_path / 'two'}"]), tmp_path / "said") as started:
        assert started.codes() == [0, 0], started.said(0)
    alone = trained(config, tiny, f"runs={tmp_path / 'one'}")
    name = f"{alone['name']}-{alone['identity']}"
    together = json.loads((tmp_path / "two" / name / "result.json").read_text())
    assert together["processes"] == 2
    assert together["last"]["metrics"] == pytest.approx(alone["last"]["metrics"], abs=1e-4)
    assert together["bicubic"] == alone["bicubic"]
    assert alone["bicubic"]["tiny"]["psnr"] > 0
    weights = [
        load_generator(tmp_path / ranks / name / "generators" / "last" / "student.safetensors")[0].state_dict()
        for ranks in ("one", "two")
    ]
    for key, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][key].numpy(), tensor.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.layer=expandng"], "method.layer: no layer 'expandng'; did you mean 'expanding'"),
        (["method.scale=2"], "teacher: its scale is 4, the student's is 2"),
        (["eval.select=set9"], "eval.select: 'set9'"),
        (["init.studnt=x.safetensors"], "init.studnt: the method has no such network; did you mean 'student'"),
        (["train.trackers=[tensorbord]"], "train.trackers: no tracker 'tensorbord'; did you mean 'tensorboard'"),
    ],
)
def test_a_wrong_student_is_refused_before_its_teacher_trains(
    tiny: str, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trained(str(CONFIGS / "dssd" / "x4.yaml"), tiny, f"runs={tmp_path / 'runs'}", *overrides)
    assert not (tmp_path / "runs").exists()


def test_images_held_out_choose_the_best_weights(tiny: str, tmp_path: Path) -> None:
    """One of three: the second. What is measured is what `evaluate` measures of that image alone."""
    overrides = ["data.held_out=1", "data.samples_per_epoch=2", f"runs={tmp_path}"]
    result = trained(str(CONFIGS / "fsrcnn" / "x4.yaml"), tiny, *overrides)
    assert result["protocol"]["selects"] == "student/held_out/psnr"
    assert result["protocol"]["chosen_by"] == "PSNR on held_out, 1 training image held out"
    assert result["protocol"]["test_sets"] == {"tiny": 3, "held_out": 1}
    folder = tmp_path / f"{result['name']}-{result['identity']}"
    student = load_generator(folder / "generators" / "last" / "student.safetensors")[0]
    rows = evaluate_sr(student, load_test_set(Path(tiny).parent / "packed", 4), 4).per_image
    assert result["last"]["metrics"]["student/held_out/psnr"] == pytest.approx(rows[1]["psnr"], abs=1e-4)


def test_a_set_that_validates_is_refused_when_it_is_trained_on(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(CONFIGS / "fsrcnn" / "x4.yaml"), tiny, f"runs={tmp_path / 'runs'}")
    with pytest.raises(UserError, match=r"packed: '0\.png' of the set tiny, which .* is trained on"):
        trained(*arguments, "eval.select=tiny")
    assert not (tmp_path / "runs").exists()
    result = trained(*arguments)  # nobody said that it should validate
    assert "chooses the best weights, is trained on" in capfd.readouterr().err
    assert result["protocol"]["chosen_by"] == "PSNR on tiny, a test set"


def test_a_run_that_was_begun_on_such_a_set_goes_on(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (str(CONFIGS / "fsrcnn" / "x4.yaml"), tiny, f"runs={tmp_path}", "eval.select=tiny")
    with monkeypatch.context() as earlier:
        earlier.setattr("hpcdistill.trainer.find_overlap", lambda *_: None)  # the code of another day
        result = trained(*arguments)
    (tmp_path / f"{result['name']}-{result['identity']}" / "result.json").unlink()
    assert trained(*arguments)["last"] == result["last"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.held_out=3"], "data.held_out=3: the training sets have 3 images, so none is left"),
        (["data.held_out=-1"], "data.held_out: "),
        (["data.held_out=1", "data.eval.held_out=x"], "data.eval.held_out: data.held_out has this name"),
        (["eval.select=held_out"], "eval.select: 'held_out' is not one of data.eval"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(tiny: str, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(str(CONFIGS / "fsrcnn" / "x4.yaml"), tiny, f"runs={tmp_path / 'runs'}", *overrides)
    assert not (tmp_path / "runs").exists()
