"""A plan on paper: what is piped has no edge, and a screen's edge cuts nothing."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from hpcdistill.console import Terminal
from hpcdistill.sweep import plan_view
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.plan import Plan, make_plan
from hpcdistill.sweep.status import TaskStatus

CLONE = Path(__file__).resolve().parents[2]


class Window(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(CLONE)
    return make_plan(load_grids(["dssd-1"]))


def shown(plan: Plan, file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(plan_view, "out", Terminal(file=file, color_system=None))
    plan_view.show_cells(plan, {key: TaskStatus(key, run.name, "missing") for key, run in plan.runs.items()})
    return file.getvalue()


def test_a_piped_plan_has_room_for_everything(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FORCE_COLOR, which SLURM sets, it was cut to the 80 columns of a screen that was not there."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(plan, io.StringIO(), monkeypatch).splitlines()
    for run in plan.runs.values():
        if run.teacher:
            teacher = plan.runs[run.teacher].name
            assert any({run.name, run.key, teacher} <= set(line.split()) for line in lines), run.name


@pytest.mark.parametrize("columns", [50, 80])
def test_a_narrow_screen_cuts_nothing(columns: int, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(plan, Window(), monkeypatch)
    assert max(map(len, text.splitlines()[:12])) <= columns
    assert "…" not in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    columns_of = ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    for name in {run.name for run in plan.runs.values()}:
        assert any(name in column for column in columns_of), name
    assert re.search(r"30.93.*30.96.*31.04", columns_of[1])
