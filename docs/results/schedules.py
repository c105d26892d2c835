"""How often the student is updated, three readings: `python docs/results/schedules.py RUN [RUN ...]`.

RUN: folders of finished runs called <set>-<online-1|online-4|blocks>-<8 hex>. Writes schedules.csv (every evaluation,
by updates of the student) and schedules.svg beside this file, and prints the table of schedules.md.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hpcdistill.console import out
from hpcdistill.storage import write_bytes

HERE = Path(__file__).parent
METRIC = "frechet_efficientnet_lite0"
BLOCK, OF_TEACHER = 200, 40  # iterations of a pair of blocks, and the teacher's of them


def student_updates(schedule: str, step: int) -> int:
    """Updates of the student after `step` iterations of the run."""
    if schedule == "blocks":
        return step // BLOCK * (BLOCK - OF_TEACHER) + max(0, step % BLOCK - OF_TEACHER)
    return step * (4 if schedule == "online-4" else 1)


def curves(folder: Path) -> list[dict[str, Any]]:
    """A row for each evaluation of a run."""
    match = re.fullmatch(r"(\w+)-(online-1|online-4|blocks)-[0-9a-f]{8}", folder.name)
    assert match, folder
    data, schedule = match.groups()
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        found = {role: values.get(f"{role}/{data}/{METRIC}") for role in ("student", "teacher")}
        if found["student"] is not None:
            updates = student_updates(schedule, values["step"])
            head = {"set": data, "schedule": schedule, "seed": result["seed"], "step": values["step"]}
            rows.append({**head, "student_updates": updates, **found})
    return rows


def main(folders: list[str]) -> None:
    runs = sorted((curves(Path(folder)) for folder in folders), key=lambda rows: [str(rows[0][k]) for k in rows[0]][:3])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(runs[0][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for rows in runs for row in rows)
    write_bytes(HERE / "schedules.csv", text.getvalue().encode())
    sets = sorted({rows[0]["set"] for rows in runs})
    figure = Figure(figsize=(5 * len(sets), 3.6), layout="constrained")
    colours = {"online-1": "#1f77b4", "online-4": "#d62728", "blocks": "#2ca02c"}
    for axes, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for rows in (rows for rows in runs if rows[0]["set"] == data):
            schedule, seed = rows[0]["schedule"], rows[0]["seed"]
            points = [(row["student_updates"], row["student"]) for row in rows if row["student_updates"]]
            label = schedule if seed == 0 else None
            axes.plot(*zip(*points, strict=True), color=colours[schedule], linestyle=("-", "--")[seed % 2], label=label)
        axes.set(title=data, xlabel="updates of the student", ylabel="Frechet distance (EfficientNet-Lite0), student")
        axes.legend(title="dashed: seed 1")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_bytes(HERE / "schedules.svg", buffer.getvalue())
    for rows in runs:
        last, best = rows[-1], min(rows, key=lambda row: row["student"])
        out.out(
            f"| {last['set']} | {last['schedule']} | {last['seed']} | {last['student']:.1f} | {last['teacher']:.1f} | "
            f"{best['student']:.1f} (after {best['student_updates']} updates) |",
            highlight=False,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
