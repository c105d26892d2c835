"""Stopping on request: a signal sets a flag, the loop saves at a step boundary and ends with its own exit code."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Final

import torch
from accelerate import Accelerator

from hpcdistill.console import is_main_process

EXIT_STOPPED: Final = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command goes on from here
# SLURM's time limit and preemption (SIGTERM, or what `sbatch --signal` names), Ctrl-C, submitit (SIGUSR2).
STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PACE: Final = 1.0  # seconds between two agreements of the ranks
MOST_STEPS: Final = 100
ECHO: Final = 1.0  # seconds within which a second SIGINT under a launcher is the first one again


class StopSignals:
    """Catches the signals in STOPPING while in use; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0  # when the first signal came
        self._previous: dict[signal.Signals, object] = {}
        self._steps, self._next, self._since = 0, 1, time.monotonic()

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # A launcher passes the terminal's Ctrl-C on to processes that have had it already: that is one, not two.
        if self.received and number == signal.SIGINT and (now - self._first > ECHO or "RANK" not in os.environ):
            raise KeyboardInterrupt
        self._first = self._first if self.received else now
        if not self.received and is_main_process():
            # Straight to the terminal: a handler may interrupt whatever holds the console's lock.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self.received = True

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every rank when any rank has received a signal; a collective call with more than one rank."""
        if accelerator.num_processes == 1:
            return self.received
        return self._most(accelerator, float(self.received), 0.0)[0] > 0

    def agreed_at_step(self, accelerator: Accelerator) -> bool:
        """`agreed`, to be called after every step: the ranks ask one another about once in PACE seconds."""
        if accelerator.num_processes == 1:
            return self.received
        self._steps += 1
        if self._steps < self._next:
            return False
        now = time.monotonic()
        received, seconds = self._most(accelerator, float(self.received), (now - self._since) / self._steps)
        # The slowest rank's pace, the same number on all: so all come to the next agreement at the same step.
        self._steps, self._next, self._since = 0, min(MOST_STEPS, max(1, int(PACE / max(seconds, 1e-9)))), now
        return received > 0

    def _most(self, accelerator: Accelerator, *values: float) -> list[float]:
        told = torch.tensor(values, device=accelerator.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        largest: list[float] = told.tolist()
        return largest
