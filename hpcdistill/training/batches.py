"""The batches of a run: one or more an iteration, on the device, cut into micro-batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from hpcdistill.data.read.loader import ReadAhead, StopWaiting
from hpcdistill.methods.base import Batch
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.layout import FORMATS, Layout

Delivered = list[Batch] | None  # of an iteration, see `delivered`
Cut = list[list[Batch]]  # the micro-batches of each of an iteration's batches
T = TypeVar("T")


class BatchReader(Protocol):
    """Batches by number, each of `train.batch_size` samples over all ranks."""

    def loader(self, first: int, last: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        """This rank's share of the batches first .. last - 1."""
        ...


def delivered(loader: Iterable[Batch], count: int, timeout: float) -> Generator[Delivered]:
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


def ahead(batches: Generator[Delivered], device: torch.device) -> Generator[Delivered]:
    """`batches`, of which those of the next iteration get to `device` while it computes the step before.

    So they are read one iteration ahead. On a CPU, where the two would share the cores, they are passed on as they
    come. Closing it closes `batches`.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = CopyStream(device)
    with contextlib.closing(batches):
        for taken, copied in _one_ahead(stream.started(batches)):
            stream.hand_over(taken, copied)
            yield taken


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Each of `items` after the one behind it has been taken."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


class CopyStream:
    """A CUDA stream beside the one that computes: batches are copied there, or made there by their reader."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def started(self, batches: Iterator[Delivered]) -> Iterator[tuple[Delivered, torch.cuda.Event]]:
        """Each on the device once its event has come; from pinned memory, so that nothing waits for the copy."""
        while True:
            with torch.cuda.stream(self._stream):
                taken = list(itertools.islice(batches, 1))
                moved = [one and [self._moved(batch) for batch in one] for one in taken]
                copied = self._stream.record_event()
            if not taken:
                return
            yield moved[0], copied

    def _moved(self, batch: Batch) -> Batch:
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def hand_over(self, batches: Delivered, copied: torch.cuda.Event) -> None:
        """To the stream that computes, which waits for them; the host does not."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for batch in batches or ():
            for value in batch.values():
                value.record_stream(computing)  # or its memory could be reused while it is computed with


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

    def of(self, batches: Sequence[Batch], step: int) -> Cut:
        """The micro-batches of each of 0-based `step`'s batches."""
        return [self._cut(batch, step * len(batches) + number) for number, batch in enumerate(batches)]

    def _cut(self, batch: Batch, number: int) -> list[Batch]:
        """Of the run's batch `number`; `number`, int64 [N], is added: which of the run's draws they hold."""
        first = number * self.size + self.rank * self.share
        batch = {"number": torch.arange(first, first + self.share, device=self.device), **batch}
        batch = {key: self._moved(value) for key, value in batch.items()}
        if self.parts == 1:
            return [batch]
        cut = {key: value.chunk(self.parts) for key, value in batch.items()}
        return [{key: values[part] for key, values in cut.items()} for part in range(self.parts)]

    def _moved(self, value: Tensor) -> Tensor:
        value = value.to(self.device, non_blocking=True)
        return value.contiguous(memory_format=self.layout) if value.ndim == 4 else value
