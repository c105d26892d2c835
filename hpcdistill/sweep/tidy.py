"""The numbers of tables for other programs: JSON, and one tidy CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcdistill.sweep.results import WHICH, RunResult
from hpcdistill.sweep.tables import ResultTable, Summary, TableRow, describe_protocol


def as_json(table: ResultTable) -> dict[str, Any]:
    """Everything of the table as JSON values, at full precision; null where a number is not finite."""
    grid = table.grid
    return {
        "grid": grid.name,
        "title": grid.title,
        "paper": grid.paper,
        "table": grid.table,
        "seeds": list(table.seeds),
        "within": list(grid.within),
        "metrics": [
            {"name": m.name, "label": m.label, "of": m.of, "better": m.better, "digits": m.digits} for m in grid.metrics
        ],
        "cells": [_row_json(row) for row in table.rows],
        "order": [
            {"metric": o.metric.name, "group": list(o.group), "kendall_tau_b": _finite(o.tau), "n": o.n}
            for o in table.orders
        ],
        "flags": list(table.flags),
        "protocols": list(table.protocols),
        "revisions": list(table.revisions),
    }


CSV_COLUMNS = (
    ["grid", "paper", "table", "labels", "metric", "seed", "which", "step", "value", "printed", "state", "key", "run"]
    + ["revision", "protocol"]
)  # fmt: skip


def tidy_csv(tables: Iterable[ResultTable], others: Iterable[RunResult] = ()) -> str:
    """One line for each number: cell, metric, seed and best or last. What has no number has a line that says why.

    `others` are runs that belong to none of the tables: all their metrics, with no grid and no labels.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    about: dict[str, dict[str, Any]] = {}

    def of_run(run: RunResult) -> dict[str, Any]:
        if run.folder.name not in about:
            facts = {"run": run.folder.name, "revision": run.revision, "protocol": describe_protocol(run.result)}
            about[run.folder.name] = {**facts, "key": run.key or "", "state": "finished"}
        return about[run.folder.name]

    for table in tables:
        grid = table.grid
        for row in table.rows:
            place = {"grid": grid.name, "paper": grid.paper, "table": grid.table}
            place["labels"] = json.dumps(row.cell.labels, ensure_ascii=False)
            for metric in grid.metrics:
                entry = row.entries[metric.name]
                line = {**place, "metric": metric.name, "printed": "" if entry.printed is None else entry.printed}
                if entry.measured and entry.best:
                    writer.writerow({**line, "which": "measured", "value": entry.best.mean, "state": "measured"})
                elif row.cell.kind == "reported" and row.states(metric.name):
                    writer.writerow({**line, "state": "reported"})
                for trial in row.trials if not entry.measured else ():
                    seeded = {**line, "seed": trial.seed, "key": trial.key, "state": trial.state}
                    name = row.cell.of.get(metric.name)
                    measured = {which: trial.run.metrics(which) for which in WHICH} if trial.run else {}
                    values = {which: found[name] for which, found in measured.items() if name in found}
                    if trial.run is None or not values:
                        more = of_run(trial.run) if trial.run else {}
                        writer.writerow({**seeded, **more, "state": "unmeasured" if trial.run else trial.state})
                    for which, value in values.items():
                        assert trial.run
                        found = {"which": which, "step": trial.run.step(which), "value": value}
                        writer.writerow({**seeded, **of_run(trial.run), **found})
    for run in others:
        for which in WHICH:
            for name, value in run.metrics(which).items():
                line = {"labels": "{}", "metric": name, "seed": run.result.get("seed", ""), "value": value}
                writer.writerow({**of_run(run), **line, "which": which, "step": run.step(which)})
    return buffer.getvalue()


def _row_json(row: TableRow) -> dict[str, Any]:
    def summary(found: Summary | None) -> dict[str, Any] | None:
        if found is None:
            return None
        deviation = None if found.deviation is None else _finite(found.deviation)
        values: Sequence[float | None] = [_finite(value) for value in found.values]
        return {"mean": _finite(found.mean), "deviation": deviation, "n": found.n, "values": values}

    metrics: Mapping[str, Any] = {
        name: {
            "printed": entry.printed,
            "best": summary(entry.best),
            "last": summary(entry.last),
            "difference": None if entry.difference is None else _finite(entry.difference),
            "measured": entry.measured,
            "without": dict(row.states(name)),
        }
        for name, entry in row.entries.items()
    }
    runs = [
        {
            "seed": trial.seed,
            "key": trial.key,
            "state": trial.state,
            "run": trial.run.folder.name if trial.run else None,
            "reason": trial.reason or None,
        }
        for trial in row.trials
    ]
    return {
        "labels": row.cell.labels,
        "kind": row.cell.kind,
        "note": row.cell.note,
        "metrics": metrics,
        "runs": runs,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
