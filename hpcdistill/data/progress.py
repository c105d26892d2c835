"""A progress bar with rate and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from hpcdistill.console import err, is_main_process, say

_PLAIN_INTERVAL = 10.0  # seconds between plain lines


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}/s" if task.speed else f"- {self.unit}/s")


class Progress:
    """Counts towards `total`; `done` of it was done by an earlier run and does not count for the rate."""

    def __init__(self, label: str, *, total: int, unit: str, done: int = 0) -> None:
        self._label, self._unit, self._total = label, unit, total
        self._done = self._before = done
        self._started = self._said = time.monotonic()
        self._bar: Bar | None = None
        if err.is_terminal and is_main_process():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, _Rate(unit), TimeRemainingColumn(), console=err)
            self._task = self._bar.add_task(label, total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now - self._said >= _PLAIN_INTERVAL:
            self._said = now
            rate = (self._done - self._before) / (now - self._started)
            left = timedelta(seconds=round((self._total - self._done) / rate))
            say(f"{self._label}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s, {left} left")
