"""What a run shows: on a screen one line that is always whole, in a file plain lines, whatever FORCE_COLOR says."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import run_in_terminal

from hpcdistill.console import Terminal
from hpcdistill.training import progress
from hpcdistill.training.progress import TrainingProgress

CLONE = Path(__file__).resolve().parents[2]
TERMS = {
    f"teacher/{part}_lr{scale}": 0.012345 for part in ("degradation", "encoder", "reconstruction") for scale in (2, 4)
}
RUN = """
import sys
from hpcdistill.training.progress import TrainingProgress
name, first, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
terms = {f"teacher/{part}_lr{scale}": 0.012345 for part in ("degradation", "encoder", "last") for scale in (2, 4)}
with TrainingProgress(name, first, steps, 16) as progress:
    for _ in range(5):
        progress.advance()
    progress.show_losses(terms)
    progress.show_evaluation({"teacher/set5/psnr": 28.1234})
    while progress.step < steps and "finish" in sys.argv:
        progress.advance()
"""


class Window(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(columns: int, name: str, first: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the live display after an evaluation."""
    console = Terminal(width=columns, file=Window(), color_system=None)
    monkeypatch.setattr(progress, "err", console)
    bar = TrainingProgress(name, first, steps, 16)
    for _ in range(5):
        bar.advance()
    bar.show_losses(TERMS)
    bar.metric = "psnr 28.123"
    with console.capture() as captured:
        console.print(bar._display())
    return captured.get().splitlines()


@pytest.mark.parametrize("columns", [80, 100, 160])
@pytest.mark.parametrize(("first", "steps"), [(0, 60), (987_000, 1_000_000)])
def test_the_line_has_all_that_matters(columns: int, first: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line, terms = shown(columns, "dssd-teacher-x4", first, steps, monkeypatch)
    assert len(line) < columns
    assert len(terms) < columns
    for part in (rf"{first + 5}/{steps} ", r"\d images/s", r"\d:\d\d:\d\d left", "psnr 28.123", "loss 0.07407", "━{6}"):
        assert re.search(part, line), (part, line)
    assert re.fullmatch(r"  teacher/degradation_lr2 0.01235 .* \.\.\.|.*reconstruction_lr4 0.01235", terms)
    if columns >= 100:
        assert line.startswith("dssd-teacher-x4 ")


@pytest.mark.parametrize("columns", [1, 20, 40, 60])
def test_narrower_screens_lose_the_end_of_the_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(columns, "a-run-with-a-name-of-some-length", 0, 60, monkeypatch)
    assert len(lines) == 2
    assert all(len(line) <= columns for line in lines)


def test_a_screen_shows_it_to_the_end() -> None:
    command = [sys.executable, "-c", RUN, "toy", "0", "60", "finish"]
    screen, code = run_in_terminal(command, 100, PYTHONPATH=str(CLONE))
    assert code == 0
    line, terms = screen.text.splitlines()
    assert "  60/60  " in line
    assert "0:00:00 left  psnr 28.123  loss 0.07407" in line
    assert terms.startswith("  teacher/degradation_lr2 0.01235 ")


def test_a_run_that_stops_leaves_no_bar() -> None:
    screen, code = run_in_terminal([sys.executable, "-c", RUN, "toy", "0", "60"], 80, PYTHONPATH=str(CLONE))
    assert (code, screen.text) == (0, "")


@pytest.mark.parametrize("coloured", ["", "1"])
def test_a_log_has_lines(coloured: str) -> None:
    """SLURM exports FORCE_COLOR: in a file that is no reason to move a cursor."""
    name = "a-name-" + "of-many-letters-" * 6 + "its-end"
    command = [sys.executable, "-c", RUN, name, "99995", "1000000"]
    environment = {"PYTHONPATH": str(CLONE), **({"FORCE_COLOR": coloured} if coloured else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    losses, evaluated = done.stderr.splitlines()
    assert "\x1b" not in done.stderr
    assert re.search(
        r"its-end step 100000/1000000  \d+ images/s  \d+:\d\d:\d\d left  loss 0.07407 teacher/\S+ ", losses
    )
    assert losses.endswith(" ...")  # at a whole term
    assert evaluated.endswith("step 100000/1000000  evaluated: teacher/set5/psnr 28.123")
    assert max(map(len, done.stderr.splitlines())) < 160
