"""Checkpoints on disk: whole or absent, damaged ones passed over, nothing pickled."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import Regression, TableEvaluator, ToyGAN, fit, newest_tensors

from hpcdistill.errors import UserError
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.training.checkpoint import MANIFEST, Checkpoint, Checkpoints

TENSORS = {
    "networks/a": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)},
    "optimizers/a": {"weight.exp_avg": torch.ones(2, 3, dtype=torch.float64)},
    "memory/pool": {"images": torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))},
}
STATE = {"seconds": 1.5, "best": None, "means": {"sums": {"loss": 0.1 + 0.2}, "counts": {"loss": 2}}}
FILES = {"best/a.safetensors": b"\x02\0\0\0\0\0\0\0{}"}  # an empty safetensors file, kept to the byte
NAMES = [*(f"{name}.safetensors" for name in TENSORS), "best/a.safetensors", "state.json", MANIFEST]


def save(checkpoints: Checkpoints, step: int) -> None:
    tensors = {name: {key: value + step for key, value in values.items()} for name, values in TENSORS.items()}
    checkpoints.save(step, tensors, STATE, FILES)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Steps 10 and 20 are there."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        save(checkpoints, step)
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    """Everything in the folder, hidden entries too."""
    return sorted(entry.name for entry in checkpoints.folder.iterdir())


def assert_holds(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.state["step"], found.path.name) == (step, step, f"step-{step:08d}")
    assert {key: value for key, value in found.state.items() if key != "step"} == STATE
    assert found.files["best/a.safetensors"] == FILES["best/a.safetensors"]
    for name, values in TENSORS.items():
        for key, value in values.items():
            loaded = found.tensors[name][key]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value + step)


def test_what_is_saved_comes_back(checkpoints: Checkpoints) -> None:
    assert_holds(checkpoints.newest(), 20)
    assert names(checkpoints) == ["step-00000010", "step-00000020"]
    folder = checkpoints.folder / "step-00000020"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(NAMES)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing").newest() is None
    assert not (tmp_path / "nothing").exists()


def test_the_newest_two_are_kept(checkpoints: Checkpoints) -> None:
    for step in (30, 40):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-00000030", "step-00000040"]
    save(Checkpoints(checkpoints.folder, keep=1), 50)
    assert names(checkpoints) == ["step-00000050"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, missing, a_folder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_one_before_a_damaged_one_is_taken(
    name: str, damage: Callable[[Path], None], checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoints.folder / "step-00000020" / name)
    assert_holds(checkpoints.newest(), 10)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"warning: {checkpoints.folder / 'step-00000020'}: damaged (")
    assert message.endswith("; taking step-00000010\n")


@pytest.mark.parametrize("content", ["null", "3", "[]", '"text"', "{}", '{"state.json": 1}', '["state.json"]'])
def test_a_manifest_that_is_json_of_another_kind(content: str, checkpoints: Checkpoints) -> None:
    (checkpoints.folder / "step-00000020" / MANIFEST).write_text(content)
    assert_holds(checkpoints.newest(), 10)


def test_every_single_bit_of_the_manifest_counts(checkpoints: Checkpoints) -> None:
    manifest = checkpoints.folder / "step-00000020" / MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        manifest.write_bytes(content)
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 10, f"byte {place}"


def test_all_damaged_is_a_fresh_start_that_says_so(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in checkpoints.folder.iterdir():
        truncated(folder / "state.json")
    assert checkpoints.newest() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("taking step-00000010")
    assert lines[1].endswith("no checkpoint is whole: starting again from step 0")


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        """From the thirteenth file on there is room for half of it."""
        written.append(path)
        if len(written) <= 12:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path, 9, checkpoint_every=2)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    fit(tmp_path, 9, checkpoint_every=2)
    fit(tmp_path / "undisturbed", 9, checkpoint_every=2)
    assert newest_tensors(tmp_path) == newest_tensors(tmp_path / "undisturbed")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    fit(tmp_path, 3, ToyGAN(), ema=0.5, checkpoint_every=2)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file() and "lock" not in path.name}
    assert kinds == {".safetensors", ".json", ".jsonl", ".yaml"}
    newest = tmp_path / "checkpoints" / "step-00000003"
    assert sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()) == [
        "averages/painter.safetensors",
        MANIFEST,
        "memory/pool.safetensors",
        "networks/discriminator.safetensors",
        "networks/generator.safetensors",
        "optimizers/discriminator.safetensors",
        "optimizers/generator.safetensors",
        "state.json",
    ]
    for path in newest.rglob("*.safetensors"):  # a header length, then JSON; pickles begin with 0x80 or PK
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert isinstance(json.loads(content[8 : 8 + length]), dict)


def wider() -> Regression:
    method = Regression()
    method.line.linear = nn.Linear(5, 1).double()
    return method


def deeper() -> Regression:
    method = Regression()
    method.line.add_module("more", nn.Linear(1, 1))
    return method


def renamed() -> Regression:
    method = Regression()
    method.groups = {"other": method.groups["line"]}
    return method


def remembering() -> Regression:
    method = Regression()
    method.memory = {"pool": ToyGAN().pool}
    return method


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (wider, {}, r"networks/line.*not the weights of this Line: linear\.weight is \[1, 4\] instead of \[1, 5\]"),
        (deeper, {}, r"networks/line.*not the weights of this Line: more\.weight is missing"),
        (renamed, {}, "step-00000004: a checkpoint of another method: it holds no networks/other"),
        (remembering, {}, "step-00000004: a checkpoint of another method: it holds no memory/pool"),
        (Regression, {"ema": 0.5}, "step-00000004: a checkpoint of another method: it holds no averages/line"),
        (lambda: PlainSR(PlainSR.Config(scale=2)), {}, "it holds no networks/student"),
    ],
)
def test_a_checkpoint_of_another_architecture(
    build: Callable[[], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fit(tmp_path, 9, checkpoint_every=2, killed=5)
    with pytest.raises(UserError, match=message) as error:
        fit(tmp_path, 9, build(), **options)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_best_weights_come_from_the_checkpoint_when_their_file_is_gone(tmp_path: Path) -> None:
    options = {"evaluator": TableEvaluator({2: 5.0}), "evaluate_every": 2, "checkpoint_every": 4}
    fit(tmp_path, 9, killed=5, **options)
    file = tmp_path / "generators" / "best" / "line.safetensors"
    content = file.read_bytes()
    shutil.rmtree(file.parent)
    fit(tmp_path, 9, **options)
    assert file.read_bytes() == content


def test_a_frozen_part_of_a_group_is_saved_too(tmp_path: Path) -> None:
    """Adam holds no state for what never got a gradient; the rest resumes all the same."""

    def build() -> Regression:
        method = Regression()
        method.line.linear.bias.requires_grad_(False)
        return method

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    fit(undisturbed, 6, build(), checkpoint_every=3)
    fit(killed, 6, build(), checkpoint_every=3, killed=4)
    fit(killed, 6, build(), checkpoint_every=3)
    assert newest_tensors(killed) == newest_tensors(undisturbed)
    found = Checkpoints(killed / "checkpoints").newest()
    assert found is not None
    assert "linear.bias.exp_avg" not in found.tensors["optimizers/line"]
    assert torch.equal(found.tensors["networks/line"]["linear.bias"], build().line.linear.bias)


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a folder of the final name is whole: every file and folder was synced before it got it."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, 1)
    renamed_at = events.index("rename")
    files = {Path(name).name for name in NAMES}
    assert files <= set(events[:renamed_at])
    assert {"networks", "optimizers", "memory", "best"} <= set(events[:renamed_at])
    assert events[renamed_at + 1 :] == ["checkpoints"]
