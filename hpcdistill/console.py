"""The one place that writes to the terminal: a rich console and a log that only rank 0 speaks through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console, ConsoleDimensions

from hpcdistill.ranks.environment import rank

PIPED = 220  # columns where there is no terminal to fit into


class Terminal(Console):
    """A console that keeps two questions apart: is it coloured (rich's `is_terminal`), is it a screen (`moves`).

    FORCE_COLOR colours files and pipes too, and SLURM sets it for every job: a log may have colours, but a display that
    moves the cursor would make one line of it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"emoji": False, **settings})  # a path may have `:x:` in it, which is no picture

    @property
    def moves(self) -> bool:
        """Whether a display may redraw itself: the one decision on bars and live tables."""
        return self.is_terminal and self._is_screen() and not self.is_dumb_terminal

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines of the screen; wide where there is none, as a file or a pipe has no edge.

        COLUMNS does not make that narrower: readline exports it to whatever a Python starts, as 80.
        """
        width, height = super().size
        return ConsoleDimensions(width if self._is_screen() else max(width, PIPED), height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def _is_screen(self) -> bool:
        try:
            return self.file.isatty()
        except (AttributeError, ValueError):  # closed, or not quite a file
            return False


class Table(rich.table.Table):
    """A table that wraps what is too long for a cell; rich's own cuts it off, and with it what the reader came for."""

    def add_column(self, *header: Any, **settings: Any) -> None:
        super().add_column(*header, **{"overflow": "fold", **settings})


# Results (tables, JSON) go to stdout, everything said along the way to stderr, so that output can be piped.
out = Terminal(highlight=False)
err = Terminal(stderr=True, highlight=False)


@dataclass(frozen=True)
class _Voice:
    """How one of several runs in this process speaks."""

    start: str  # of each line
    console: Terminal


_voice: ContextVar[_Voice | None] = ContextVar("voice", default=None)


@contextlib.contextmanager
def speaking(label: str, log: Path | None) -> Iterator[None]:
    """While it lasts, what this thread says begins with `[label] `, or goes to the end of the file `log` as it is."""
    with contextlib.ExitStack() as stack:
        voice = _Voice(f"[{label}] ", err)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            voice = _Voice("", Terminal(file=stack.enter_context(log.open("a", encoding="utf-8")), highlight=False))
        token = _voice.set(voice)
        try:
            yield
        finally:
            _voice.reset(token)


def speaks_alone() -> bool:
    """Whether no other run of this process speaks: displays that redraw themselves would draw over one another."""
    return _voice.get() is None


def is_main_process() -> bool:
    """True on global rank 0, read from the environment that torchrun, accelerate and submitit set."""
    return rank() == 0


def say(message: str, style: str | None = None) -> None:
    """`say_here` on rank 0 only."""
    if is_main_process():
        say_here(message, style)


def say_here(message: str, style: str | None = None) -> None:
    """Print one line for the user, on whichever rank; markup in `message` is shown as it is."""
    voice = _voice.get() or _Voice("", err)
    voice.console.print(f"{voice.start}{message}", style=style, markup=False, soft_wrap=True)
    if voice.console is not err:
        voice.console.file.flush()


def warn(message: str) -> None:
    """Print one warning line, on rank 0 only."""
    say(f"warning: {message}", style="yellow")


def elided(name: str, width: int) -> str:
    """`name` in `width` characters, without its middle where it is longer: variants differ at their ends."""
    if len(name) <= width:
        return name
    end = (width - 2) // 2
    return f"{name[: width - 2 - end]}..{name[len(name) - end :]}"
