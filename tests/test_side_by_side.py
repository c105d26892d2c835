"""Runs side by side in one process: each has the bits that it has alone, whatever its neighbours do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CONFIGS, tiny_variant

from hpcdistill import default_generator
from hpcdistill.errors import EXIT_CRASHED, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.run import Run, load_run
from hpcdistill.side_by_side import Cell, Ended, train_side_by_side
from hpcdistill.train_many import main
from hpcdistill.trainer import train
from hpcdistill.training.loop import Training

STEPS = 6
FSRCNN, DSSD = str(CONFIGS / "fsrcnn" / "x4.yaml"), str(CONFIGS / "dssd" / "x4.yaml")
CELLS = {"seed 0": (FSRCNN, "seed=0"), "seed 1": (FSRCNN, "seed=1"), "student": (DSSD,)}
UNEQUAL = ("seconds", "images_per_second", "revision")  # of result.json


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_variant(tmp_path_factory.mktemp("tiny"), steps=STEPS, checkpoint_every=2)


@pytest.fixture(scope="module")
def alone(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each cell comes to when it has the process to itself."""
    runs = tmp_path_factory.mktemp("alone")
    loaded = {name: load(words, tiny, runs) for name, words in CELLS.items()}
    for run in loaded.values():
        assert train(run) is not None
    return {name: contents(run.folder) for name, run in loaded.items()}


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    with StopSignals() as listening:
        yield listening


def load(words: tuple[str, ...], tiny: str, runs: Path) -> Run:
    return load_run([words[0], tiny, *words[1:], f"runs={runs}"])


def beside(tiny: str, runs: Path) -> dict[str, Cell]:
    return {name: Cell(load(words, tiny, runs)) for name, words in CELLS.items()}


def contents(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves behind but for times: weights, moments, the log, the result."""
    tensors = {
        f"{file.relative_to(folder)}/{name}": tensor.numpy().tobytes()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    rows = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return {**tensors, "rows": rows, "result": {key: value for key, value in result.items() if key not in UNEQUAL}}


def codes(cells: dict[str, Cell]) -> dict[str, int | None]:
    return {name: cell.ended and cell.ended.code for name, cell in cells.items()}


def assert_as_alone(cells: dict[str, Cell], alone: dict[str, dict[str, Any]], *names: str) -> None:
    for name in names or CELLS:
        assert contents(cells[name].run.folder) == alone[name], name


def test_each_has_the_bits_that_it_has_alone(
    tiny: str,
    alone: dict[str, dict[str, Any]],
    signals: StopSignals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = beside(tiny, tmp_path)
    cells["student"].log = tmp_path / "logs" / "student.log"
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == dict.fromkeys(CELLS, 0)
    assert_as_alone(cells, alone)
    said = capsys.readouterr().err
    short = cells["seed 0"].run.short
    assert f"[{short}] fsrcnn-x4 step {STEPS}/{STEPS}" in said
    assert f"dssd-x4 step {STEPS}/{STEPS}" not in said
    assert f"dssd-x4 step {STEPS}/{STEPS}" in cells["student"].log.read_text()
    assert alone["seed 0"]["rows"] != alone["seed 1"]["rows"], "else it would not be seen when they are mixed up"


def test_they_are_in_the_process_at_once(
    tiny: str, signals: StopSignals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waits in its third step until every other is in its own: one after the other would wait for ever."""
    gate = threading.Barrier(len(CELLS), timeout=60)
    step = Training.take_step

    def together(self: Training, number: int, batches: Any) -> None:
        if number == 2 and "teacher" not in self.name:
            gate.wait()
        step(self, number, batches)

    monkeypatch.setattr(Training, "take_step", together)
    cells = beside(tiny, tmp_path)
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == dict.fromkeys(CELLS, 0)


def test_stopped_in_the_middle_they_go_on_alone_or_beside_others(
    tiny: str,
    alone: dict[str, dict[str, Any]],
    signals: StopSignals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Training.take_step

    def interrupted(self: Training, number: int, batches: Any) -> None:
        step(self, number, batches)
        if number == 2 and "teacher" not in self.name:
            signals.received = True

    monkeypatch.setattr(Training, "take_step", interrupted)
    cells = beside(tiny, tmp_path)
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == dict.fromkeys(CELLS, EXIT_STOPPED)
    assert all(list(cell.run.folder.glob("checkpoints/step-*")) for cell in cells.values())
    monkeypatch.undo()
    signals.received = False
    assert train(cells["seed 1"].run, signals) is not None
    cells = beside(tiny, tmp_path)
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == dict.fromkeys(CELLS, 0)
    assert_as_alone(cells, alone)


def fails(error: Callable[[], Exception], where: int, once: bool = False) -> Callable[..., None]:
    """`Training.take_step`, which raises in the run of seed 1."""
    step, raised = Training.take_step, list[int]()

    def failing(self: Training, number: int, batches: Any) -> None:
        if self.updates.seed == 1 and number == where and not (once and raised):
            raised.append(number)
            raise error()
        step(self, number, batches)

    return failing


def test_one_that_fails_takes_no_other_along(
    tiny: str,
    alone: dict[str, dict[str, Any]],
    signals: StopSignals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, (error, code) in enumerate(
        [(UserError("no such thing; mend it"), EXIT_USER_ERROR), (KeyError("bug"), EXIT_CRASHED)]
    ):
        cells = beside(tiny, tmp_path / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(Training, "take_step", fails(lambda error=error: error, 3))  # type: ignore[misc]
            train_side_by_side(list(cells.values()), signals)
        assert codes(cells) == {"seed 0": 0, "seed 1": code, "student": 0}
        assert_as_alone(cells, alone, "seed 0", "student")
        said = capsys.readouterr().err
        assert (f"[{cells['seed 1'].run.short}] error: no such thing; mend it" in said) == (code == EXIT_USER_ERROR)
        assert ("KeyError: 'bug'" in said) == (code == EXIT_CRASHED)


def test_a_failed_teacher_ends_its_student_alone(
    tiny: str, signals: StopSignals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.take_step

    def failing(self: Training, number: int, batches: Any) -> None:
        if "teacher" in self.name:
            raise UserError("no such thing; mend it")
        step(self, number, batches)

    monkeypatch.setattr(Training, "take_step", failing)
    cells = beside(tiny, tmp_path)
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == {"seed 0": 0, "seed 1": 0, "student": EXIT_USER_ERROR}
    ended = cells["student"].ended
    assert ended is not None
    assert str(ended.message).endswith("has failed: no such thing; mend it")


def test_one_without_memory_is_trained_alone_after_the_others(
    tiny: str,
    alone: dict[str, dict[str, Any]],
    signals: StopSignals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    monkeypatch.setattr(Training, "take_step", fails(lambda: full, 3, once=True))
    cells = beside(tiny, tmp_path)
    train_side_by_side(list(cells.values()), signals)
    assert codes(cells) == dict.fromkeys(CELLS, 0)
    assert_as_alone(cells, alone)
    said = capsys.readouterr().err
    assert "no memory is left on cpu" in said
    assert "it is trained alone, after the others" in said
    assert said.index(f"[{cells['seed 1'].run.short}] fsrcnn-x4: resuming at step 2") > said.index(
        f"[{cells['seed 0'].run.short}] fsrcnn-x4 step {STEPS}/{STEPS}"
    )


@pytest.mark.parametrize("first", [0, 3], ids=["from the first step", "from the fourth"])
def test_a_method_that_draws_is_trained_alone(
    first: int,
    tiny: str,
    signals: StopSignals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Noise of PyTorch's default generator: side by side its numbers would depend on the neighbours."""
    loss = PlainSR.student_loss

    def noisy(self: PlainSR, batch: Any, carry: Any, progress: Any) -> Any:
        terms = loss(self, batch, carry, progress)
        if progress.number < first:
            return terms
        return {name: term * torch.rand(()) for name, term in terms.items()}

    monkeypatch.setattr(PlainSR, "student_loss", noisy)
    seeds = ("seed=0", "seed=1")
    for seed in seeds:
        assert train(load((FSRCNN, seed), tiny, tmp_path / "alone")) is not None
    alone = [contents(load((FSRCNN, seed), tiny, tmp_path / "alone").folder) for seed in seeds]
    cells = [Cell(load((FSRCNN, seed), tiny, tmp_path / "beside")) for seed in seeds]
    train_side_by_side(cells, signals)
    assert [contents(cell.run.folder) for cell in cells] == alone
    assert "draws from PyTorch's default generator" in capsys.readouterr().err


def test_who_wants_to_draw_waits_for_the_steps_that_are_made() -> None:
    """Else a step could not tell its own draws from another's."""
    order: list[str] = []

    def draw() -> None:
        with default_generator.drawing():
            order.append("drawn")

    turns = default_generator._turns
    with default_generator.sharing():
        other = threading.Thread(target=draw)
        with default_generator.drawless_step(first=False):
            other.start()
            with turns.changed:
                assert turns.changed.wait_for(lambda: turns.waiting or order, 60)
            order.append("made")
        other.join()
    assert order == ["made", "drawn"]


def test_what_cannot_share_a_process_is_refused(tiny: str, signals: StopSignals, tmp_path: Path) -> None:
    first = load((FSRCNN, "seed=0"), tiny, tmp_path)
    for words, message in (
        (("seed=0",), "two of the runs are the same one"),
        (("seed=1", "train.precision=bf16"), "train.precision: fsrcnn-x4 has fp32 and fsrcnn-x4 bf16"),
        (("seed=1", "train.threads=2"), "train.threads: fsrcnn-x4 has 1 and fsrcnn-x4 2"),
        (("seed=1", "train.trackers=[wandb]"), "train.trackers: wandb follows one run a process"),
    ):
        with pytest.raises(UserError, match=message):
            train_side_by_side([Cell(first), Cell(load((FSRCNN, *words), tiny, tmp_path))], signals)
    assert not list(tmp_path.iterdir())


def test_the_command_trains_each_seed_of_each_cell(
    tiny: str, alone: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = tmp_path / "outcomes.json"
    words = [FSRCNN, tiny, f"runs={tmp_path / 'runs'}", "--outcomes", str(outcomes)]
    words += ["--cell", "data.workers=0", "--cell", "data.patch=128", "--seeds", "0", "1"]
    assert main(words) == EXIT_FAILED
    told = json.loads(outcomes.read_text())
    assert [one["code"] for one in told] == [0, 0, EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert [Path(one["run"]).is_dir() for one in told] == [True, True, False, False]
    for seed in (0, 1):
        assert contents(load((FSRCNN, f"seed={seed}"), tiny, tmp_path / "runs").folder) == alone[f"seed {seed}"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("failed: ") == 2
    assert said.count("error: ") == 2
    with pytest.raises(UserError, match="no configuration"):
        main(["--seeds", "1"])
    with pytest.raises(UserError, match="No closing quotation; quote its words"):
        main([FSRCNN, "--cell", "name='one"])
    with pytest.raises(UserError, match="named 1 times for 2 runs"):
        main([FSRCNN, "--seeds", "0", "1", "--log", "one"])


def test_a_log_that_cannot_be_written_fails_its_run_alone(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    words = [FSRCNN, tiny, f"runs={tmp_path / 'runs'}", "data.workers=0", "--seeds", "0", "1"]
    assert main([*words, "--log", str(tmp_path / "log"), "--log", str(tmp_path / "folder")]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert said.count(f"error: {tmp_path / 'folder'}: a folder stands where a file is needed") == 1
    assert "Traceback" not in said
    assert f"{load((FSRCNN, 'seed=0'), tiny, tmp_path / 'runs').folder}: finished" in said


def test_a_run_of_which_nothing_is_known_is_no_success(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcdistill.side_by_side.train_side_by_side", lambda cells, signals: cells[0].end(Ended(0)))
    assert main([FSRCNN, tiny, f"runs={tmp_path}", "--seeds", "0", "1"]) == EXIT_FAILED


def test_sigterm_saves_all_of_them(tiny: str, tmp_path: Path) -> None:
    words = [FSRCNN, tiny, f"runs={tmp_path}", "train.steps=1000000", "eval.every=1000000", "--seeds", "0", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "hpcdistill.train_many", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        begun: set[str] = set()
        for line in process.stderr:
            begun |= {line[:10]} if " step 3/" in line else set()
            if len(begun) == 2:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait() == EXIT_STOPPED, rest
    folders = sorted(tmp_path.glob("fsrcnn-x4-*"))
    assert len(folders) == 2
    for folder in folders:
        assert f"{folder}: stopped; the same command goes on from here" in rest
        saved = max(folder.glob("checkpoints/step-*"))
        assert json.loads((saved / "state.json").read_text())["step"] >= 3
        assert not (folder / "lock.json").exists()
