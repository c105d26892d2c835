"""Coloured is not the same as a terminal: FORCE_COLOR (SLURM sets it) colours a log and moves nothing in it."""

from __future__ import annotations

import io
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from terminal import Screen

from hpcdistill.console import PIPED, Table, Terminal, elided
from hpcdistill.data.progress import ProgressBar

CLONE = Path(__file__).resolve().parents[1]
VARIABLES = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")


class Window(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(
    ("file", "variables", "moves", "coloured"),
    [
        (Window, {}, True, True),
        (Window, {"FORCE_COLOR": "1"}, True, True),
        (Window, {"TERM": "dumb"}, False, False),
        (io.StringIO, {}, False, False),
        (io.StringIO, {"FORCE_COLOR": "1"}, False, True),
        (io.StringIO, {"TTY_COMPATIBLE": "1"}, False, True),
    ],
)
def test_what_moves_and_what_is_coloured(
    file: type[io.StringIO], variables: dict[str, str], moves: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console = Terminal(file=file())
    assert (console.moves, console.color_system is not None) == (moves, coloured)


def test_a_path_keeps_its_colons() -> None:
    console = Terminal(file=io.StringIO())
    console.print("runs/:x:/a", markup=False)
    table = Table("path", box=None)
    table.add_row("runs/:x:/b")
    console.print(table)
    assert [line.strip() for line in console.file.getvalue().splitlines()] == ["runs/:x:/a", "path", "runs/:x:/b"]


@pytest.mark.parametrize(
    "variables", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "80"}, {"TERM": "dumb", "FORCE_COLOR": "1"}]
)
def test_what_is_piped_is_wide(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Terminal(file=io.StringIO()).width == PIPED


def test_a_screen_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert Terminal(file=Window()).width == 70


def test_a_table_wraps_and_cuts_nothing() -> None:
    console = Terminal(file=Window(), width=30, color_system=None)
    table = Table("key", title="t")
    table.add_column("reason", justify="right")
    table.add_row("k" * 20, "/a/path/without/any/space/in/it.tar")
    with console.capture() as captured:
        console.print(table)
    columns = list(zip(*(line.split("│")[1:3] for line in captured.get().splitlines() if "│" in line), strict=True))
    assert ["".join(cells).replace(" ", "") for cells in columns] == ["k" * 20, "/a/path/without/any/space/in/it.tar"]


def test_names_keep_both_ends() -> None:
    assert [elided("dssd-teacher-x4", width) for width in (15, 14, 9, 3)] == [
        "dssd-teacher-x4",
        "dssd-t..her-x4",
        "dssd..-x4",
        "d..",
    ]


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_bar_keeps_its_numbers(columns: int, stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of data sets and archives are long; the count and the time left are what is looked at."""
    window = Window()
    monkeypatch.setattr("hpcdistill.data.progress.err", Terminal(file=window, width=columns))
    label = "fetching summer2winter_yosemite-and-more-letters-than-fit.zip"
    bar = ProgressBar(label, total=123_456, unit="images")
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext(), bar:
        bar.advance(99_999)
        bar._bar.refresh()  # type: ignore[union-attr]
        (line,) = on_screen(window, columns).splitlines()
        assert re.fullmatch(r"fetch.*\.\..*zip ━{4}.* +99999/123456 .*images/s -:--:--", line) or columns == 160
        if stopped:
            raise KeyboardInterrupt
    # What stopped has a line that says so, and needs no bar that stands still.
    assert ("99999/123456" in on_screen(window, columns)) is not stopped


def on_screen(window: Window, columns: int) -> str:
    screen = Screen(columns)
    screen.feed(window.getvalue())
    return screen.text


def test_one_place_decides() -> None:
    """rich's is_terminal says what is coloured; its tables cut what does not fit."""
    asked = re.compile(r"is_terminal|isatty\(|from rich\.table|rich\.console import Console\b")
    files = [file for room in ("hpcdistill", "shards", "slurm", "bench") for file in (CLONE / room).rglob("*.py")]
    found = [file.name for file in files if asked.search(file.read_text(encoding="utf-8"))]
    assert found == ["console.py"]
