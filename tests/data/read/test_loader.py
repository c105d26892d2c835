"""Reader processes: none outlives its loop, and a batch that never comes is noticed and said."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from hpcdistill.data.read.loader import Batch, ReadAhead, StepLoader
from hpcdistill.errors import LostProcess, UserError
from hpcdistill.ranks.signals import STOPPING

CLONE = Path(__file__).resolve().parents[3]
STEPS = 6
AT = 3  # the step at which something happens
Happens = Callable[[], None]


class Numbers(Dataset[Batch]):
    """Item k is the number k; `happens` is called in the process that makes item AT."""

    def __init__(self, happens: Happens | None = None) -> None:
        self.happens = happens

    def __getitem__(self, step: int) -> Batch:
        if step == AT and self.happens:
            self.happens()
        return {"number": torch.tensor([step])}

    def batches(self, steps: range, worker: int, workers: int) -> Iterator[Batch]:
        return map(self.__getitem__, steps)


def steps(happens: Happens | None = None, workers: int = 2) -> ReadAhead:
    return StepLoader(Numbers(happens), 0, STEPS, workers, False)


def streamed(happens: Happens | None = None, workers: int = 2) -> ReadAhead:
    return ReadAhead(Numbers(happens).batches, 0, STEPS, workers, False)


LOADERS = [steps, streamed]


def dies_of(number: signal.Signals) -> Happens:
    return lambda: os.kill(os.getpid(), number)


def hangs() -> None:
    time.sleep(1000)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also when the test has failed: what is left would keep pytest from ending.

    torch would wait 5 s for a worker before it ends it; here for ever, so that no test passes by it.
    """
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 1000.0)
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert not left


@pytest.mark.parametrize("loader", LOADERS)
def test_no_process_outlives_a_loop_that_fails(loader: Callable[[], ReadAhead]) -> None:
    """Though the traceback holds the loop's frame, and with it the iterator."""

    def loop() -> None:
        with closing(iter(loader())) as batches:
            next(batches)
            assert len(multiprocessing.active_children()) == 2
            raise OSError(28, "the disk is full")

    with pytest.raises(OSError, match="disk"):
        loop()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_process_that_hangs_does_not_keep_the_loop_from_ending(loader: Callable[[Happens], ReadAhead]) -> None:
    with closing(iter(loader(hangs))) as batches:
        assert [int(next(batches)["number"]) for _ in range(AT)] == list(range(AT))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("holds", ["batches = iter(loader); next(batches)", "for batch in loader: raise KeyError(1)"])
def test_a_program_ends_though_it_holds_its_iterator(holds: str) -> None:
    """A notebook, or a benchmark, that does not close it."""
    code = f"from test_loader import *\nloader = steps()\n{holds}"
    paths = os.pathsep.join((str(CLONE), str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, stderr=-1)
    try:
        process.communicate(timeout=60)
    finally:
        for left in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            left.kill()
    assert process.returncode == ("KeyError" in holds)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGKILL, 71, ["killed", "memory", "fewer data.workers"]),
        (signal.SIGBUS, 2, ["/dev/shm", "--shm-size", "fewer data.workers"]),
        (signal.SIGSEGV, 71, ["died", "signal 11", "fewer data.workers"]),
    ],
)
def test_a_killed_process_is_said(
    loader: Callable[[Happens], ReadAhead], number: signal.Signals, code: int, words: list[str]
) -> None:
    batches = iter(loader(dies_of(number)))
    with pytest.raises(UserError) as caught:
        list(batches)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), caught.value
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_signal_that_stops_a_training_leaves_its_readers_alone(
    loader: Callable[[Happens], ReadAhead], number: signal.Signals
) -> None:
    """Launchers and terminals signal the whole process group: what asks a trainer to save must not take its data."""
    batches = list(loader(dies_of(number)))
    assert [batch["number"].item() for batch in batches] == list(range(STEPS))


def test_the_death_of_a_process_interrupts_nothing_but_the_waiting_for_it() -> None:
    """Torch raises it in the main thread wherever that is: in the middle of a save, say."""
    with closing(iter(steps(dies_of(signal.SIGKILL)))) as batches:
        next(batches)
        deadline = time.monotonic() + 20
        while all(child.is_alive() for child in multiprocessing.active_children()):
            if len(multiprocessing.active_children()) < 2:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(LostProcess):
            list(batches)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_that_does_not_come_ends_the_loop(loader: Callable[[Happens], ReadAhead]) -> None:
    waiting = loader(hangs)
    waiting.patience = 1.0
    with pytest.raises(LostProcess, match=r"no batch .* 2 processes .* 1 s \(train.timeout\).*data.workers") as caught:
        list(waiting)
    assert caught.value.code == 71
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_without_room_in_shared_memory_is_said(
    loader: Callable[[], ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7_0>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"/dev/shm: .*No space left.* MiB are free.*--shm-size.*data.workers"):
        list(loader())
    assert len(list(loader(workers=0))) == STEPS  # type: ignore[call-arg]


def test_shared_memory_that_is_full() -> None:
    """A container's default of 64 MB, in small."""
    if os.geteuid() != 0:
        pytest.skip("a /dev/shm of its own needs root")
    mount = "mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount.format(size="1m")], check=False).returncode:
        pytest.skip("unshare -m, or a mount in it, is not allowed here")
    code = """
import torch
from torch.utils.data import Dataset
from hpcdistill.command import run_command
from hpcdistill.data.read.loader import StepLoader

class Large(Dataset):
    def __getitem__(self, step):
        return {"hr": torch.zeros(1 << 18)}

run_command(lambda _: print(len(list(StepLoader(Large(), 0, 8, 2, False)))))
"""
    for size in ("1m", "12k"):  # for batches; for the queues that they go through
        command = ["unshare", "-m", "sh", "-c", f'{mount.format(size=size)} && exec "$0" -c "$1"', sys.executable, code]
        environment = os.environ | {"PYTHONPATH": str(CLONE)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: /dev/shm: "), done.stderr
        assert "No space left on device" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_process_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []
    fork = os.fork

    def second_fails() -> int:
        if forked:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        pid = fork()
        if pid:
            forked.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(UserError, match=r"cannot be started \(Resource .*fewer data.workers"):
        list(steps())
    assert forked
    assert not multiprocessing.active_children()


def test_other_errors_of_a_process_are_ours() -> None:
    def breaks() -> None:
        raise ZeroDivisionError("a fault")

    loader = steps(breaks)
    for _ in range(2):  # it can be read again
        with pytest.raises(ZeroDivisionError, match="a fault"):
            list(loader)
    assert not multiprocessing.active_children()
