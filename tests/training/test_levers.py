"""What makes a step faster trains what the plain step trains: the losses of 200 steps are the same to rounding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_methods import SCALE, build, samples_of
from toy import Killed, ToyReader, kill_at, newest_tensors, rows, run, saved, sr_samples, states_equal
from translation import cyclegan

from hpcdistill.methods.base import Method
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.ops import own_backward
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.layout import Layout, faster_layout, take_layout

STEPS, EVERY, BATCH = 200, 10, 2


def pisr_teacher() -> Method:
    torch.manual_seed(0)
    config = PrivilegedTeacherTraining.Config(scale=SCALE, encoder="pisr", degradation="none", weight_fre=0.3)
    return PrivilegedTeacherTraining(config).double()


BUILDS: dict[str, Callable[[Path], Method]] = {
    "plain_sr": lambda vgg: build("plain_sr", vgg),
    "pisr_teacher": lambda vgg: pisr_teacher(),
    "privileged_teacher": lambda vgg: build("privileged_teacher", vgg),
    "privileged_student": lambda vgg: build("privileged_student", vgg),
}


def losses(method: Method, folder: Path, single: bool, channels_last: bool) -> NDArray[np.float64]:
    """The weighted loss terms, a row a line: each the mean over its steps. They are logged as float32."""
    double = samples_of("plain_sr")
    method = method.float() if single else method
    samples = (lambda numbers: {key: value.float() for key, value in double(numbers).items()}) if single else double
    run(method, ToyReader(BATCH, samples), folder, STEPS, log_every=EVERY, channels_last=channels_last)
    [phase] = method.phases
    return np.array(
        [[value for key, value in line.items() if key.startswith(f"{phase.name}/")] for line in rows(folder)]
    )


@pytest.mark.parametrize("name", BUILDS)
def test_both_levers_over_200_steps(name: str, tmp_path: Path, vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where rounding has no time to grow: the logged losses are those of the plain step."""
    monkeypatch.setattr(own_backward, "LARGE_IMAGE", 1)  # the strides' phases too
    fast = losses(BUILDS[name](vgg), tmp_path / "fast", False, True)
    monkeypatch.setattr(own_backward, "_is_ours", lambda x, weight: False)
    plain = losses(BUILDS[name](vgg), tmp_path / "plain", False, False)
    assert plain.shape[0] == STEPS // EVERY
    np.testing.assert_allclose(fast, plain, rtol=3e-7)
    assert not states_equal(*(saved(tmp_path / which, name=generator(name)) for which in ("fast", "plain")))  # on


def generator(name: str) -> str:
    return "teacher" if name.endswith("teacher") else "student"


# float32 rounds 5e8 times as coarsely, and training makes differences grow: the largest found was 1.5e-3, of a term
# that passes zero.
def test_each_lever_in_float32(tmp_path: Path, vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_it = BUILDS["privileged_student"]
    backward = losses(build_it(vgg), tmp_path / "backward", True, False)
    monkeypatch.setattr(own_backward, "_is_ours", lambda x, weight: False)
    plain, layout = (losses(build_it(vgg), tmp_path / str(last), True, last) for last in (False, True))
    for lever in (layout, backward):
        assert not np.array_equal(lever, plain)  # it was on
        np.testing.assert_allclose(lever, plain, rtol=5e-3)


# --- the layout that is taken ----------------------------------------------------------------------------------------


def plain_sr() -> Method:
    torch.manual_seed(0)
    return PlainSR(PlainSR.Config(scale=2))


def test_auto_is_what_was_measured_for_the_network_and_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for method in (plain_sr(), pisr_teacher(), *(PlainSR(PlainSR.Config(scale=2, network=n)) for n in ("vdsr", "idn"))):
        assert (faster_layout(method, cpu), faster_layout(method, gpu)) == ("channels_last", "contiguous")
    assert faster_layout(cyclegan(), cpu) == "contiguous"


def test_a_setting_decides_and_a_checkpoint_goes_before_the_table() -> None:
    method, cpu = plain_sr(), torch.device("cpu")
    taken = {
        (setting, started): take_layout(TrainConfig(channels_last=setting), method, cpu, started)
        for setting in (True, False, "auto")
        for started in (None, "contiguous", "channels_last")
    }
    assert {layout for (setting, _), layout in taken.items() if setting is True} == {"channels_last"}
    assert {layout for (setting, _), layout in taken.items() if setting is False} == {"contiguous"}
    assert taken["auto", None] == taken["auto", "channels_last"] == "channels_last"
    assert taken["auto", "contiguous"] == "contiguous"


def test_another_layout_for_a_run_that_goes_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    method, cpu = plain_sr(), torch.device("cpu")
    for started in (None, "channels_last"):
        take_layout(TrainConfig(channels_last=True), method, cpu, started)
    assert capsys.readouterr().err == ""
    take_layout(TrainConfig(channels_last=True), method, cpu, "contiguous")
    assert "train.channels_last=true: this run has been contiguous so far" in capsys.readouterr().err


@pytest.mark.parametrize("started", ["contiguous", "channels_last", None])
def test_a_run_goes_on_in_its_layout(started: Layout | None, tmp_path: Path) -> None:
    """None: a checkpoint of before the setting could be `auto`, when contiguous was what was taken."""
    options = {"checkpoint_every": 2, "log_every": 2}
    last = started == "channels_last"
    run(plain_sr(), ToyReader(4, sr_samples), tmp_path / "whole", 6, channels_last=last, **options)
    reader = ToyReader(4, sr_samples, before=kill_at(5))
    with pytest.raises(Killed):
        run(plain_sr(), reader, tmp_path / "run", 6, channels_last=last, **options)
    if started is None:
        for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
            forget_layout(state)
    outcome = run(plain_sr(), ToyReader(4, sr_samples), tmp_path / "run", 6, channels_last="auto", **options)
    assert outcome.position.layout == ("channels_last" if last else "contiguous")
    assert newest_tensors(tmp_path / "run") == newest_tensors(tmp_path / "whole")  # bytes


def forget_layout(state: Path) -> None:
    """Make the checkpoint one of before there was a word for it."""
    content = state.read_bytes()
    values = json.loads(content)
    del values["layout"]
    older = json.dumps(values).encode()
    state.write_bytes(older)
    manifest = state.with_name("manifest.json")
    digests = manifest.read_text()
    was, now = (hashlib.sha256(one).hexdigest() for one in (content, older))
    assert was in digests
    manifest.write_text(digests.replace(was, now))
