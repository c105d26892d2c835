"""`--cells-per-device`: runs of one kind in one process, each with its own log, state and end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import CONFIGS, tiny_variant

from hpcdistill.run import load_run
from hpcdistill.sweep import local
from hpcdistill.sweep.submit import main
from hpcdistill.sweep.together import kind_of

CLONE = Path(__file__).resolve().parents[2]
GRID = f"""\
title: Small
metrics: {{psnr: {{of: student/tiny/psnr, better: higher}}}}
base: {CONFIGS}/fsrcnn/x4.yaml
axes:
  patch:
    "24": {{}}
    "16": {{set: [data.patch=16]}}
    "too large": {{set: [data.patch=128]}}
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A grid of three cells, of which the third fails; the words for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CLONE))
    monkeypatch.setattr(local, "visible_gpus", lambda: [])
    monkeypatch.setattr(local, "CLONE", tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "collect.py").touch()
    (tmp_path / "small.yaml").write_text(GRID)
    tiny_variant(tmp_path / "made", checkpoint_every=1)
    return "small.yaml"


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """state.json of each task by the patch of its run."""
    found = {}
    for path in folder.glob("sweeps/tasks/*/state.json"):
        values = json.loads((path.parent / "config.json").read_text())
        found[str(values["data"]["patch"])] = json.loads(path.read_text())
    return found


def test_cells_of_a_process_end_each_in_its_own_way(
    grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [grid, "made/tiny.yaml", "data.workers=0", "--local", "--cells-per-device", "3"]
    assert main(words) == 1
    found = states(tmp_path)
    assert {patch: state["state"] for patch, state in found.items()} == {
        "24": "finished", "16": "finished", "128": "failed"
    }  # fmt: skip
    assert len({state["pid"] for state in found.values()}) == 1, "one process"
    assert "error: " in found["128"]["message"]
    assert "128" in found["128"]["message"]
    for patch in ("24", "16"):
        log = Path(found[patch]["log"]).read_text()
        assert log.count(" step 2/2 ") == 2, "its own lines alone: the losses and the evaluation"
        assert (
            json.loads((Path(found[patch]["run"]) / "config.yaml").with_name("result.json").read_text())["steps"] == 2
        )
    assert "3 side by side" in capsys.readouterr().err
    # Again, what has finished is left alone; a cell that is left is a process of its own.
    assert main([*words, "--retry", "failed"]) == 1
    assert {patch: state["attempt"] for patch, state in states(tmp_path).items()} == {"24": 1, "16": 1, "128": 2}


def test_ctrl_c_saves_all_cells_of_a_process(grid: str, tmp_path: Path) -> None:
    code = "import sys; from hpcdistill.command import run_command; from hpcdistill.sweep.submit import main\n"
    code += "from hpcdistill.sweep import local; local.visible_gpus = lambda: []; run_command(main)"
    words = [grid, "made/tiny.yaml", "train.steps=1000000", "eval.every=1000000", "--local", "--cells-per-device", "3"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *words], cwd=tmp_path, env=os.environ, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) < 2 or len(list(tmp_path.glob("runs/*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 75, said
    found = states(tmp_path)
    assert {patch: state["state"] for patch, state in found.items()} == {
        "24": "stopped", "16": "stopped", "128": "failed"
    }  # fmt: skip
    for patch in ("24", "16"):
        assert list(Path(found[patch]["run"]).glob("checkpoints/step-*"))
        assert not (Path(found[patch]["run"]) / "lock.json").exists()


def test_what_shares_a_process(tmp_path: Path) -> None:
    tiny = tiny_variant(tmp_path)

    def kind(*words: str) -> Any:
        return kind_of(load_run([words[0], tiny, *words[1:]]).config)

    fsrcnn, dssd = str(CONFIGS / "fsrcnn" / "x4.yaml"), str(CONFIGS / "dssd" / "x4.yaml")
    assert kind(fsrcnn) is not None
    assert kind(fsrcnn) == kind(fsrcnn, "seed=3", "data.patch=16", "method.optimizer.learning_rate=1e-4")
    for words in (
        (dssd,),
        (str(CONFIGS / "fsrcnn" / "x2.yaml"),),
        (fsrcnn, "method.network=idn"),
        (fsrcnn, "train.steps=3"),
        (fsrcnn, "train.batch_size=3"),
        (fsrcnn, "train.precision=bf16"),
        (fsrcnn, "train.deterministic=true"),
    ):
        assert kind(*words) not in (None, kind(fsrcnn)), words
    assert kind(fsrcnn, "train.trackers=[wandb]") is None
    assert kind(fsrcnn, "train.deepspeed=zero2.json") is None


def test_ctrl_c_reaches_a_process_whose_first_run_has_just_ended() -> None:
    """One that has ended, and was not looked at since, passes nothing on."""

    class Fake:
        def __init__(self, code: int | None) -> None:
            self.code, self.sent = code, list[int]()

        def poll(self) -> int | None:
            return self.code

        def send(self, number: int) -> None:
            if self.code is None:
                self.sent.append(number)

        def end(self, code: int, interrupted: bool) -> str:
            return "finished"

    ended, first, second = Fake(0), Fake(None), Fake(None)
    sweep: Any = local.Local.__new__(local.Local)
    run = SimpleNamespace(name="tiny", key="0")
    running: Any = [(run, attempt) for attempt in (ended, first, second)]
    sweep.slots = [local._Slot(None, running)]
    sweep.ended, sweep.total, sweep._next_beat = [], 3, math.inf
    sweep._look_after(SimpleNamespace(new=lambda: [signal.SIGINT], all=[signal.SIGINT]))
    assert [attempt.sent for attempt in (ended, first, second)] == [[], [signal.SIGINT], []]
    assert sweep.ended == ["finished"]
