"""A command in a pseudo-terminal, and the screen as a person sees it: as much of one as a progress display needs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Sequence

PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r|\n|\x08)|([^\x1b\r\n\x08]+)")
UNFINISHED = re.compile(rb"(\x1b(\[[0-9;?]*)?|[\xc0-\xff][\x80-\xbf]{0,2})?\Z")
ROWS = 40


class Screen:
    """Carriage return, cursor up and down, erasing and wrapping; colours are dropped."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        for numbers, letter, control, words in PIECE.findall(text):
            if letter in ("A", "B"):
                self._go(int(numbers or 1) * (-1 if letter == "A" else 1))
            elif letter == "K":
                line = self.lines[self.row]
                self.lines[self.row] = "" if numbers == "2" else line[: self.column]
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._go(1)
            elif control == "\x08":
                self.column = max(0, self.column - 1)
            for character in words:
                if self.column == self.columns:
                    self._go(1)
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n")

    def _go(self, rows: int) -> None:
        self.row = max(0, self.row + rows)
        self.lines += [""] * (self.row + 1 - len(self.lines))


def run_in_terminal(
    command: Sequence[str], columns: int, look: Callable[[Screen], str | None] = lambda screen: None, **variables: str
) -> tuple[Screen, int]:
    """The screen at the command's end, and its exit code; `look` sees every change and says what to type, once each."""
    unwanted = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"TERM": "xterm-256color", **variables}
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        os.execvpe(command[0], command, environment)
    screen, rest, typed = Screen(columns), b"", set[str]()
    while True:
        try:
            content = os.read(terminal, 65536)
        except OSError:  # Linux's end of file of a terminal
            break
        if not content:
            break
        unfinished = UNFINISHED.search(rest + content)  # a character or an escape whose end is still to come
        assert unfinished
        whole, rest = (rest + content)[: unfinished.start()], unfinished.group()
        screen.feed(whole.decode())
        keys = look(screen)
        if keys is not None and keys not in typed:
            typed.add(keys)
            os.write(terminal, keys.encode())
    os.close(terminal)
    return screen, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
