"""A table in each format: Markdown, LaTeX (booktabs) and HTML for readers, JSON and one tidy CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hpcdistill.sweep.results import WHICH, RunResult
from hpcdistill.sweep.table_layout import ARROWS, PLUS_MINUS, SIGNS, Column, Layout, Panel, Sign, TableCell, notes
from hpcdistill.sweep.table_rows import ResultTable, Summary, TableRow, describe_protocol

_LATEX: dict[str, str] = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # these two would belong to the \\ of the line before
    "*": "{*}",
    PLUS_MINUS: r"$\pm$",
    "\u00d7": r"$\times$",
    "\u2191": r"$\uparrow$",
    "\u2193": r"$\downarrow$",
    "\u2192": r"$\rightarrow$",
    "\u03bb": r"$\lambda$",
}


def markdown(layout: Layout) -> str:
    """GitHub's kind of table, with its notes below."""

    def formatted(cell: TableCell) -> str:
        text = _escape_markdown(cell.text)
        return " ".join(
            part
            for part in (
                f"**{text}**" if cell.bold else text,
                cell.spread and f"{PLUS_MINUS} {cell.spread}",
                f"({cell.n})" if cell.n > 1 else "",
                _signs(cell, lambda sign: sign.text),
            )
            if part
        )

    lines = [f"**{_escape_markdown(layout.caption)}**", ""]
    for panel in layout.panels:
        lines.append("| " + " | ".join(_escape_markdown(_one_line_head(column)) for column in panel.columns) + " |")
        lines.append("|" + "|".join("---" if column.metric is None else "---:" for column in panel.columns) + "|")
        lines += ["| " + " | ".join(map(formatted, row)) + " |" for row in panel.rows]
        lines.append("")
    lines += [f"- {_escape_markdown(line)}" for line in notes(layout)]
    return "\n".join(lines) + "\n"


def latex(layout: Layout) -> str:
    r"""A `table` with \usepackage{booktabs}."""

    def formatted(cell: TableCell) -> str:
        text = escape_latex(cell.text)
        if cell.value is not None:
            text = text.replace("-", "$-$", 1) if text.startswith("-") else text
        return " ".join(
            part
            for part in (
                rf"\textbf{{{text}}}" if cell.bold else text,
                cell.spread and rf"$\pm$ {cell.spread}",
                f"({cell.n})" if cell.n > 1 else "",
                _signs(cell, lambda sign: sign.latex),
            )
            if part
        )

    body: list[str] = []
    for panel in layout.panels:
        body += ([r"\par\medskip"] if body else []) + _tabular(layout, panel, formatted)
    signs = "; ".join(f"{sign.latex} {escape_latex(meaning)}" for sign, meaning in layout.legend)
    said = [escape_latex(line) for line in notes(layout, legend=False)] + ([signs + "."] if signs else [])
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(layout.caption)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', layout.table.grid.name)}}}",
        *body,
        *(rf"\par\smallskip{{\footnotesize {line}\par}}" for line in said),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tabular(layout: Layout, panel: Panel, formatted: Callable[[TableCell], str]) -> list[str]:
    rows = layout.table.rows
    heads, rules, at = [], [], 1
    for metric, span in panel.spans:
        if metric is None:
            heads += [""] * span
        else:
            arrow = ARROWS[metric.better][1]
            heads.append(rf"\multicolumn{{{span}}}{{c}}{{{escape_latex(metric.label)} {arrow}}}")
            rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
        at += span
    lines = [
        rf"\begin{{tabular}}{{{''.join('l' if column.metric is None else 'r' for column in panel.columns)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        " ".join(rules),
        " & ".join(escape_latex(column.head) for column in panel.columns) + r" \\",
        r"\midrule",
    ]
    for number, row in enumerate(panel.rows):
        if number and rows[number].group != rows[number - 1].group:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(formatted, row)) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def html(layout: Layout) -> str:
    """A `<table>` for each panel; `data-sort` of a cell is what a script may sort by, `aria-sort` marks such heads."""
    return "".join(_html_table(layout, panel) for panel in layout.panels)


def _html_table(layout: Layout, panel: Panel) -> str:
    heads, columns, rows = Markup(""), Markup(""), Markup("")
    for metric, span in panel.spans:
        if metric is None:
            heads += Markup('<td colspan="{}"></td>').format(span)
        else:
            label = f"{metric.label} {ARROWS[metric.better][0]}"
            heads += Markup('<th scope="colgroup" colspan="{}"><span>{}</span></th>').format(span, label)
    for number, column in enumerate(panel.columns):
        kind = _class(column) + " naming" * (number == panel.naming)
        columns += Markup('<th scope="col" class="{}" aria-sort="none">{}</th>').format(kind, column.head)
    groups = [row.group for row in layout.table.rows]
    for number, row in enumerate(panel.rows):
        begins = number and groups[number] != groups[number - 1]
        rows += Markup('<tr class="begins">') if begins else Markup("<tr>")
        for place, (column, cell) in enumerate(zip(panel.columns, row, strict=True)):
            rows += _html_cell(column, cell, place == panel.naming)
        rows += Markup("</tr>\n")
    start = Markup('<table class="results">\n<caption>{}</caption>\n<thead>\n<tr class="metrics">{}</tr>\n')
    middle = Markup('<tr class="heads">{}</tr>\n</thead>\n<tbody>\n{}</tbody>\n</table>\n')
    return str(start.format(layout.caption, heads) + middle.format(columns, rows))


def escape_latex(text: str) -> str:
    """`text` with what means something to LaTeX made harmless, on one line: an empty one would end the paragraph."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _html_cell(column: Column, cell: TableCell, naming: bool) -> Markup:
    if column.metric is None:
        kind = Markup(' class="naming"') if naming else ""
        return Markup('<th scope="row"{1} data-sort="{0}">{0}</th>').format(cell.text, kind)
    parts = []
    if cell.text:
        parts.append(Markup("<b>{}</b>" if cell.bold else "{}").format(cell.text))
    if cell.spread:
        parts.append(Markup('<span class="spread">{} {}</span>').format(PLUS_MINUS, cell.spread))
    if cell.n > 1:
        parts.append(Markup('<span class="n">({})</span>').format(cell.n))
    for state, count in cell.signs:
        sign = SIGNS[state]
        many = str(count) if count > 1 or (cell.text and state != "measured") else ""
        # Blanks between them for who pastes the table alone: the page's style sheet sets them apart by itself.
        words = [Markup('<span aria-hidden="true">{}</span>').format(sign.text), Markup("{}").format(many)]
        words = [word for word in (*words, Markup('<span class="name">{}</span>').format(state)) if word]
        parts.append(Markup('<span class="sign {}">{}</span>').format(state, Markup(" ").join(words)))
    title = Markup(' title="{}"').format(cell.explained) if cell.explained else Markup("")
    value = cell.value
    sort = "" if value is None or math.isnan(value) else repr(float(value))
    start = Markup('<td class="{}" data-sort="{}"').format(_class(column), sort)
    return start + title + Markup(">") + Markup(" ").join(parts) + Markup("</td>")


def _class(column: Column) -> str:
    return f"{column.kind} first" if column.begins else column.kind


def _signs(cell: TableCell, shown: Callable[[Sign], str]) -> str:
    """The signs, with how many runs they stand for where that is not plain."""
    return " ".join(
        shown(SIGNS[state]) + (str(count) if count > 1 or (cell.text and state != "measured") else "")
        for state, count in cell.signs
    )


def _one_line_head(column: Column) -> str:
    if column.metric is None:
        return column.head
    return f"{column.metric.label} {ARROWS[column.metric.better][0]} {column.head}"


def _escape_markdown(text: str) -> str:
    # "$" begins a formula on GitHub, "~~" strikes out.
    return re.sub(r"([\\|*_`<\[\]$~])", r"\\\1", " ".join(text.split()))


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
    + ["revision", "protocol", "evaluations"]
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
            facts["evaluations"] = "" if run.evaluations is None else str(run.evaluations)
            about[run.folder.name] = {**facts, "key": run.key or "", "state": "finished"}
        return about[run.folder.name]

    for table in tables:
        grid = table.grid
        for row in table.rows:
            about_row = {"grid": grid.name, "paper": grid.paper, "table": grid.table}
            about_row["labels"] = json.dumps(row.cell.labels, ensure_ascii=False)
            for metric in grid.metrics:
                entry = row.entries[metric.name]
                line = {**about_row, "metric": metric.name, "printed": "" if entry.printed is None else entry.printed}
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
            "ours": "best" if entry.measured else entry.which,
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
            "evaluations": trial.run.evaluations if trial.run else None,
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
