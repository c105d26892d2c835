"""Checkpoints under attack: killed or refused at every call of the system, flipped bits, a disk that is really full."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from toy import (
    BATCH,
    Regression,
    ToyGAN,
    ToyReader,
    fit,
    newest_tensors,
    regression_samples,
    rows,
    states_equal,
)

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Carry, Progress
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.checkpoint import MANIFEST, Checkpoint, Checkpoints
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.networks import Networks
from hpcdistill.training.position import Position, save_checkpoint
from hpcdistill.training.run_folder import RunFolder

SEED = 20261122
WEIGHTS = torch.arange(6.0).view(2, 3)
BEST = b"\x02\0\0\0\0\0\0\0{}"  # an empty safetensors file
FILES = ["networks/a.safetensors", "best/a.safetensors", "state.json", MANIFEST]
# The functions by which a save changes the disk, and those by which it only looks.
CHANGES = {"mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "truncate"}
LOOKS = {"close", "posix_fadvise", "read", "readinto", "stat", "lstat", "fstat", "scandir", "listdir"}


def save(checkpoints: Checkpoints, step: int, version: int = 0) -> None:
    checkpoints.save(step, {"networks/a": {"weight": WEIGHTS + step + version}}, {"version": version}, {FILES[1]: BEST})


def held(found: Checkpoint | None) -> tuple[int, int]:
    """(step, version) of a checkpoint whose content is that of this step and version."""
    assert found is not None
    version: int = found.state["version"]
    assert torch.equal(found.tensors["networks/a"]["weight"], WEIGHTS + found.step + version)
    assert found.files[FILES[1]] == BEST
    return found.step, version


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Strike:
    """A profile function that strikes at the n-th call of `functions`; a write is then half done."""

    def __init__(self, at: int, functions: set[str], act: Callable[[], None]) -> None:
        self.at, self.functions, self.act, self.touches, self.struck = at, functions, act, 0, ""

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ not in self.functions or self.struck:
            return
        if self.touches == self.at:
            self.struck = function.__name__
            if self.struck == "write":
                content = frame.f_locals["view"]
                function.__self__.raw.write(content[: len(content) // 2])
            self.act()
        self.touches += 1


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: hundreds of saves wait for fsync."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- what a save may find in the folder, and what it saves: (step, version) ------------------------------------------


def two(folder: Path) -> None:
    for step in (10, 20):
        save(Checkpoints(folder), step)


def one_damaged(folder: Path) -> None:
    two(folder)
    (folder / "step-00000020" / "state.json").unlink()


def half_replaced(folder: Path) -> None:
    """Killed between the two renames of a replacement."""
    two(folder)
    (folder / "step-00000020").rename(folder / ".step-00000020.replaced")


def replaced_and_new(folder: Path) -> None:
    """Killed after the second rename; the replaced one is damaged, which is why it was replaced."""
    half_replaced(folder)
    save(Checkpoints(folder), 20, 1)
    shutil.copytree(folder / "step-00000020", folder / ".step-00000020.replaced")
    (folder / ".step-00000020.replaced" / "state.json").unlink()


SITUATIONS: dict[str, tuple[Callable[[Path], None], tuple[int, int], tuple[int, int]]] = {
    "next": (two, (20, 0), (30, 0)),
    "again": (two, (20, 0), (20, 1)),
    "over a damaged one": (one_damaged, (10, 0), (20, 1)),
    "after half a replacement": (half_replaced, (20, 0), (20, 1)),
    "after a whole replacement": (replaced_and_new, (20, 1), (30, 0)),
}


def attempts(
    situation: str, root: Path, attempt: Callable[[Checkpoints, int, tuple[int, int]], bool]
) -> Iterator[tuple[int, Path]]:
    """Strike at the first call, the second and so on, each in a fresh folder, until a save is not struck."""
    prepare, before, after = SITUATIONS[situation]
    prepare(root / "template")
    for at in range(10_000):
        folder = root / "work"
        shutil.copytree(root / "template", folder)
        checkpoints = Checkpoints(folder)
        assert held(checkpoints.newest()) == before
        struck = attempt(checkpoints, at, after)
        if not struck:
            assert held(Checkpoints(folder).newest()) == after
            assert not [name for name in names(folder) if name.startswith(".")]
            return
        yield at, folder
        shutil.rmtree(folder)


def check(situation: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """A checkpoint is there, whole, one of the two expected; nothing else is mistaken for one; the next save works."""
    _, before, after = SITUATIONS[situation]
    capsys.readouterr()
    checkpoints = Checkpoints(folder)
    now = held(checkpoints.newest())
    assert now in (before, after)
    warnings = capsys.readouterr().err
    assert warnings == "" or (situation == "over a damaged one" and now == before and warnings.count("\n") == 1)
    assert held(checkpoints.read(now[0])) == now  # what another rank does
    for path in folder.glob("step-*"):
        if not (situation == "over a damaged one" and now == before and path.name == "step-00000020"):
            held(checkpoints.read(int(path.name[5:])))  # none is half removed
    save(checkpoints, 40)
    assert held(Checkpoints(folder).newest()) == (40, 0)
    kept = names(folder)
    assert kept[-1] == "step-00000040"
    assert kept == [f"step-{now[0]:08d}", "step-00000040"]
    assert held(checkpoints.read(now[0])) == now
    assert capsys.readouterr().err == ""
    return now


@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed_at_every_change_of_the_disk(situation: str, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(checkpoints: Checkpoints, at: int, after: tuple[int, int]) -> bool:
        child = os.fork()
        if child == 0:
            try:
                sys.setprofile(Strike(at, CHANGES, die))
                save(checkpoints, *after)
                sys.setprofile(None)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)

    outcomes = [check(situation, folder, capsys) for _, folder in attempts(situation, quick, attempt)]
    _, before, after = SITUATIONS[situation]
    assert {before, after} == set(outcomes)
    assert outcomes == sorted(outcomes), "once the new one is there it stays"
    with capsys.disabled():
        print(f"\nkilled inside a save ({situation}): {len(outcomes)} moments, a checkpoint was always whole")


@pytest.mark.parametrize("situation", SITUATIONS)
def test_refused_at_every_touch_of_the_disk(situation: str, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = 0

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    caught: list[tuple[OSError, int]] = []

    def attempt(checkpoints: Checkpoints, at: int, after: tuple[int, int]) -> bool:
        nonlocal code
        code = (errno.ENOSPC, errno.EDQUOT, errno.EIO)[at % 3]
        strike = Strike(at, CHANGES | LOOKS, refuse)
        try:
            sys.setprofile(strike)
            save(checkpoints, *after)
        except OSError as error:
            caught.append((error, code))
        finally:
            sys.setprofile(None)
        return bool(strike.struck)

    count = 0
    for _, folder in attempts(situation, quick, attempt):
        check(situation, folder, capsys)
        count += 1
    # The others fell into what may fail: removing a folder that counts no more.
    assert len(caught) > 30
    assert all(error.errno == code and error.filename for error, code in caught)
    with capsys.disabled():
        print(
            f"\nENOSPC, EDQUOT, EIO inside a save ({situation}): {count} places, {len(caught)} ended it, none did harm"
        )


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flips = 60
    two(tmp_path)
    checkpoints, file = Checkpoints(tmp_path), tmp_path / "step-00000020" / name
    whole, chance = file.read_bytes(), random.Random(f"{SEED} {name}")
    for _ in range(flips):
        content = bytearray(whole)
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        assert held(checkpoints.newest()) == (10, 0), f"bit {bit} of byte {place}"
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(UserError, match="this rank cannot"):
            checkpoints.read(20)
    file.write_bytes(whole)
    assert held(checkpoints.newest()) == (20, 0)
    with capsys.disabled():
        print(f"\nflipped bits in {name}: {flips} of {flips} noticed (seed {SEED})")


def test_a_tensor_file_that_the_manifest_does_not_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two(tmp_path)
    shutil.copy(tmp_path / "step-00000010" / FILES[0], tmp_path / "step-00000020" / "networks" / "b.safetensors")
    assert held(Checkpoints(tmp_path).newest()) == (10, 0)
    assert "networks/b.safetensors is not in manifest.json); taking step-00000010" in capsys.readouterr().err


def test_a_checkpoint_under_the_name_of_another_step(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "step-00000020").rename(tmp_path / "step-00000030")
    assert held(Checkpoints(tmp_path).newest()) == (10, 0)


def test_other_names_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    two(tmp_path)
    shutil.copytree(tmp_path / "step-00000020", tmp_path / "step-00000020.copy")
    (tmp_path / "step-of-mine").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert held(checkpoints.newest()) == (20, 0)
    for step in (30, 40):
        save(checkpoints, step)
    assert names(tmp_path) == ["step-00000020.copy", "step-00000030", "step-00000040", "step-of-mine"]


@pytest.mark.parametrize("step", [15, 25])
def test_a_damaged_one_takes_no_place_of_a_whole_one(step: int, tmp_path: Path) -> None:
    one_damaged(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert held(checkpoints.newest()) == (10, 0)
    save(checkpoints, step)  # the damaged 20 is newer or older than it
    assert names(tmp_path) == ["step-00000010", f"step-{step:08d}"]


def test_the_replaced_one_stays_while_the_new_one_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut in the middle of a replacement."""
    two(tmp_path)
    shutil.copytree(tmp_path / "step-00000020", tmp_path / ".step-00000020.replaced")
    (tmp_path / "step-00000020" / FILES[0]).write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    assert held(checkpoints.newest()) == held(checkpoints.read(20)) == (20, 0)
    assert capsys.readouterr().err.endswith("taking .step-00000020.replaced\n")
    save(checkpoints, 30)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert held(checkpoints.read(20)) == (20, 0)
    assert held(checkpoints.newest()) == (30, 0)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_cannot_be_read_now_is_not_called_damaged(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(tmp_path)

    def refuse(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(OSError, match="step-00000020") as error:
            Checkpoints(tmp_path).newest()
    assert error.value.errno == code
    assert held(Checkpoints(tmp_path).newest()) == (20, 0)


def test_read_names_a_step_that_is_not_there(tmp_path: Path) -> None:
    two(tmp_path)
    with pytest.raises(UserError, match=r"step-00000030: rank 0 .*it is not there.*`runs` folder"):
        Checkpoints(tmp_path).read(30)


def test_a_disk_that_gives_back_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently: every call succeeds, only reading back tells."""
    two(tmp_path)
    write = Path.write_bytes

    def lie(path: Path, content: bytes) -> int:
        return write(path, content[:-1] + bytes([content[-1] ^ 1]) if path.name == "a.safetensors" else content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lie)
        with pytest.raises(OSError, match=r"reads back differently.*networks/a\.safetensors") as error:
            save(Checkpoints(tmp_path), 30)
    assert error.value.errno == errno.EIO
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert held(Checkpoints(tmp_path).newest()) == (20, 0)


# --- in the background ---------------------------------------------------------------------------------------------


class Gate:
    """Holds a background save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        real = Checkpoints._save

        def held_back(*arguments: Any) -> None:
            assert self.open.wait(30)
            real(*arguments)

        monkeypatch.setattr(Checkpoints, "_save", held_back)


def test_what_is_saved_in_the_background_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on changing weights, moments and position while the thread writes."""
    gate = Gate(monkeypatch)
    config = TrainConfig(device="cpu", trackers=(), batch_size=BATCH)
    method, accelerator = Regression(), make_accelerator(config)
    networks = Networks(method, accelerator, config)
    [group] = networks.groups.values()
    folder, checkpoints = RunFolder(tmp_path), Checkpoints(tmp_path / "checkpoints")
    halted = torch.zeros((), dtype=torch.bool)

    def update() -> None:
        samples = ToyReader(BATCH, regression_samples)[0]
        terms = method.phases[0].loss(samples, Carry(), Progress.at(0, 1))
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        group.update(halted)

    update()
    position = Position(step=1, means={"sums": {"loss": 1.0}})
    weights = {name: value.clone() for name, value in method.line.state_dict().items()}
    moments = {name: value.clone() for name, value in group.optimizer_tensors().items()}
    save_checkpoint(checkpoints, networks, position, folder, {}, background=True)
    assert checkpoints.newest() is None
    update()
    position.step = 2
    position.means["sums"]["loss"] = 2.0
    gate.open.set()
    checkpoints.wait()
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.state["means"]) == (1, {"sums": {"loss": 1.0}})
    assert states_equal(dict(sorted(found.tensors["networks/line"].items())), dict(sorted(weights.items())))
    assert states_equal(dict(sorted(found.tensors["optimizers/line"].items())), dict(sorted(moments.items())))
    assert not states_equal(weights, method.line.state_dict())


@pytest.mark.parametrize("then", ["start", "wait"])
def test_an_error_in_the_background_is_raised_next_and_once(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    raised = OSError(errno.EDQUOT, "Disk quota exceeded")

    def refuse(path: Path, content: bytes) -> int:
        raise raised

    calls: dict[str, Callable[[], None]] = {
        "start": lambda: checkpoints.start(40, {}, {}),
        "wait": checkpoints.wait,
    }
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        checkpoints.start(30, {"networks/a": {"weight": WEIGHTS}}, {})
        with pytest.raises(OSError, match="quota") as error:
            calls[then]()
    assert error.value is raised
    assert error.value.filename == str(tmp_path / "step-00000030")
    assert names(tmp_path) == ["step-00000010", "step-00000020"], "a start that raises starts nothing"
    checkpoints.wait()
    save(checkpoints, 30)
    assert held(checkpoints.newest()) == (30, 0)


def test_a_save_at_once_is_tried_although_the_one_before_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint of a run that is stopped: there may be room again."""
    two(tmp_path)
    checkpoints = Checkpoints(tmp_path)

    def refuse(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        checkpoints.start(30, {"networks/a": {"weight": WEIGHTS}}, {})
        assert checkpoints._saving is not None
        checkpoints._saving.join()
    save(checkpoints, 40)
    assert held(checkpoints.newest()) == (40, 0)
    assert "step-00000030: was not written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [1, 2])
def test_an_orphan_leaves_the_checkpoints_of_who_took_over(asked: int, tmp_path: Path) -> None:
    """It hangs in the middle of a save, and wakes when the new process has saved twice and removed what was before."""
    two(tmp_path)
    calls = 0

    def confirm() -> None:
        nonlocal calls
        calls += 1
        if calls == asked:
            for step in (40, 50):
                save(Checkpoints(tmp_path), step)
            raise UserError("taken over")

    with pytest.raises(UserError, match="taken over"):
        save(Checkpoints(tmp_path, confirm=confirm), 30)
    assert held(Checkpoints(tmp_path).newest()) == (50, 0)
    assert {"step-00000040", "step-00000050"} <= set(names(tmp_path))


def test_pruning_without_its_own_checkpoint_removes_nothing(tmp_path: Path) -> None:
    two(tmp_path)
    Checkpoints(tmp_path)._prune(tmp_path / "step-00000005")
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_a_second_start_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, running, most = Checkpoints(tmp_path), 0, 0
    real = Checkpoints._save

    def counted(*arguments: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        real(*arguments)
        running -= 1

    monkeypatch.setattr(Checkpoints, "_save", counted)
    for step in range(1, 6):
        checkpoints.start(step, {"networks/a": {"weight": WEIGHTS + step}}, {"version": 0}, {FILES[1]: BEST})
    checkpoints.wait()
    assert most == 1
    assert held(checkpoints.newest()) == (5, 0)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


# --- a disk that is really full ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill_up(disk: Path, leave: int) -> None:
    """Somebody else's file takes all but `leave` pages."""
    status = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, status.f_bavail - leave) * status.f_bsize))


def test_a_full_disk(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fills up at step 5 but for a few pages, so that another write meets the end each time."""
    undisturbed, stopped, at = tmp_path / "undisturbed", 0, set()
    write = Path.write_bytes

    def noted(path: Path, content: bytes) -> int:
        try:
            return write(path, content)
        except OSError:
            at.add(path.name)
            raise

    monkeypatch.setattr(Path, "write_bytes", noted)

    def go(folder: Path, before: Callable[[int], None] | None = None) -> None:
        fit(folder, 7, ToyGAN(), before=before, checkpoint_every=2)

    go(undisturbed)
    for leave in range(0, 16, 2):
        folder, error = small_disk / f"run {leave}", None
        try:
            go(folder, lambda step, leave=leave: fill_up(small_disk, leave) if step == 5 else None)  # type: ignore[misc]
        except OSError as caught:
            error = caught
        if error is not None:
            assert error.errno == errno.ENOSPC
            assert str(error.filename).startswith(str(folder))
            stopped += 1
            steps = [int(name[5:]) for name in names(folder / "checkpoints")]
            assert 2 in steps  # that of step 4 may still have been under way
            assert all(Checkpoints(folder / "checkpoints").read(step).step == step for step in steps)
        (small_disk / "ballast").unlink()
        go(folder)
        assert newest_tensors(folder) == newest_tensors(undisturbed)
        assert rows(folder) == rows(undisturbed)
        for which in ("generators", "checkpoints"):
            assert not [path for path in (folder / which).rglob("*") if path.name.startswith(".")]
        shutil.rmtree(folder)
    assert stopped >= 5
    assert len(at) >= 3, "the writes that found the disk full are different ones"
    with capsys.disabled():
        print(f"\na full disk of 400 KiB: {stopped} of 8 runs ended by it (at {sorted(at)}); all went on bit-equal")
