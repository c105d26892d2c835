"""Stopping on request: a signal sets a flag, the loop saves at a step boundary and ends with its own exit code."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

from hpcdistill.console import is_main_process

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command goes on from here


class StopSignals:
    """Catches SIGINT and SIGTERM while in use; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and is_main_process():
            # Straight to the terminal: a handler may interrupt whatever holds the console's lock.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self.received = True

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every rank when any rank has received a signal; a collective call with more than one rank."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(int(self.received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())
