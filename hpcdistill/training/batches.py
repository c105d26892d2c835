"""The batches of a run: one or more an iteration, on the device, cut into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from hpcdistill.data.read.loader import ReadAhead, StopWaiting
from hpcdistill.methods.base import Batch
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.layout import FORMATS, Layout


class BatchReader(Protocol):
    """Batches by number, each of `train.batch_size` samples over all ranks."""

    def loader(self, first: int, last: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        """This rank's share of the batches first .. last - 1."""
        ...


def delivered(loader: Iterable[Batch], count: int, timeout: float) -> Generator[list[Batch] | None]:
    """The batches, `count` for each iteration; None when a signal to stop comes while one is waited for.

    Closing it ends the loader's processes.
    """
    if isinstance(loader, ReadAhead):
        loader.patience = timeout
    single = iter(loader)
    try:
        while batches := list(itertools.islice(single, count)):
            yield batches
    except StopWaiting:
        yield None
    finally:
        if isinstance(single, Generator):
            single.close()


class MicroBatches:
    """Puts this rank's share of each batch on the device, in `train.accumulation` equal parts.

    Step k of `count` batches a step takes those of numbers k * count up to (k + 1) * count - 1. So what an iteration
    sees does not depend on ranks and accumulation, no sample is seen twice in a pass, and a resumed run finds its
    place from the step alone.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, layout: Layout = "contiguous") -> None:
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.size, self.share = config.batch_size, config.batch_size // accelerator.num_processes
        self.parts, self.layout = config.accumulation, FORMATS[layout]

    def of(self, batches: Sequence[Batch], step: int) -> list[list[Batch]]:
        """The micro-batches of each of 0-based `step`'s batches."""
        return [self._cut(batch, step * len(batches) + number) for number, batch in enumerate(batches)]

    def _cut(self, batch: Batch, number: int) -> list[Batch]:
        """Of the run's batch `number`; `number`, int64 [N], is added: which of the run's draws they hold."""
        first = number * self.size + self.rank * self.share
        batch = {"number": torch.arange(first, first + self.share), **batch}
        batch = {key: self._moved(value) for key, value in batch.items()}
        if self.parts == 1:
            return [batch]
        cut = {key: value.chunk(self.parts) for key, value in batch.items()}
        return [{key: values[part] for key, values in cut.items()} for part in range(self.parts)]

    def _moved(self, value: Tensor) -> Tensor:
        value = value.to(self.device, non_blocking=True)
        return value.contiguous(memory_format=self.layout) if value.ndim == 4 else value
