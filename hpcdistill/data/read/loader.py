"""Batches step by step, read ahead by processes: what every reader hands to the training loop."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hpcdistill.errors import UserError

Batch = dict[str, Tensor]


class StepLoader(DataLoader[Batch]):
    """The items first .. last - 1 of a reader, in this order, and a UserError where a worker has met one.

    It delivers this rank's share already: do not pass it through `Accelerator.prepare`.
    """

    def __init__(self, reader: Dataset[Batch], first: int, last: int, workers: int, pin_memory: bool) -> None:
        super().__init__(
            _ErrorsAsItems(reader),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_the_trainer,
            multiprocessing_context="fork" if workers > 0 else None,  # shares the cache `ram` without a copy
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return raised(super().__iter__())


class StreamLoader(DataLoader[Batch]):
    """The batches of steps first .. last - 1 from workers that each read their own part of a stream.

    `batches(steps, worker, workers)` gives those of `steps`, which are every n-th for n workers; the loader asks its
    workers in turn, so that all come in the order of the steps. Like StepLoader it delivers this rank's share, raises
    a worker's UserError, and is not for `Accelerator.prepare`.
    """

    def __init__(
        self, batches: Callable[[range, int, int], Iterator[Batch]], first: int, last: int, workers: int, pin: bool
    ) -> None:
        self._steps = range(first, last)
        self._ending = multiprocessing.get_context("fork").RawValue(ctypes.c_bool, False)  # the workers see it, too
        super().__init__(
            _StreamedSteps(batches, self._steps),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=self._listen,
            multiprocessing_context="fork" if workers > 0 else None,
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._ending.value = False
        items = super().__iter__()
        try:
            yield from raised(items)
        finally:
            self._ending.value = True  # before `items` goes: it waits for its workers a while, then terminates them

    def _listen(self, worker: int) -> None:
        """Leave signals to the trainer, except when the loader itself ends a worker: it may wait for a dead server."""
        leave_signals_to_the_trainer(worker)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self._ending.value else None)


def raised(items: Iterator[Any]) -> Iterator[Batch]:
    """The items; an item that is a UserError is raised."""
    for item in items:
        if isinstance(item, UserError):
            # Not `raise item`: an exception that its own frame names keeps the workers alive in a reference cycle,
            # and freeing that takes torch's full time limit, 5 s a worker.
            raise UserError(str(item)) from None
        yield item


def leave_signals_to_the_trainer(worker: int) -> None:
    """Launchers and terminals signal the whole process group: a worker that dies of it ends the run unsaved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _ErrorsAsItems(Dataset[Batch]):
    """Hands a UserError over as an item: torch would make its message the worker's traceback."""

    def __init__(self, reader: Dataset[Batch]) -> None:
        self._reader = reader

    def __getitem__(self, step: int) -> Any:
        try:
            return self._reader[step]
        except UserError as error:
            return error


class _StreamedSteps(IterableDataset[Batch]):
    """What one worker delivers; a UserError as the last item."""

    def __init__(self, batches: Callable[[range, int, int], Iterator[Batch]], steps: range) -> None:
        self._batches = batches
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._batches(self._steps[worker::workers], worker, workers)
        except UserError as error:
            yield error
