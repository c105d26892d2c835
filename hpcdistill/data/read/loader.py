"""Batches step by step, read ahead by processes: what every reader hands to the training loop.

The processes end with the loop, however that ends, and a batch that never comes is noticed: its process was killed, has
no room to hand it over, or hangs; or a signal comes while it is waited for.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hpcdistill.errors import LostProcess, UserError
from hpcdistill.ranks import watchdog

Batch = dict[str, Tensor]
Batches = Callable[[range, int, int], Iterator[Batch]]  # of the steps of one worker, its number, their number

_LOOK = 0.5  # seconds between two looks at signals and processes while a batch is waited for
_GRACE = 1.0  # seconds that processes have to end by themselves
_END = 5.0  # seconds that a killed one has to be gone
_TIMED_OUT = "DataLoader timed out"
_SHM = "/dev/shm"
_FEWER = "use fewer data.workers (0 reads without processes)"
_ROOM = f"give it more room (docker run --shm-size=2g), or {_FEWER}"

_half_made: list[Exception] = []  # kept: their frames hold iterators of torch, which cannot be freed in peace


class StopWaiting(Exception):
    """A signal to stop came while a batch was waited for. Only where this process is alone: ranks stop together."""


class ReadAhead(DataLoader[Batch]):
    """The batches of steps first .. last - 1; iterators end their workers when they are closed or exhausted.

    `batches(steps, worker, workers)` gives those of `steps`, which are every n-th for n workers; the workers are asked
    in turn, so that all come in the order of the steps. They are this rank's share already: do not pass the loader
    through `Accelerator.prepare`. Iterating raises a worker's UserError; LostProcess when a worker was killed or, in a
    process that is alone, no batch came for `patience` seconds; UserError when there is no room in shared memory;
    StopWaiting.
    """

    patience = 600.0

    def __init__(self, batches: Batches, first: int, last: int, workers: int, pin_memory: bool) -> None:
        self._steps = range(first, last)
        super().__init__(
            _Steps(batches, self._steps),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=_LOOK if workers > 0 else 0,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # it seeds workers, which draw nothing; the default one may be another run's
            multiprocessing_context="fork" if workers > 0 else None,  # shares the cache `ram` without a copy
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Generator[Batch]:  # type: ignore[override]
        workers: list[BaseProcess] = []
        ended = partial(_end, workers)
        atexit.register(ended)  # a traceback may keep this generator: multiprocessing would wait for its workers then
        watchdog.before_exit(partial(_kill, workers))  # the watchdog ends a process whose main thread is stuck
        try:
            items = self._start(workers)
            while (item := self._next(items, workers)) is not None:
                if isinstance(item, UserError):
                    # Not `raise item`: an exception that its own frame names is kept alive by a reference cycle.
                    raise UserError(str(item)) from None
                yield item
        finally:
            # Torch ends its thread that pins memory, which still takes from the workers, and then waits for these; but
            # they may wait for a file server that is gone. None lives when this is reached at the program's very end,
            # where no thread can be started.
            if any(worker.is_alive() for worker in workers):
                killing = threading.Timer(_GRACE, _kill, [workers])
                killing.start()
                items = iter(())
                killing.cancel()
            ended()
            atexit.unregister(ended)

    def _start(self, workers: list[BaseProcess]) -> Iterator[Any]:
        """Torch's iterator; its processes are added to `workers`."""
        before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        except OSError as error:
            _half_made.append(error)
            reason, full = error.strerror, error.errno in (errno.ENOSPC, errno.EDQUOT)
        finally:
            workers += set(active_children()) - before
            # Torch's handler raises wherever the main thread is, in the middle of a save, say. `_next` looks by itself.
            if signal.getsignal(signal.SIGCHLD) is not handler:
                signal.signal(signal.SIGCHLD, handler)
        if full:
            raise UserError(_no_room(reason))
        raise UserError(f"another process that reads data cannot be started ({reason}); {_FEWER}")

    def _next(self, items: Iterator[Any], workers: Sequence[BaseProcess]) -> Any:
        """The next item, None at the end."""
        # Counted, not measured: a suspended job has not waited.
        for looks in itertools.count(1):
            try:
                return next(items, None)
            except Exception as error:
                # A batch that breaks off is the first sign of a worker that dies.
                lost = _codes(workers, _GRACE if workers and isinstance(error, OSError | EOFError) else 0.0)
                if not lost and not str(error).startswith(_TIMED_OUT):
                    raise
            # Raised out here, so that they do not keep torch's frames.
            if lost:
                raise _lost(lost[0])
            if watchdog.active() is not None:  # the ranks stop, and are found hanging, together
                continue
            if watchdog.signal_received():
                raise StopWaiting
            if looks * _LOOK > self.patience:
                raise LostProcess(
                    f"no batch has come from the {len(workers)} processes that read data for {self.patience:.0f} s "
                    f"(train.timeout); look whether the data's file system answers, or {_FEWER}"
                )
        raise AssertionError


class StepLoader(ReadAhead):
    """The items first .. last - 1 of a reader, in this order."""

    def __init__(self, reader: Dataset[Batch], first: int, last: int, workers: int, pin_memory: bool) -> None:
        super().__init__(lambda steps, *_: map(reader.__getitem__, steps), first, last, workers, pin_memory)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Launchers and terminals signal the whole process group: a worker that dies of it ends the run unsaved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Steps(IterableDataset[Batch]):
    """What one worker delivers; a UserError as the last item, as torch would make its message the traceback."""

    def __init__(self, batches: Batches, steps: range) -> None:
        self._batches = batches
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from map(_handed_over, self._batches(self._steps[worker::workers], worker, workers))
        except UserError as error:
            yield UserError(str(error))  # its kinds take other arguments, which pickle does not know


def _handed_over(batch: Batch) -> Batch:
    """Moved to shared memory, in a worker; UserError when there is no room.

    Torch does so in a thread of the worker, which drops a batch that it cannot move: the trainer would wait for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        for tensor in batch.values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        text = str(error)
        if "shared memory" not in text:
            raise
        raise UserError(_no_room(text.rpartition(": ")[2])) from None
    return batch


def _no_room(reason: str | None) -> str:
    room = ""
    try:
        usage = shutil.disk_usage(_SHM)
        room = f"; {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free"
    except OSError:
        pass
    return f"{_SHM}: batches cannot be handed over in shared memory ({reason}{room}); {_ROOM}"


def _codes(workers: Sequence[BaseProcess], patience: float) -> list[int]:
    """The exit codes of workers that have died; waits `patience` seconds for the first."""
    end = time.monotonic() + patience
    while not (codes := [worker.exitcode for worker in workers if worker.exitcode]) and time.monotonic() < end:
        time.sleep(0.05)
    return codes


def _lost(code: int) -> UserError:
    """What to say of a worker that has ended with `code`, negative: by a signal."""
    said = f"signal {-code}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGBUS:
        return UserError(f"{_SHM}: a process that reads data has died of {said}: shared memory is full; {_ROOM}")
    if code == -signal.SIGKILL:
        return LostProcess(
            "a process that reads data was killed, most likely for want of memory; run the same command again, and "
            f"{_FEWER}"
        )
    return LostProcess(f"a process that reads data has died ({said}); run the same command again, or {_FEWER}")


def _kill(workers: Sequence[BaseProcess]) -> None:
    """They only read, and ignore SIGTERM."""
    for worker in workers:
        worker.kill()


def _end(workers: Sequence[BaseProcess]) -> None:
    _kill(workers)
    for worker in workers:
        worker.join(_END)
