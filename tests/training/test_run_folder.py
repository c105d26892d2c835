"""One process a run folder, and what the folder remembers of its sessions."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toy import (
    Regression,
    TableEvaluator,
    ToyGAN,
    fit,
    saved,
    states_equal,
)

from hpcdistill.errors import UserError
from hpcdistill.training import run_folder
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.evaluation import Evaluation
from hpcdistill.training.networks import Networks
from hpcdistill.training.run_folder import RunFolder


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run, fork = tmp_path / "run", multiprocessing.get_context("fork")
    held = fork.Event()

    def hold() -> None:
        folder = RunFolder(run)
        folder.create("", {})
        held.set()
        signal.pause()

    holder = fork.Process(target=hold)
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is training this run"):
            RunFolder(run).create("", {})
    finally:
        holder.kill()
        holder.join()
    RunFolder(run).create("", {})


def taken_over(folder: Path) -> None:
    """What another process leaves that has taken the run over."""
    lock = folder / "lock.json"
    changes = {"token": "another", "process": 4242, "host": "node7", "job": "17", "restarts": 1}
    lock.write_text(json.dumps(json.loads(lock.read_text()) | changes))


def test_an_orphan_writes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("", {})
    folder.confirm()
    taken_over(folder.path)
    with pytest.raises(UserError, match="process 4242 on node7 of SLURM job 17, restart 1 has taken this run over"):
        folder.save_result({})
    assert folder.result() is None
    config = TrainConfig(device="cpu", trackers=())
    with pytest.raises(UserError, match="process 4242 on node7"):
        Networks(Regression(), make_accelerator(config), config).save("last", folder, 1)
    assert not folder.generator("last", "line").exists()
    folder.release()
    assert (folder.path / "lock.json").exists()


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(3, 100), (100, 3)])
def test_an_orphan_ends_before_what_it_would_write_next(tmp_path: Path, log_every: int, checkpoint_every: int) -> None:
    folder = tmp_path / "run"
    written = {}

    def before(step: int) -> None:
        if step == 1:
            taken_over(folder)
            written.update({path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()})

    with pytest.raises(UserError, match="process 4242 on node7"):
        fit(folder, 8, before=before, log_every=log_every, checkpoint_every=checkpoint_every)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == written


def test_sessions_are_added_and_a_change_of_code_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for revision in ("aaa", "aaa", "bbb"):
        monkeypatch.setattr("hpcdistill.training.run_folder.code_revision", lambda revision=revision: revision)
        folder = RunFolder(tmp_path / "run")
        folder.create("seed: 1\n", {"short": "x"})
        folder.release()
    saved = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [session["revision"] for session in saved["sessions"]] == ["aaa", "aaa", "bbb"]
    assert capsys.readouterr().err.count("started with code revision aaa, going on with bbb") == 1


def test_networks_saved_beside_the_generators_come_back(tmp_path: Path) -> None:
    """A finished run's discriminator serves another run: the last one and that of the best generators, after a kill."""

    class Saving(ToyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.saved = {"critic": self.groups["generator"].module}  # a Painter: what a registry knows

    class ByAge(TableEvaluator):
        def __call__(self, generators: Any, accelerator: Any, stop: Any = None) -> Evaluation:
            return Evaluation({"score": next(scores)})

    folder = tmp_path / "run"
    options = {"evaluator": ByAge({}), "evaluate_every": 2, "checkpoint_every": 4}
    scores = iter([1.0, 9.0, 3.0])
    fit(folder, 10, Saving(), killed=7, **options)
    shutil.rmtree(folder / "saved")  # as if it had been replaced after the checkpoint
    shutil.rmtree(folder / "generators" / "best")
    (folder / "generators" / "best").mkdir()
    scores = iter([3.0, 4.0, 5.0])
    fit(folder, 10, Saving(), **options)
    for which in ("best", "last"):
        beside = load_file(folder / "saved" / which / "critic.safetensors")
        assert states_equal(beside, saved(folder, which, "painter"))
    assert not states_equal(saved(folder, "best", "painter"), saved(folder, "last", "painter"))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of one commit, which the code believes it is used from."""
    folder = tmp_path / "clone"
    (folder / "hpcdistill/training").mkdir(parents=True)
    (folder / "hpcdistill/training/run_folder.py").write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(run_folder, "CLONE", folder)
    return folder


def test_a_clone_of_another_user_tells_its_revision(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator's clone that a group uses: git takes it for dangerous, though its code is running already."""
    revision = run_folder.code_revision()
    assert revision is not None
    assert re.fullmatch(r"[0-9a-f]{12}", revision)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert run_folder.code_revision() == revision
    (clone / "hpcdistill/training/run_folder.py").write_text("# changed")
    assert run_folder.code_revision() == f"{revision}+"


def test_a_revision_that_git_does_not_tell_is_said_once(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / ".git/HEAD").write_text("damaged")
    assert [run_folder.code_revision() for _ in range(3)] == [None, None, None]
    assert capsys.readouterr().err.count("git does not tell the code's revision") == 1
    shutil.rmtree(clone / ".git")  # a copy without git has nothing to tell
    assert run_folder.code_revision() is None
    assert capsys.readouterr().err == ""


HALVES = (b'{"name": "a", "iden', b"", b"\xff\xfe", b"[" * 100_000, b"[3]", b'{"name": "a", "last": 3}')


@pytest.mark.parametrize("content", HALVES)
def test_a_damaged_result_is_one_line_with_the_remedy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"/result\.json: damaged \(.*without this file it is trained again"):
        RunFolder(tmp_path).result()
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/result\.json: damaged \(.*remove it, and the same command writes it again"):
        RunFolder(tmp_path).result()


SESSIONS = (b'{"sessions": 3}', b'{"sessions": [[]]}', b'{"sessions": [{"revision": 3}]}')


@pytest.mark.parametrize("content", [*HALVES[:5], *SESSIONS])
def test_a_damaged_environment_is_written_again(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "environment.json").write_bytes(content)
    folder = RunFolder(tmp_path)
    folder.create("seed: 1\n", {"short": "x"})
    folder.release()
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 1
    assert capsys.readouterr().err.count("environment.json: damaged (") == 1


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(3, 100), (100, 3)])
def test_a_run_whose_folder_is_removed_ends_in_a_line_and_does_not_make_it_again(
    tmp_path: Path, log_every: int, checkpoint_every: int
) -> None:
    folder = tmp_path / "run"

    def before(step: int) -> None:
        if step == 1:
            shutil.rmtree(folder)

    with pytest.raises(UserError, match="the run folder was removed or moved"):
        fit(folder, 8, before=before, log_every=log_every, checkpoint_every=checkpoint_every)
    assert not folder.exists()
