"""Stopping on request: a signal sets a flag, the loop saves at a step boundary and ends with its own exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Final

import torch
from accelerate import Accelerator

from hpcdistill.console import err, is_main_process, say
from hpcdistill.errors import EXIT_INTERRUPTED
from hpcdistill.ranks import watchdog
from hpcdistill.ranks.environment import unignored

# SLURM's time limit and preemption (SIGTERM, or what `sbatch --signal` names), Ctrl-C, submitit (SIGUSR2).
STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PACE: Final = 1.0  # seconds between two agreements of the ranks
MOST_STEPS: Final = 20
ECHO: Final = 1.0  # seconds within which a second SIGINT under a launcher is the first one again
STUCK: Final = 3.0  # seconds after which a second SIGINT has not reached the main thread: it waits in a collective call
_NOTICE: Final = "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once"


class StopSignals:
    """Catches the signals in STOPPING while in use, but for those that were ignored; a second SIGINT stops at once.

    Python calls a handler when its main thread comes back from whatever it waits in, which may be a collective call
    that nobody answers. So a thread listens, too: it sets the flag, has the watchdog pass it on to the other ranks, and
    ends the process where a second SIGINT finds the main thread stuck.
    """

    def __init__(self, last: bool = False) -> None:
        """`last`: the process ends after it. Once stopped it then hears no more than Ctrl-C, also while Python ends:
        SLURM signals a training as well as the task that passes it on, and the later one finds it saved."""
        self.received = False
        self._last = last
        self._first: float | None = None  # when the first signal was handled
        self._previous: dict[signal.Signals, object] = {}
        self._done = threading.Event()
        self._notice = threading.Lock()  # taken by who says that a signal has come
        self.restart()

    def __enter__(self) -> StopSignals:
        for number in unignored(STOPPING):
            self._previous[number] = signal.signal(number, self._receive)
        ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._previous_mouth = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._done.clear()
        threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True).start()
        watchdog.listen(lambda: self.received)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        stopped = self._last and self.requested()
        watchdog.listen(None)
        signal.set_wakeup_fd(self._previous_mouth)
        self._done.set()
        self._mouth.close()
        # A launcher ends the others when one rank has failed: they first say who it was, in bounded time.
        last_words = kind is not None and watchdog.active() is not None
        for number, handler in self._previous.items():
            unheard = last_words or (stopped and number != signal.SIGINT)
            signal.signal(number, signal.SIG_IGN if unheard else handler)  # type: ignore[arg-type]

    def restart(self) -> None:
        """What comes now has a pace of its own, another network's steps, say; call it at the same step on all ranks."""
        self._steps, self._next, self._since = 0, 1, time.monotonic()

    def requested(self) -> bool:
        """Whether this rank, or within seconds any other, has received a signal. Ranks hear of it one by one."""
        return self.received or watchdog.stop_requested()

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every rank when any rank has received a signal; a collective call with more than one rank."""
        return on_any_rank(accelerator, self.requested())

    def agreed_at_step(self, accelerator: Accelerator) -> bool:
        """`agreed`, to be called after every step: the ranks ask one another about once in PACE seconds."""
        if accelerator.num_processes == 1:
            return self.received
        self._steps += 1
        if self._steps < self._next:
            return False
        now = time.monotonic()
        most, seconds = _largest(accelerator, float(self.requested()), (now - self._since) / self._steps)
        # The slowest rank's pace, the same number on all: so all come to the next agreement at the same step.
        self._steps, self._next, self._since = 0, min(MOST_STEPS, max(1, int(PACE / max(seconds, 1e-9)))), now
        return most > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_second(number, self._first, now):
            raise KeyboardInterrupt
        self._first = now if self._first is None else self._first
        self._note()

    def _note(self, in_thread: bool = False) -> None:
        self.received = True
        # A moving display has to know of every line, or it erases others in place of its own. A handler cannot tell it,
        # as it may interrupt whatever holds the console's lock: there the thread says it, elsewhere who is first.
        if not is_main_process() or (err.moves and not in_thread) or not self._notice.acquire(blocking=False):
            return
        if err.moves:
            with contextlib.suppress(OSError, SystemExit):  # the terminal is gone; rich makes SystemExit of that
                say(_NOTICE)
        else:
            os.write(2, f"{_NOTICE}\n".encode())

    def _listen(self, ear: socket.socket) -> None:
        first: float | None = None
        with ear:
            while heard := ear.recv(1):
                now = time.monotonic()
                if heard[0] not in STOPPING:
                    continue
                if self._is_second(heard[0], first, now) and not self._done.wait(STUCK):
                    if alone := watchdog.active():
                        alone.interrupt("stopped", EXIT_INTERRUPTED)
                    return
                first = now if first is None else first
                self._note(in_thread=True)

    def _is_second(self, number: int, first: float | None, now: float) -> bool:
        """Whether SIGINT has come once more: not as the echo of a launcher, which passes the terminal's Ctrl-C on to
        processes that have had it already."""
        again = number == signal.SIGINT and first is not None
        return again and (now - (first or 0.0) > ECHO or "RANK" not in os.environ)


def on_any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any rank, the same on all; a collective call with more than one rank."""
    return flag if accelerator.num_processes == 1 else _largest(accelerator, float(flag))[0] > 0


def _largest(accelerator: Accelerator, *values: float) -> list[float]:
    """The largest of each of `values` over all ranks."""
    reduced = torch.tensor(values, device=accelerator.device)
    torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
    largest: list[float] = reduced.tolist()
    return largest


def _forked() -> None:
    """A child (a data worker) must not write its own signals to the parent's thread."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)
