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


def micro_batches(batch: Batch, step: int, accelerator: Accelerator, config: TrainConfig) -> list[Batch]:
    """This rank's share of the batch of `step` on the device, in `train.accumulation` equal parts.

    `number` is added to it: int64 [N], which of the run's draws its samples are.
    """
    share = config.batch_size // accelerator.num_processes
    first = step * config.batch_size + accelerator.process_index * share
    batch = {"number": torch.arange(first, first + share), **batch}
    batch = {key: _moved(value, accelerator.device, config) for key, value in batch.items()}
    if config.accumulation == 1:
        return [batch]
    parts = {key: value.chunk(config.accumulation) for key, value in batch.items()}
    return [{key: values[i] for key, values in parts.items()} for i in range(config.accumulation)]


def memory_layout(config: TrainConfig) -> torch.memory_format:
    """How networks and images [N, C, H, W] lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _moved(value: Tensor, device: torch.device, config: TrainConfig) -> Tensor:
    value = value.to(device, non_blocking=True)
    return value.contiguous(memory_format=memory_layout(config)) if value.ndim == 4 else value
