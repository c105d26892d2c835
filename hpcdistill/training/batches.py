"""The batches of a run: one an optimizer step, on the device, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from hpcdistill.data.read.loader import ReadAhead, StopWaiting
from hpcdistill.methods.base import Batch
from hpcdistill.training.config import TrainConfig


class BatchReader(Protocol):
    """Batches by optimizer step."""

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        """This rank's batches of the steps first_step .. last_step - 1."""
        ...


def delivered(loader: Iterable[Batch], timeout: float) -> Generator[Batch | None]:
    """The batches; None when a signal to stop comes while one is waited for. Closing it ends the loader's processes."""
    if isinstance(loader, ReadAhead):
        loader.patience = timeout
    try:
        yield from loader
    except StopWaiting:
        yield None


class MicroBatches:
    """Puts this rank's share of each batch on the device, in `train.accumulation` equal parts."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.size, self.share = config.batch_size, config.batch_size // accelerator.num_processes
        self.parts, self.layout = config.accumulation, memory_layout(config)

    def of(self, batch: Batch, step: int) -> list[Batch]:
        """The micro-batches of 0-based `step`; `number`, int64 [N], is added: which of the run's draws they hold."""
        first = step * self.size + self.rank * self.share
        batch = {"number": torch.arange(first, first + self.share), **batch}
        batch = {key: self._moved(value) for key, value in batch.items()}
        if self.parts == 1:
            return [batch]
        cut = {key: value.chunk(self.parts) for key, value in batch.items()}
        return [{key: values[part] for key, values in cut.items()} for part in range(self.parts)]

    def _moved(self, value: Tensor) -> Tensor:
        value = value.to(self.device, non_blocking=True)
        return value.contiguous(memory_format=self.layout) if value.ndim == 4 else value


def memory_layout(config: TrainConfig) -> torch.memory_format:
    """How networks and images [N, C, H, W] lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format
