"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from rich.console import Group
from rich.live import Live
from rich.text import Text

from hpcdistill.console import elided, err, is_main_process, say, speaks_alone

# Of an evaluation without a metric, e.g. of unpaired images where no feature network is at hand.
NOTHING_MEASURED = "nothing could be measured; the last weights are kept"

LINE = 159  # characters of a plain line: longer ones wrap in every window
_BAR, _SHORTEST_BAR = 24, 6
_NAME, _SHORTEST_NAME = 40, 10
# Columns left free behind the display: a Ctrl-C echoes two there, which must not begin a line that nobody erases.
_ECHO = 3
_MORE = " ..."


class TrainingProgress:
    """Counts images and shows rate, time left, the losses of the last log point and the last evaluation."""

    def __init__(self, name: str, first_step: int, steps: int, batch_size: int) -> None:
        self.name, self.first, self.steps, self.batch_size = name, first_step, steps, batch_size
        self.step = first_step
        self.total = ""  # of the losses
        self.terms: list[str] = []
        self.metric = ""
        self._started = time.perf_counter()
        self._live: Live | None = None
        if is_main_process() and err.moves and speaks_alone():
            self._live = Live(get_renderable=self._display, console=err, refresh_per_second=4)

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            # Where a run stopped, the line that says so is the last word, not a bar that stands still.
            self._live.transient = self.step < self.steps
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since this session's first step."""
        return time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        return (self.step - self.first) * self.batch_size / max(self.seconds, 1e-9)

    @property
    def left(self) -> str:
        """The time left at the pace so far."""
        if self.step == self.first:
            return "-:--:-- left"
        return f"{_clock((self.steps - self.step) * self.seconds / (self.step - self.first))} left"

    def advance(self) -> None:
        self.step += 1

    def show_losses(self, losses: Mapping[str, float]) -> None:
        """Show the means of a log point by term, and their sum; without a terminal this prints one line."""
        self.total = f"loss {sum(losses.values()):.4g}" if losses else ""
        self.terms = [f"{name} {value:.4g}" for name, value in losses.items()]
        if not self._live:
            rate = f"{self.images_per_second:.0f} images/s"
            self._say("  ".join(part for part in (rate, self.left, self.total) if part), self.terms)

    def show_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show an evaluation's metrics; on a terminal the first, which is the one that selects the best weights."""
        values = [f"{name} {value:.3f}" for name, value in metrics.items()] or [NOTHING_MEASURED]
        self.metric = values[0].rpartition("/")[2] if metrics else ""
        if not self._live:
            self._say("evaluated:", values)
        elif not metrics:
            say(f"{self.name}: {NOTHING_MEASURED}")

    def _say(self, said: str, values: Iterable[str]) -> None:
        start = f"{elided(self.name, _NAME)} step {self.step}/{self.steps}  {said}"
        say(_filled(start, values, LINE))

    def _display(self) -> Group:
        """The line that is always whole, and below it as many terms as the screen has room for."""
        width = max(err.width - _ECHO, 1)
        rate = f"{self.images_per_second:.0f} images/s"
        values = [value for value in (f"{self.step}/{self.steps}", rate, self.left, self.metric, self.total) if value]
        said = "  ".join(values)
        if width - len(said) < _SHORTEST_NAME + _SHORTEST_BAR + 3:
            said = " ".join(values)
        room = width - len(said)
        name = elided(self.name, min(_NAME, max(room - _SHORTEST_BAR - 3, _SHORTEST_NAME)))
        bar = min(_BAR, room - len(name) - 3)
        if bar < _SHORTEST_BAR:  # no room for both, and the name is known
            name, bar = "", min(_BAR, room - 2)
        first = Text(no_wrap=True)
        if name:
            first.append(f"{name} ", "bold")
        if bar >= _SHORTEST_BAR:
            done = bar * self.step // max(self.steps, 1)
            first.append("━" * done, "bar.complete").append("━" * (bar - done), "bar.back").append("  ")
        first.append(said, "green")
        first.truncate(width)
        lines = [first]
        if self.terms:
            terms = _filled(" ", self.terms, width)
            lines.append(Text(terms, "cyan", no_wrap=True))
        return Group(*lines)


def _filled(start: str, values: Iterable[str], width: int) -> str:
    """`start` and as many of `values` as fit into `width` characters: cut at a whole one, and marked."""
    line, rest = start, list(values)
    while rest:
        longer = f"{line} {rest[0]}"
        if len(longer) + (len(_MORE) if len(rest) > 1 else 0) > width:
            return (line + _MORE)[:width]
        line = longer
        rest.pop(0)
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
