"""What `benchmark latency` prints: a table and how to read it, or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.markup import escape

from hpcdistill.console import Table, out, say
from hpcdistill.deploy.latency.comparison import ROUNDS, WARM_UPS, Settings, compare
from hpcdistill.deploy.latency.paper import WARM_UPS as PAPER_WARM_UPS
from hpcdistill.deploy.latency.paper import measure_as_papers, save
from hpcdistill.deploy.latency.subjects import Subject
from hpcdistill.deploy.latency.variants import chosen_variants
from hpcdistill.errors import plural

MIB = 1 << 20


def report(subjects: Sequence[Subject], options: argparse.Namespace) -> None:
    """Measure `subjects` in all forms as the command line says, and print it."""
    settings = Settings(
        chosen_variants(options.variants),
        options.threads or (),
        options.size,
        options.rounds or ROUNDS,
        WARM_UPS if options.warm_ups is None else options.warm_ups,
        options.device,
        not options.no_memory,
    )
    found = compare(subjects, settings)
    found["trained"] = {subject.label: subject.trained for subject in subjects}
    if options.json:
        out.out(json.dumps(found), highlight=False)
        return
    several = len(settings.threads) > 1
    table = Table()
    for head in ("network", *(["threads"] if several else []), "form"):
        table.add_column(head)
    of_processor = ["CPU median"] if options.device == "cpu" else []
    for head in (*of_processor, "median", "mean", "p95", "images/s", "MiB", "off by"):
        table.add_column(head, justify="right")
    for row in found["rows"]:
        table.add_row(*_cells(row, several, bool(of_processor)))
    out.print(table)
    for line in _notes(found, subjects, options.device):
        out.print(line, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], several: bool, of_processor: bool) -> list[str]:
    begin = [escape(row["model"]), *([str(row["threads"])] if several else []), row["variant"]]
    if "unavailable" in row:
        return [*begin, "-"]
    times = [*(["cpu_median_ms"] if of_processor else []), "median_ms", "mean_ms", "p95_ms"]
    peak, difference = row.get("peak_bytes"), row.get("difference")
    return [
        *begin,
        *(f"{row[name]:.1f}" for name in times),
        f"{row['images_per_second']:.1f}",
        "" if peak is None else f"{peak / MIB:.0f}",
        "" if difference is None else f"{difference:.0e}",
    ]


def _notes(found: dict[str, Any], subjects: Sequence[Subject], device: str) -> list[str]:
    """What the numbers are of, a line each."""
    sizes = {row["model"]: row for row in found["rows"]}
    of = "; ".join(f"{model} {_by(row['input'])} to {_by(row['output'])}" for model, row in sizes.items())
    counts = sorted({row["threads"] for row in found["rows"]})
    threads = ", ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")
    where = f"on {found['device']}" + (f", {threads}" if device == "cpu" else "")
    lines = [
        f"Milliseconds an image (height x width: {of}), {where}, PyTorch {found['torch']}: "
        f"{plural(found['rounds'], 'round')}, all forms in turns, after {plural(found['warm_ups'], 'warm-up')} each."
    ]
    if device == "cpu":
        lines.append(
            "CPU median: processor time, the sum over threads, the steadier one where other programs run; the other "
            "columns are of the clock."
        )
        if found["torch_alone_bytes"]:
            lines.append(
                "MiB: the most resident memory of a process that runs this form alone, libraries included "
                f"(PyTorch and hpcdistill without a network: {found['torch_alone_bytes'] / MIB:.0f})."
            )
    else:
        lines.append("MiB: the most that PyTorch allocates on the GPU for this form, its weights included.")
    if any("difference" in row for row in found["rows"]):
        lines.append("Off by: the largest difference from eager float32 on the CPU.")
    reasons = dict.fromkeys((row["variant"], row["unavailable"]) for row in found["rows"] if "unavailable" in row)
    lines += [f"{variant}: not measured: {reason}." for variant, reason in reasons]
    if untrained := [subject.label for subject in subjects if not subject.trained]:
        lines.append(f"Untrained weights, which cost the same: {', '.join(untrained)}.")
    return lines


def report_as_papers(subjects: Sequence[Subject], options: argparse.Namespace) -> None:
    """Measure `subjects` by the papers' protocol, keep it where they are of a run, and print it."""
    rows = []
    for subject in subjects:
        for count in options.threads or [torch.get_num_threads()]:
            entry = measure_as_papers(
                subject,
                options.data,
                device=options.device,
                count=count,
                warm_ups=PAPER_WARM_UPS if options.warm_ups is None else options.warm_ups,
                most=options.rounds,
            )
            kept = save(subject, entry)
            rows.append({"model": subject.label, "network": subject.about.network, **entry})
            if kept is not None:
                say(f"{kept}: has it beside what other devices have given")
    if options.json:
        out.out(json.dumps(rows), highlight=False)
        return
    table = Table()
    for head in ("network", "device", "images"):
        table.add_column(head)
    for head in ("mean", "median", "p95", "CPU mean"):
        table.add_column(head, justify="right")
    for row in rows:
        device = row["device"] + (f", {plural(row['threads'], 'thread')}" if row["kind"] == "cpu" else "")
        times = (f"{row[name]:.2f}" for name in ("mean_ms", "median_ms", "p95_ms", "cpu_mean_ms"))
        table.add_row(escape(row["model"]), escape(device), _images(row), *times)
    out.print(table)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        out.print(f"Milliseconds. {protocol}.", markup=False, soft_wrap=True)
    for row in rows:
        weights = "" if row["trained"] else ", untrained weights, which cost the same"
        out.print(
            f"{row['model']}: {plural(row['warm_ups'], 'warm-up')} (the paper: {PAPER_WARM_UPS}), "
            f"{_by(row['input'])} to {_by(row['output'])}, PyTorch {row['torch']}{weights}.",
            markup=False,
            soft_wrap=True,
        )


def _images(row: dict[str, Any]) -> str:
    passes = "" if row["passes"] == row["images"] else f" in {row['passes']} passes"
    of = "" if row["images"] == row["of_images"] else f" of {row['of_images']}"
    return f"{row['images']}{of} of {escape(row['data'])}{passes}"


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
