"""Ranks that fail before they have met: nobody waits for them, and what they say is said once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranked_commands import end_of

from hpcdistill.errors import EXIT_STOPPED, UserError
from hpcdistill.ranks import rendezvous
from hpcdistill.ranks.rendezvous import Participant, check_devices, join
from hpcdistill.ranks.signals import StopSignals

HOST = os.uname().nodename
PROBLEM = "train.device: no CUDA device is visible"


def failing(problems: dict[int, str], pause: float = 0.0) -> Callable[[int, int], None]:
    """The ranks in `problems` fail before they join, after `pause` seconds; the others wait for them."""

    def main(rank: int, ranks: int) -> None:
        if rank in problems:
            time.sleep(pause)
            raise UserError(problems[rank])
        join(True, 600.0)

    return main


@pytest.mark.distributed
@pytest.mark.parametrize(("culprit", "pause"), [(0, 1.0), (1, 0.0)])
def test_who_waits_ends_with_the_words_of_who_failed(culprit: int, pause: float, tmp_path: Path) -> None:
    codes, said = end_of(failing({culprit: PROBLEM}, pause), tmp_path)
    assert codes == [2, 2, 2]
    assert said == [f"error: {'rank 1 (' + HOST + '): ' if culprit else ''}{PROBLEM}\n", "", ""]


@pytest.mark.distributed
def test_what_all_meet_is_said_once(tmp_path: Path) -> None:
    codes, said = end_of(failing(dict.fromkeys(range(3), PROBLEM)), tmp_path)
    assert codes == [2, 2, 2]
    assert said == [f"error: {PROBLEM}\n", "", ""]


@pytest.mark.distributed
def test_different_failures_are_all_said(tmp_path: Path) -> None:
    codes, said = end_of(failing({0: PROBLEM, 1: "another one"}), tmp_path, 2)
    assert codes == [2, 2]
    assert said == [f"error: {PROBLEM}\n", "rank 1: error: another one\n"]


@pytest.mark.distributed
def test_a_rank_that_nobody_hears_speaks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, whose process holds the store, is gone."""
    monkeypatch.setattr(rendezvous, "EARLY", 1.0)

    def main(rank: int, ranks: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError(PROBLEM)

    codes, said = end_of(main, tmp_path, 2)
    assert codes == [-9, 2]
    assert said[1] == f"rank 1: error: {PROBLEM}\n"


@pytest.mark.distributed
def test_a_crash_before_the_rendezvous_has_its_traceback(tmp_path: Path) -> None:
    def main(rank: int, ranks: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("division by zero")
        join(True, 600.0)

    codes, said = end_of(main, tmp_path, 2)
    assert codes == [1, 1]
    assert said[0] == f"error: rank 1 ({HOST}): ZeroDivisionError: division by zero (a traceback is in its log)\n"
    assert said[1].count("Traceback") == 1


@pytest.mark.distributed
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_ends_the_wait(told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 never comes."""
    monkeypatch.setattr(rendezvous, "EARLY", 3.0)

    def main(rank: int, ranks: int) -> None:
        if rank == 2:
            return
        with StopSignals():
            if rank == told:
                os.kill(os.getpid(), signal.SIGTERM)
            join(True, 600.0)

    codes, said = end_of(main, tmp_path)
    assert codes == [EXIT_STOPPED, EXIT_STOPPED, 0]
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "EARLY", 1.0)
    monkeypatch.setattr(rendezvous, "JOIN_LIMIT", 2.0)

    def main(rank: int, ranks: int) -> None:
        if rank != 1:
            join(True, 600.0)

    codes, said = end_of(main, tmp_path)
    assert codes == [2, 0, 2]
    assert "has waited 2 s in vain for rank 1; see its log" in said[0]
    assert said[0].count("\n") == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("devices", "line"),
    [
        ([("cpu", ""), ("cuda", "A")], f"rank 0 ({HOST}) of 2 ranks sees no GPU, the others do; "),
        ([("cuda", "A"), ("cuda", "A")], f"2 processes on {HOST} and 1 GPU; start one process a GPU (1, "),
    ],
)
def test_devices_that_do_not_fit_are_said_once(
    devices: list[tuple[str, str]], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(rank: int, ranks: int) -> None:
        monkeypatch.setattr(rendezvous, "_device", lambda cpu: devices[rank])
        join(True, 600.0)

    codes, said = end_of(main, tmp_path, 2)
    assert codes == [2, 2]
    assert said[0].startswith(f"error: {line}")
    assert said[0].count("\n") == 1
    assert said[1] == ""


def test_devices_that_fit() -> None:
    check_devices([Participant("a", "cpu"), Participant("a", "cpu")])
    check_devices([Participant("a", "cuda", "1"), Participant("a", "cuda", "2"), Participant("b", "cuda", "1")])


def raised(everybody: list[Participant]) -> str:
    with pytest.raises(UserError) as caught:
        check_devices(everybody)
    return str(caught.value)


def test_devices_that_do_not_fit() -> None:
    four = [Participant("a", "cuda", gpu) for gpu in "1212"]
    assert raised(four).startswith("4 processes on a and 2 GPUs; start one process a GPU (2, ")
    mixed = [Participant("a", "cuda", "1"), Participant("b", "cpu"), Participant("c", "cpu")]
    assert raised(mixed).startswith("rank 1 (b), rank 2 (c) of 3 ranks ")


@pytest.mark.distributed
def test_a_server_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "EARLY", 1.0)
    monkeypatch.setattr(rendezvous, "JOIN_LIMIT", 1.0)

    def main(rank: int, ranks: int) -> None:
        if rank == 1:
            join(True, 600.0)

    codes, said = end_of(main, tmp_path, 2)
    assert codes == [0, 2]
    assert said[1].startswith("rank 1: error: rank 1 of 2 did not find the others at 127.0.0.1:")
    assert "(nobody has listened there for 1 s)" in said[1]
    assert said[1].count("\n") == 1
