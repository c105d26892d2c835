"""gpu.html and gpu.md of a run of bench/gpu.py, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcdistill.storage import write_bytes
from hpcdistill.sweep.report import Block, Commands, Facts, Page, Row, Section, Table, Text, write_page

REHEARSAL = "This is a rehearsal on a CPU, with tiny budgets and pictures. None of its numbers is a result."
FACTS = ("devices", "driver", "cuda", "cudnn", "torch", "python", "cpu", "cores", "load", "revision", "time", "data")


def write_pages(report: Mapping[str, Any], out: Path) -> None:
    """Both pages, whole or not at all."""
    page = make_page(report)
    write_page(out / "gpu.html", page)
    write_bytes(out / "gpu.md", markdown(page).encode())


def make_page(report: Mapping[str, Any]) -> Page:
    """What was measured, part by part; those that failed or were cut with their last lines."""
    parts = report["parts"]
    troubled = [part for part in parts if part["status"] in ("failed", "cut")]
    first: list[Block] = [Text((REHEARSAL,), tone="caution")] if report["rehearsal"] else []
    if troubled:
        first.append(Text((f"Failed or cut: {', '.join(part['name'] for part in troubled)}.",), tone="caution"))
    sections = [Section("", (*first, _overview(parts)))]
    for part in parts:
        if blocks := _measured(part):
            sections.append(Section(part["name"], tuple(blocks)))
    for part in troubled:
        lines = [line for line in part.get("last_lines", ()) if line.strip()] or ["it wrote nothing"]
        sections.append(Section(f"{part['name']}: its last lines", (Text(tuple(lines)),)))
    facts = Facts(tuple((name, _fact(report["machine"].get(name))) for name in FACTS))
    ran = tuple((part["command"], part["what"]) for part in parts if part.get("command"))
    sections.append(Section("Where, and with which commands", (facts, *([Commands(ran)] if ran else []))))
    title = "Rehearsal of the GPU run, on a CPU" if report["rehearsal"] else "The GPU run"
    lead = f"Tests, steps and short trainings within {report['minutes']:g} minutes, the most valuable first."
    return Page(title, "hpcdistill bench/gpu.py", lead, tuple(sections))


def _overview(parts: list[dict[str, Any]]) -> Table:
    times = ("seconds", "limit_seconds")
    rows = [
        Row((part["name"], part["status"], *(_number(part.get(key)) for key in times), part["why"])) for part in parts
    ]
    return Table("The parts, in their order", ("part", "how it ended", "seconds", "its limit", "why"), tuple(rows))


def _measured(part: Mapping[str, Any]) -> list[Block]:
    result = part.get("result") or {}
    if "runs" in result:
        return _trainings(result["runs"])
    if part["name"] == "steps":
        return _steps(result.get("rows", []))
    rows = [Row((name, _number(value))) for name, value in _flat(result)]
    return [Table(part["what"], ("value", ""), tuple(rows))] if rows else []


def _steps(rows: list[dict[str, Any]]) -> list[Block]:
    cells = []
    for row in rows:
        name = f"{row['row']}, {row['form']}"
        if "error" in row:
            cells.append(Row((name, row["error"], "", "", "")))
            continue
        times = (f"{1000 * row[key]:.2f}" for key in ("seconds", "best"))
        memory = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        cells.append(Row((name, *times, memory, str(row["steps"]))))
    columns = ("step", "median ms", "best ms", "GiB at most", "steps")
    return [Table("A training step", columns, tuple(cells))] if cells else []


def _trainings(runs: Mapping[str, Any]) -> list[Block]:
    rows = [
        Row((name, str(run["steps"]), f"{run['seconds']:.1f}", f"{run['steps_per_second']:.2f}", _terms(run)))
        for name, run in runs.items()
    ]
    columns = ("run", "steps", "seconds", "steps a second", "loss terms, first line to last")
    return [Table("Trained", columns, tuple(rows))] if rows else []


def _terms(run: Mapping[str, Any]) -> str:
    first = run["first"]
    return ", ".join(f"{key} {_number(first.get(key))} to {_number(value)}" for key, value in run["last"].items())


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every number and word of a JSON value, by its path."""
    if isinstance(value, Mapping):
        return [pair for key, one in value.items() for pair in _flat(one, f"{name} / {key}" if name else str(key))]
    if isinstance(value, list):
        return [pair for number, one in enumerate(value) for pair in _flat(one, f"{name} {number + 1}")]
    return [(name, value)]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _fact(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


def markdown(page: Page) -> str:
    """The page's texts and tables as Markdown."""
    lines = [f"# {page.title}", "", page.lead, ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""] if section.title else []
        for block in section.blocks:
            lines += [*_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _lines(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"    {line}" if block.tone == "plain" else f"**{line}**" for line in block.paragraphs]
    if isinstance(block, Facts):
        return [f"- {name}: {value}" for name, value in block.facts]
    if isinstance(block, Commands):
        return [f"    {command}" for command, _ in block.commands]
    assert isinstance(block, Table)
    lines = [_row(block.columns), _row(("---",) * len(block.columns))]
    return [*lines, *(_row(row.cells) for row in block.rows)]


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
