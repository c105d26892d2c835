"""A progress bar with rate and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from hpcdistill.console import elided, err, is_main_process, say, speaks_alone

BYTES = "bytes"  # the unit that is shown in MB
_PLAIN_INTERVAL = 10.0  # seconds between plain lines
_BAR, _SHORTEST_BAR, _SHORTEST_LABEL = 40, 6, 12  # columns
_NUMBERS = 44  # columns of a count, a rate and the time left, with what stands between them


def megabytes(count: float) -> str:
    """A number of bytes as people read it: `116.9 MB`, `3.53 GB` (decimal, as download pages give it)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed, self.unit) if task.speed else f"- {_rate_unit(self.unit)}")


class ProgressBar:
    """Counts towards `total`; `done` of it was done by an earlier run and does not count for the rate.

    `unit` is what is counted; with "bytes", MB and MB/s are shown. A `total` of None is one that nobody knows yet.
    """

    def __init__(self, label: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self._label, self._unit, self._total = label, unit, total
        self._done = self._before = done
        self._started = self._said = time.monotonic()
        self._bar: Bar | None = None
        if err.moves and speaks_alone() and is_main_process():
            count = DownloadColumn() if unit == BYTES else MofNCompleteColumn()
            # Left to itself rich squeezes all columns alike where the screen is narrow, the numbers too.
            label = elided(label, max(err.width - _NUMBERS - _SHORTEST_BAR, _SHORTEST_LABEL))
            bar = BarColumn(max(_SHORTEST_BAR, min(_BAR, err.width - _NUMBERS - len(label))))
            columns = (TextColumn("{task.description}"), bar, count)
            self._bar = Bar(*columns, _Rate(unit), TimeLeft(), console=err)
            self._task = self._bar.add_task(label, total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.live.transient = kind is not None  # what stopped has a line that says so
            self._bar.stop()

    def restart(self, done: int, total: int | None) -> None:
        """Count from `done` on, towards another `total`: a download that is resumed, or begins again at zero."""
        self._done = self._before = done
        self._total, self._started = total, time.monotonic()
        if self._bar:
            self._bar.reset(self._task, total=total, completed=done)

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self._done += n
        if self._bar:
            self._bar.advance(self._task, n)
            return
        now = time.monotonic()
        if now - self._said >= _PLAIN_INTERVAL:
            self._said = now
            say(self._line(now))

    def _line(self, now: float) -> str:
        seconds = now - self._started
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        of = "" if self._total is None else f"/{self._total}"
        count = f"{self._done}{of}"
        if self._unit == BYTES:
            count = megabytes(self._done) + ("" if self._total is None else f" of {megabytes(self._total)}")
        line = f"{self._label}: {count}, {_rate(rate, self._unit)}"
        if self._total is None or rate <= 0:
            return line
        return f"{line}, {timedelta(seconds=round(max(0, self._total - self._done) / rate))} left"


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 1e6 if unit == BYTES else rate:.1f} {_rate_unit(unit)}"


def _rate_unit(unit: str) -> str:
    return "MB/s" if unit == BYTES else f"{unit}/s"
