"""`train.precision: auto`: what is taken, recorded and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from toy import SEED, Killed, ToyReader, kill_at, run, sr_samples

from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.settings import identity_values
from hpcdistill.training import accelerator as accelerator_module
from hpcdistill.training.accelerator import (
    has_native_bf16,
    make_accelerator,
    precision_of,
    started_with,
    take_precision,
)
from hpcdistill.training.config import TrainConfig


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((10, 0), True)])
def test_bf16_from_compute_capability_8_on(
    capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bf16(torch.device("cuda", 0)) is native
    assert not has_native_bf16(torch.device("cpu"))


def test_what_auto_takes_is_said_where_a_run_has_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert take_precision("fp16", True, tmp_path) == "fp16"
    assert take_precision("auto", True) == "fp32"
    assert capsys.readouterr().err == ""
    assert take_precision("auto", True, tmp_path) == "fp32"
    assert capsys.readouterr().err == "train.precision: auto takes fp32 on a CPU\n"
    monkeypatch.setattr(accelerator_module, "has_native_bf16", lambda device: True)
    assert take_precision("auto", True, tmp_path) == "bf16"
    assert capsys.readouterr().err == "train.precision: auto takes bf16 on a CPU\n"
    assert PartialState().device == torch.device("cpu")


def checkpoint(folder: Path, step: int, state: str) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(state)


def test_a_run_keeps_what_its_newest_readable_checkpoint_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started_with(tmp_path) is None
    checkpoint(tmp_path, 1, json.dumps({"step": 1}))  # of before there was a word for it
    assert started_with(tmp_path) is None
    checkpoint(tmp_path, 2, json.dumps({"precision": "bf16"}))
    for step, damaged in enumerate(('{"precision": "fp', '{"precision": "bf61"}', "[1]", '{"precision": 16}'), 3):
        checkpoint(tmp_path, step, damaged)
    assert started_with(tmp_path) == "bf16"
    assert take_precision("auto", True, tmp_path) == "bf16"
    assert capsys.readouterr().err == (
        "train.precision: auto keeps bf16, which this run started with\n"
        "warning: train.precision: a CPU does not compute in bf16 natively; this run goes on slowly here\n"
    )
    assert take_precision("fp32", True, tmp_path) == "fp32"


def test_the_identity_holds_the_word() -> None:
    assert identity_values(TrainConfig(precision="auto", deterministic=True)) == {"precision": "auto"}
    assert identity_values(TrainConfig()) == {}


def test_an_auto_run_goes_on_in_the_precision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where bf16 is native, killed, gone on with on a device without it."""

    def method() -> PlainSR:
        torch.manual_seed(SEED)
        return PlainSR(PlainSR.Config(scale=2))

    options = {"checkpoint_every": 2}
    monkeypatch.setattr(accelerator_module, "has_native_bf16", lambda device: True)
    whole = run(method(), ToyReader(4, sr_samples), tmp_path / "whole", 4, precision="bf16", **options)
    with pytest.raises(Killed):
        run(method(), ToyReader(4, sr_samples, before=kill_at(3)), tmp_path / "run", 4, precision="auto", **options)
    monkeypatch.undo()
    assert started_with(tmp_path / "run") == "bf16"
    accelerator = make_accelerator(TrainConfig(device="cpu", precision="auto", trackers=()), tmp_path / "run")
    assert precision_of(accelerator) == "bf16"
    assert whole.position.precision == "bf16"
    taken = take_precision("auto", True, tmp_path / "run")
    outcome = run(method(), ToyReader(4, sr_samples), tmp_path / "run", 4, precision=taken, **options)
    assert outcome.position.precision == "bf16"
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-00000004" / "manifest.json").read_text())
        for name in ("whole", "run")
    ]
    assert states[0]["networks/student.safetensors"] == states[1]["networks/student.safetensors"]
