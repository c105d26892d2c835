"""The ends of a run's files, read without the rest: how far it is, and the line that says why it has ended."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.training.records import read_row

METRICS_BYTES = 1 << 16  # some dozens of lines
LOG_BYTES = 1 << 15
LOG_LINES = 150  # a traceback and what launchers say after it
RATE_LINES = 10

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_OURS = re.compile(r"^(?:rank \d+: )?error: ")
_RANK = re.compile(r"^\[(?:default|rank)?\d+\]:\s*")  # which launchers put before a process's lines
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Killed|Timeout)\b(?:: .*)?$")
# Said by torch's launcher and SLURM of any end; they name no cause.
_NOISE = re.compile(
    r"ChildFailedError|torch\.distributed\.elastic|^[EWI]\d{4} |^\[[EWI]\d|^=+$|^-+$|^srun: |^Root Cause|^<NO_OTHER"
    r"|CANCELLED AT|^\s*(?:time|host|rank|exitcode|error_file|traceback) +: "
)


@dataclass(frozen=True)
class LoggedProgress:
    """What the last lines of metrics.jsonl say."""

    step: int | None = None
    rate: float | None = None  # steps/s over the last lines
    metrics: dict[str, float] | None = None  # of the last evaluation


def read_progress(file: Path) -> LoggedProgress:
    """The progress in `file`, nothing where there is none yet. Half a line, or one that is no JSON, is passed over."""
    step: int | None = None
    metrics: dict[str, float] | None = None
    timed: list[tuple[int, float]] = []
    for line in reversed(tail(file, METRICS_BYTES)):
        timed_enough, evaluation = len(timed) >= RATE_LINES, '"images"' not in line
        if timed_enough and metrics is not None:
            break
        if metrics is not None if evaluation else timed_enough:
            continue  # told without reading it
        row = read_row(line.encode())
        if row is None:
            continue
        step = row["step"] if step is None else step
        if evaluation:
            metrics = {name: value for name, value in row.items() if name != "step" and isinstance(value, float | int)}
        elif isinstance(row.get("seconds"), float | int):
            timed.append((row["step"], float(row["seconds"])))
    rate = None
    if len(timed) > 1:
        (last, end), (first, start) = timed[0], timed[-1]
        if end > start and last > first:
            rate = (last - first) / (end - start)
    return LoggedProgress(step, rate, metrics)


def last_words(log: Path) -> str | None:
    """The line of a log that says why its process has ended.

    That is hpcdistill's own `error:` line, or argparse's, else the last exception, else what the system said of a kill,
    else the last line; what launchers print of every failed process is passed over.
    """
    lines = log_lines(log)
    errors = [line for line in lines if line.startswith("error: ") or ": error: " in line]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    found = errors or exceptions or [line for line in lines if "oom" in line.lower()] or lines
    return found[-1] if found else None


def cause(log: Path) -> str | None:
    """`last_words` without the `error: ` before them."""
    said = last_words(log)
    return _OURS.sub("", said) if said else None


def log_lines(log: Path) -> list[str]:
    """The last lines of a log that are worth reading: without colours, ranks and the launchers' noise."""
    lines = (
        _RANK.sub("", _COLOURS.sub("", line).rpartition("\r")[2]).strip() for line in tail(log, LOG_BYTES)[-LOG_LINES:]
    )
    return [line for line in lines if line and not _NOISE.search(line)]


def tail(file: Path, size: int) -> list[str]:
    """The lines that begin in the last `size` bytes of `file`; none when it is not there."""
    try:
        with open(file, "rb") as opened:
            start = max(0, opened.seek(0, os.SEEK_END) - size)
            opened.seek(start)
            content = opened.read()
    except OSError:
        return []
    if start:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace").splitlines()
