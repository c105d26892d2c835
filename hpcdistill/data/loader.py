"""Batches step by step, read ahead by processes: what every indexed reader hands to the training loop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _ErrorsAsItems(Dataset[Batch]):
    """Hands a UserError over as an item: torch would make its message the worker's traceback."""

    def __init__(self, reader: Dataset[Batch]) -> None:
        self._reader = reader

    def __getitem__(self, step: int) -> Any:
        try:
            return self._reader[step]
        except UserError as error:
            return error
