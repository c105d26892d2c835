"""An interrupted run goes on to the same end: killed or stopped, at any step, whatever it was doing."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    BATCH,
    SEED,
    Killed,
    Regression,
    TableEvaluator,
    ToyGAN,
    ToyReader,
    fit,
    gan_samples,
    kill_at,
    newest_tensors,
    regression_samples,
    rows,
    run,
    saved,
    sr_samples,
    states_equal,
)
from translation import cyclegan, distilled, pix2pix, samples, wavelet_kd

from hpcdistill.methods.base import Method, OptimizerSettings
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.models.privileged import PrivilegedTeacher

STEPS = 17


def teacher() -> Method:
    torch.manual_seed(SEED)
    return PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(scale=4, tie_sdm=True))


def student() -> Method:
    torch.manual_seed(SEED)
    frozen = {"teacher": PrivilegedTeacher(2)}
    return PrivilegedStudent(PrivilegedStudent.Config(scale=2, weight_vid=0.1), frozen)


CASES: dict[str, tuple[Callable[[], Method], Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "plain": (Regression, regression_samples, {}),
    "dropout": (lambda: Regression(dropout=0.5), regression_samples, {}),
    "ema": (Regression, regression_samples, {"ema": 0.9}),
    "accumulation": (lambda: Regression(dropout=0.5), regression_samples, {"accumulation": 2}),
    "linear": (lambda: Regression(OptimizerSettings(schedule="linear", clip_norm=0.1)), regression_samples, {}),
    "gan": (lambda: ToyGAN(norm=True), gan_samples, {"ema": 0.5}),
    "student": (student, sr_samples, {}),
    "student-channels-last": (student, sr_samples, {"channels_last": True}),
    "student-bf16": (student, sr_samples, {"precision": "bf16"}),
    "teacher-channels-last": (teacher, sr_samples, {"channels_last": True, "ema": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_bit_equal(case: str, tmp_path: Path) -> None:
    build, samples, options = CASES[case]
    batch = 2 if samples is sr_samples else BATCH
    options = {"checkpoint_every": 5, "log_every": 2, "gradient_norms_every": 3, **options}
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(build(), ToyReader(batch, samples), undisturbed, STEPS, **options)
    # Killed before a checkpoint, right after one, with lines after one, and with a mean half gathered.
    for step in (3, 5, 9, 14):
        with pytest.raises(Killed):
            run(build(), ToyReader(batch, samples, before=kill_at(step)), disturbed, STEPS, **options)
    first_steps: list[int] = []
    run(build(), ToyReader(batch, samples, before=first_steps.append), disturbed, STEPS, **options)
    assert first_steps[0] == 10
    assert newest_tensors(disturbed) == newest_tensors(undisturbed)  # bytes
    for file in (undisturbed / "generators" / "last").iterdir():
        assert states_equal(saved(disturbed, name=file.stem), saved(undisturbed, name=file.stem))
    lines = rows(undisturbed)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    assert rows(disturbed) == lines


GANS: dict[str, Callable[[], Method]] = {
    "cyclegan": cyclegan,
    "pix2pix": pix2pix,
    "fesd": distilled,
    "fesd of pairs": lambda: distilled(family="pix2pix", mix_spectral=True),
    "fesd of pieces": lambda: distilled(spectrum="crop", mix_spectral=True),
    "fesd of maps": lambda: distilled(spectrum="maps"),
    "wavelet kd": wavelet_kd,
    "wavelet kd of pairs": lambda: wavelet_kd(family="pix2pix"),
}


@pytest.mark.parametrize("name", GANS)
def test_a_killed_gan_resumes_bit_equal(name: str, tmp_path: Path) -> None:
    """With its pools, projections and spectral norms."""
    options: dict[str, Any] = {"checkpoint_every": 2, "log_every": 2, "gradient_norms_every": 3}
    for folder, killed in (("undisturbed", None), ("killed", 3), ("killed", None)):
        reader = ToyReader(2, samples, before=kill_at(killed) if killed else None)
        with pytest.raises(Killed) if killed else contextlib.nullcontext():
            run(GANS[name](), reader, tmp_path / folder, 5, **options)
    tensors = newest_tensors(tmp_path / "killed")
    memory = {
        "cyclegan": "pool_generator",
        "wavelet kd": "pool_student",
        "fesd": "pool_student",
        "fesd of pairs": "projections",
    }.get(name)
    assert memory is None or f"memory/{memory}.safetensors" in tensors
    assert tensors == newest_tensors(tmp_path / "undisturbed")  # bytes
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")


def test_channels_last_trains_as_contiguous(tmp_path: Path) -> None:
    for channels_last in (False, True):
        run(student(), ToyReader(4, sr_samples), tmp_path / str(channels_last), 4, channels_last=channels_last)
    first, second = (saved(tmp_path / name, name="student") for name in ("False", "True"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    options: dict[str, Any] = {"evaluator": TableEvaluator({6: 2.0, 12: 1.0}), "evaluate_every": 6, "log_every": 4}
    fit(undisturbed, STEPS, **options)

    def before(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    outcome = fit(stopped, STEPS, before=before, **options)
    assert signal.getsignal(number) is handler
    assert (outcome.finished, outcome.position.step) == (False, 7)
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-00000007"]
    assert not list((stopped / "generators" / "last").iterdir())
    outcome = fit(stopped, STEPS, **options)
    assert outcome.finished
    assert outcome.position.best == {"step": 6, "metrics": {"score": 2.0}}
    assert newest_tensors(stopped) == newest_tensors(undisturbed)
    assert rows(stopped) == rows(undisturbed)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def before(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, STEPS, before=before)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_signal_in_the_last_step_does_not_undo_the_end(tmp_path: Path) -> None:
    def before(step: int) -> None:
        if step == STEPS - 1:
            signal.raise_signal(signal.SIGTERM)

    outcome = fit(tmp_path, STEPS, before=before)
    assert outcome.finished
    assert saved(tmp_path)["age"] == STEPS


def test_a_run_killed_between_its_last_checkpoint_and_its_result(tmp_path: Path) -> None:
    fit(tmp_path, STEPS, evaluator=TableEvaluator({}))
    expected, lines = saved(tmp_path), rows(tmp_path)
    (tmp_path / "generators" / "last" / "line.safetensors").unlink()
    outcome = fit(tmp_path, STEPS, evaluator=TableEvaluator({}))
    assert outcome.finished
    assert outcome.position.best is not None
    assert states_equal(saved(tmp_path), expected)
    assert rows(tmp_path) == lines


def test_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    for name in ("generators/best/.line.safetensors.123.tmp", ".config.yaml.9.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints" / ".step-00000003.77.tmp" / "networks").mkdir(parents=True)
    fit(tmp_path, 2)
    assert [path for path in tmp_path.rglob(".*") if path.name.endswith(".tmp")] == []


def test_the_damaged_newest_checkpoint_costs_its_steps_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed, damaged = tmp_path / "undisturbed", tmp_path / "damaged"
    table = TableEvaluator({2: 3.0, 4: 1.0, 6: 2.0, 10: 9.0})
    options: dict[str, Any] = {"checkpoint_every": 4, "log_every": 3, "evaluator": table, "evaluate_every": 2}
    fit(undisturbed, STEPS, **options)
    fit(damaged, STEPS, killed=13, **options)
    newest = damaged / "checkpoints" / "step-00000012"
    (newest / "state.json").write_bytes((newest / "state.json").read_bytes()[:-9])
    assert saved(damaged, "best")["age"] == 10
    steps: list[int] = []

    def before(step: int) -> None:
        if not steps:  # the best weights are those of the checkpoint too, not of the session that was lost
            assert saved(damaged, "best")["age"] == 2
        steps.append(step)

    capsys.readouterr()
    fit(damaged, STEPS, before=before, **options)
    message = capsys.readouterr().err
    assert "step-00000012: damaged (ValueError: state.json does not have the digest" in message
    assert "taking step-00000008" in message
    assert steps[0] == 8
    assert newest_tensors(damaged) == newest_tensors(undisturbed)
    assert states_equal(saved(damaged, "best"), saved(undisturbed, "best"))
    assert rows(damaged) == rows(undisturbed)
