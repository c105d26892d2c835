"""metrics.jsonl after kills: no line missing, none twice; and the trackers' view of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import broadcast_object_list
from processes import launch
from toy import BATCH, fit, rows

from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.metrics_log import MetricsLog, RunningMeans


def log_at(folder: Path, **options: Any) -> MetricsLog:
    config = TrainConfig(device="cpu", batch_size=BATCH, **({"trackers": ()} | options))
    return MetricsLog(folder / "metrics.jsonl", make_accelerator(config, folder))


def steps(log: MetricsLog) -> list[int]:
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    """Steps 1 to 6; the checkpoint was at step 4 (its position is `checkpoint(log)`)."""
    log = log_at(tmp_path)
    for step in range(1, 7):
        log.write({"step": step, "loss": 1 / step})
    return log


def checkpoint(log: MetricsLog) -> int:
    """The position behind step 4, counted by hand."""
    return len(b"".join(log.path.read_bytes().splitlines(keepends=True)[:4]))


@pytest.mark.parametrize("after", [0, 1, 10, 24, 30, None])
def test_what_came_after_the_checkpoint_goes(
    after: int | None, log: MetricsLog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the session was killed in the middle of a line."""
    position, content = checkpoint(log), log.path.read_bytes()
    log.path.write_bytes(content if after is None else content[: position + after])
    log.rewind(position, 4)
    assert log.path.read_bytes() == content[:position]
    log.write({"step": 5, "loss": 0.2})
    assert log.path.read_bytes().splitlines()[:5] == content.splitlines()[:5]
    assert steps(log) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("left", "kept"), [(70, [1, 2]), (0, []), (None, [])])
def test_a_file_shorter_than_the_checkpoint_says(
    left: int | None, kept: list[int], log: MetricsLog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a line goes too, one warning says so, and the lines of a next killed session are not taken for old ones."""
    position, content = checkpoint(log), log.path.read_bytes()
    if left is None:
        log.path.unlink()
    else:
        log.path.write_bytes(content[:left])
    log.rewind(position, 4)
    gone = position - len(b"".join(content.splitlines(keepends=True)[: len(kept)]))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {log.path}: {gone} of the {position} bytes")
    for step in range(5, 10):
        log.write({"step": step, "loss": 0.5})
    assert steps(log) == [*kept, 5, 6, 7, 8, 9]
    log.rewind(position, 4)  # killed before the next checkpoint
    log.write({"step": 5, "loss": 0.5})
    assert steps(log) == [*kept, 5]
    capsys.readouterr()
    now = log.position()  # and after the next checkpoint all is well
    log.write({"step": 6, "loss": 0.5})
    log.rewind(now, 5)
    assert steps(log) == [*kept, 5]
    assert capsys.readouterr().err == ""


def test_a_line_edited_by_hand_is_dropped_and_said(log: MetricsLog, capsys: pytest.CaptureFixture[str]) -> None:
    position = checkpoint(log)
    log.path.write_bytes(log.path.read_bytes().replace(b'{"step": 2', b'["step": 2'))
    log.rewind(position, 4)
    assert steps(log) == [1, 3, 4]
    assert capsys.readouterr().err.count("warning") == 1


def test_a_fresh_start_begins_an_empty_file(log: MetricsLog, capsys: pytest.CaptureFixture[str]) -> None:
    log.rewind(0, 0)
    assert log.path.read_bytes() == b""
    assert capsys.readouterr().err == ""


def test_a_run_killed_at_every_step_has_every_line_once(tmp_path: Path) -> None:
    whole = tmp_path / "undisturbed"
    fit(whole, 9, checkpoint_every=2)
    for step in range(9):
        folder = tmp_path / str(step)
        fit(folder, 9, checkpoint_every=2, killed=step)
        if (folder / "metrics.jsonl").exists():
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 8, "los')  # and it was writing a line
        fit(folder, 9, checkpoint_every=2)
        assert rows(folder) == rows(whole)


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Killed at step 6, going on from the checkpoint of step 4 with other values: TensorBoard shows the new ones."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, value in ((1, 1.0), (5, 2.0)):
        log = log_at(tmp_path, trackers=("tensorboard",))
        log.start_trackers(first - 1)
        for step in range(first, 7):
            log.write({"step": step, "loss": value})
        for tracker in log.accelerator.trackers:
            tracker.finish()
        [events] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    # What TensorBoard itself does when it reads the folder.
    shown = accumulator.EventAccumulator(str(events)).Reload()
    points = [(point.step, point.value) for point in shown.Scalars("loss")]
    assert points == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


@pytest.mark.distributed
def test_means_that_cross_a_checkpoint_are_of_all_ranks() -> None:
    def work(rank: int, ranks: int) -> None:
        accelerator = make_accelerator(TrainConfig(device="cpu", batch_size=2, trackers=()))
        means = RunningMeans(accelerator.device)
        means.add({"loss": torch.tensor(1.0 + 10 * rank)})  # ranks: 1, 11
        of_first_rank = broadcast_object_list([means.state(accelerator)])[0]  # what a checkpoint holds
        resumed = RunningMeans(accelerator.device)
        resumed.load(of_first_rank)
        resumed.add({"loss": torch.tensor(3.0 + 10 * rank)})  # 3, 13
        assert resumed.read(accelerator) == {"loss": 7.0}

    assert launch(2, work) == [0, 0]
