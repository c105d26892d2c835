"""What a pass takes, on the clock and of the processor, and of which device that is."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from hpcdistill.errors import plural

Pass = Callable[[], Any]  # one image through the network: a tensor on its device, or an array
T = TypeVar("T")


@dataclass
class Timing:
    """The passes of one form, in seconds: on the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, run: Pass, device: str) -> Any:
        """One pass, measured; returns what it makes."""
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        made = run()
        synchronise(device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return made

    def summary(self) -> dict[str, float]:
        """Milliseconds and images a second, for one image a pass."""
        wall, cpu = 1e3 * np.array(self.wall), 1e3 * np.array(self.cpu)
        return {
            "median_ms": float(np.median(wall)),
            "mean_ms": float(wall.mean()),
            "p95_ms": float(np.percentile(wall, 95)),
            "cpu_median_ms": float(np.median(cpu)),
            "cpu_mean_ms": float(cpu.mean()),
            "images_per_second": float(1e3 / wall.mean()),
        }


def turns(entrants: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """All of them in each round, each time in another order: a form pays for what the one before has left of caches."""
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(entrants, len(entrants))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, and what is opened within, with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """As people call it: the GPU's or the processor's name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "a CPU"


def place_name(device: str, count: int) -> str:
    """The device's name with, of a CPU, the number of threads: a time belongs to both."""
    return device_name(device) if device != "cpu" else f"{device_name(device)}, {plural(count, 'thread')}"
