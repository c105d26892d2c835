"""Tables as text: each format says the same numbers, signs and bold, and nothing in a label breaks it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from made_runs import NAME, PSNR, grid, plan, run_cell, save_run

from hpcdistill.sweep.grid import Cell, Metric
from hpcdistill.sweep.results import find_results
from hpcdistill.sweep.status import TaskStatus
from hpcdistill.sweep.table_formats import CSV_COLUMNS, as_json, escape_latex, html, latex, markdown, tidy_csv
from hpcdistill.sweep.table_layout import lay_out, notes, number_text
from hpcdistill.sweep.table_rows import ResultTable
from hpcdistill.sweep.tables import make_tables


@pytest.fixture
def table(tmp_path: Path) -> ResultTable:
    """a: two of three seeds, one failed; b: the better one, no printed number; CARN: reported; bicubic: measured."""
    cells = [
        run_cell("a", 31.04),
        run_cell("b"),
        Cell({"method": "CARN"}, "reported", (), {"psnr": 32.13}, {"psnr": NAME}),
        Cell({"method": "bicubic"}, "reported", (), {"psnr": 28.42}, {"psnr": NAME}, {"psnr": 28.426}, note="By hand."),
    ]
    for key, best, last in (("a-0-0", 31.0, 30.9), ("a-0-1", 31.1, 31.0), ("b-1-0", 31.2, 31.2), ("b-1-1", 31.2, 31.1)):
        save_run(tmp_path, key, best, last)
    save_run(tmp_path, "b-1-2", 31.2)
    failed = TaskStatus("a-0-2", "run", "failed", reason="out of memory")
    return make_tables(plan(grid(cells, seeds=(0, 1, 2))), find_results(tmp_path), {"a-0-2": failed})[0]


def test_markdown(table: ResultTable) -> None:
    rows = [line for line in markdown(lay_out(table)).splitlines() if line.startswith("|")]
    up, plus = "\u2191", "\u00b1"
    assert rows == [
        f"| method | Set5 PSNR {up} paper | Set5 PSNR {up} ours | Set5 PSNR {up} diff. | Set5 PSNR {up} ours, last |",
        "|---|---:|---:|---:|---:|",
        # 31.05 from 31.0 and 31.1: deviation sqrt(0.005) = 0.0707
        f"| a | 31.04 | 31.05 {plus} 0.07 (2) \u27171 | +0.01 | 30.95 {plus} 0.07 (2) |".replace(
            "\u27171", "\u2717" + "1"
        ),
        f"| b |  | **31.20** {plus} 0.00 (3) |  | 31.17 {plus} 0.06 (3) |",
        "| CARN | **32.13** | \u2020 |  |  |",
        "| bicubic | 28.42 | 28.43 \u2021 | +0.01 |  |",
    ]
    below = markdown(lay_out(table)).splitlines()[len(rows) + 3 :]
    assert "- By hand." in below
    assert any("\u2020 reported by the paper" in line and "\u2717 failed" in line for line in below)
    assert any("Kendall tau-b" in line and "(n = 2), the same order" in line for line in below)  # a and bicubic


def test_latex(table: ResultTable) -> None:
    lines = latex(lay_out(table)).splitlines()
    assert r"a & 31.04 & 31.05 $\pm$ 0.07 (2) $\times$1 & +0.01 & 30.95 $\pm$ 0.07 (2) \\" in lines
    assert r"CARN & \textbf{32.13} & $\dagger$ &  &  \\" in lines
    assert r"\cmidrule(lr){2-5}" in lines
    assert r" & \multicolumn{4}{c}{Set5 PSNR $\uparrow$} \\" in lines
    assert r"\caption{Toys (A paper, table 3)}" in lines
    for name in ("table", "tabular"):
        assert sum(line.startswith(rf"\begin{{{name}}}") for line in lines) == 1
        assert lines.count(rf"\end{{{name}}}") == 1
    body = lines[lines.index(r"\toprule") : lines.index(r"\bottomrule")]
    assert {line.count("&") for line in body if line.endswith(r"\\") and "multicolumn" not in line} == {4}
    assert all(ord(character) < 128 for character in latex(lay_out(table)))  # any LaTeX can read it


def test_html(table: ResultTable) -> None:
    text = html(lay_out(table))
    assert '<td class="ours" data-sort="31.05"' in text
    assert '<b>31.20</b> <span class="spread">\u00b1 0.00</span> <span class="n">(3)</span>' in text
    assert text.count("<tr") == 2 + 4
    assert text.count('aria-sort="none"') == 5
    assert "seed 2: failed (out of memory)" in text


def test_json(table: ResultTable) -> None:
    content = json.loads(json.dumps(as_json(table), allow_nan=False))
    a, b, carn, bicubic = content["cells"]
    ours = a["metrics"]["psnr"]
    assert ours["best"]["values"] == [31.0, 31.1]
    assert math.isclose(ours["best"]["deviation"], 0.005**0.5, rel_tol=1e-9)
    assert math.isclose(ours["difference"], 0.01, rel_tol=1e-9)
    assert ours["without"] == {"failed": 1}
    assert [run["state"] for run in a["runs"]] == ["finished", "finished", "failed"]
    assert a["runs"][2]["reason"] == "out of memory"
    assert b["metrics"]["psnr"]["printed"] is None
    assert b["metrics"]["psnr"]["difference"] is None
    assert carn["kind"] == "reported"
    assert bicubic["metrics"]["psnr"]["measured"] is True
    assert content["order"] == [{"metric": "psnr", "group": [], "kendall_tau_b": 1.0, "n": 2}]


def test_csv(table: ResultTable, tmp_path: Path) -> None:
    save_run(tmp_path, "stray", {"x": math.nan, "y": math.inf})
    other = [run for run in find_results(tmp_path).runs if run.key == "stray"]
    lines = list(csv.DictReader(io.StringIO(tidy_csv([table], other))))
    assert list(lines[0]) == CSV_COLUMNS
    a = [line for line in lines if json.loads(line["labels"]) == {"method": "a"}]
    assert [(line["seed"], line["which"], line["step"], line["value"], line["state"]) for line in a] == [
        ("0", "best", "90", "31.0", "finished"),
        ("0", "last", "100", "30.9", "finished"),
        ("1", "best", "90", "31.1", "finished"),
        ("1", "last", "100", "31.0", "finished"),
        ("2", "", "", "", "failed"),
    ]
    assert {line["printed"] for line in a} == {"31.04"}
    assert a[0]["protocol"] == "PSNR on luma; rule pisr, scale 4; set5 (5 images)"
    assert (a[0]["run"], a[0]["evaluations"]) == ("run-a-0-0", "")
    strays = [line for line in lines if not line["grid"]]
    assert [(line["metric"], line["which"], line["value"]) for line in strays] == [
        ("x", "best", "nan"),
        ("y", "best", "inf"),
        ("x", "last", "nan"),
        ("y", "last", "inf"),
    ]
    reported = [line for line in lines if line["state"] in ("reported", "measured")]
    assert [(line["printed"], line["value"], line["which"]) for line in reported] == [
        ("32.13", "", ""),
        ("28.42", "28.426", "measured"),
    ]


def test_not_finite_numbers(tmp_path: Path) -> None:
    save_run(tmp_path, "a-0-0", math.nan, math.inf)
    save_run(tmp_path, "b-1-0", 30.0)
    (table,) = make_tables(plan(grid([run_cell("a", 31.0), run_cell("b", 30.0)])), find_results(tmp_path), {})
    layout = lay_out(table)
    assert "| a | **31.00** | nan | nan | inf |" in markdown(layout)
    assert 'data-sort="" title="best weights' in html(layout)  # at the end, however it is sorted
    entry = json.loads(json.dumps(as_json(table), allow_nan=False))["cells"][0]["metrics"]["psnr"]
    assert entry["best"] == {"mean": None, "deviation": None, "n": 1, "values": [None]}
    assert entry["difference"] is None
    assert table.orders == ()  # one cell has both numbers: no order


def test_nothing_in_a_label_breaks_a_format(tmp_path: Path) -> None:
    hostile = r"50% & $x_1$ #2 {a}~^ \b | <i>`c`</i> [d] *e*"
    save_run(tmp_path, f"{hostile}-0-0".replace("/", "-"), 30.0, key=f"{hostile}-0-0")
    (table,) = make_tables(plan(grid([run_cell(hostile, 30.0), run_cell("[b]")])), find_results(tmp_path), {})
    layout = lay_out(table)
    row = next(line for line in latex(layout).splitlines() if line.startswith("50"))
    assert row.startswith(
        r"50\% \& \$x\_1\$ \#2 \{a\}\textasciitilde{}\textasciicircum{} \textbackslash{}b \textbar{} "
        r"\textless{}i\textgreater{}`c`\textless{}/i\textgreater{} {[}d] {*}e{*} & "
    )
    assert len(re.findall(r"(?<!\\)&", row)) == 4
    assert r"\\ [" not in latex(layout).replace("\n", " ")  # would be an optional argument
    assert "<i>" not in html(layout)
    line = next(line for line in markdown(layout).splitlines() if line.startswith("| 50"))
    assert len(re.findall(r"(?<!\\)\|", line)) == 6
    assert json.loads(json.dumps(as_json(table)))["cells"][0]["labels"]["method"] == hostile


def test_escapes_by_hand() -> None:
    assert escape_latex(r"a_b\c") == r"a\_b\textbackslash{}c"
    assert escape_latex("two\n\nlines  of\ta title") == "two lines of a title"


def test_a_title_over_several_lines_is_one_in_latex(tmp_path: Path) -> None:
    (table,) = make_tables(plan(grid([run_cell("a\n\nb")], title="Toys\n\nof 2 lines")), find_results(tmp_path), {})
    lines = latex(lay_out(table)).splitlines()
    assert "" not in lines, "an empty line ends the paragraph, which \\caption may not have"
    assert r"\caption{Toys of 2 lines (A paper, table 3)}" in lines


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (31.0449, 2, False, "31.04"),
        (-0.004, 2, True, "0.00"),
        (0.004, 2, True, "0.00"),
        (0.016, 2, True, "+0.02"),
        (-0.0005, 3, False, "-0.001"),
        (664.7, 0, False, "665"),
        (math.nan, 2, True, "nan"),
        (-math.inf, 2, False, "-inf"),
    ],
)
def test_numbers(value: float, digits: int, signed: bool, text: str) -> None:
    assert number_text(value, digits, signed) == text


def test_wide_tables_have_panels(tmp_path: Path) -> None:
    """Two trained metrics side by side; what is only printed stays together."""
    trained = tuple(Metric(name, name, f"student/{name}/psnr", "higher", 2) for name in ("m1", "m2", "m3"))
    metrics = (*trained, Metric("params", "params", None, "lower", 0), Metric("macs", "MACs", None, "lower", 1))
    of = {metric.name: str(metric.of) for metric in trained}
    printed = {"m1": 1.0, "m2": 2.0, "m3": 3.0, "params": 13.0, "macs": 6.0}
    cells = [Cell({"method": "a"}, "run", ("base.yaml",), printed, of)]
    (table,) = make_tables(plan(grid(cells, metrics)), find_results(tmp_path), {})
    layout = lay_out(table)
    shown = [list(dict.fromkeys(column.metric.name for column in p.columns if column.metric)) for p in layout.panels]
    assert shown == [["m1", "m2"], ["m3", "params", "macs"]]
    assert latex(layout).count(r"\begin{tabular}") == 2
    params = next(place for column, place in zip(layout.panels[1].columns, layout.panels[1].rows[0], strict=True)
                  if column.metric and column.metric.name == "params")  # fmt: skip
    assert params.text == "13"
    assert not params.signs  # never measured: nothing is missing


def test_without_a_paper_there_is_no_column_of_it(tmp_path: Path) -> None:
    save_run(tmp_path, "a-0-0", 31.0)
    (table,) = make_tables(plan(grid([run_cell("a")], paper="", table="")), find_results(tmp_path), {})
    assert [column.kind for column in lay_out(table).panels[0].columns] == ["label", "ours", "last"]
    assert lay_out(table).caption == "Toys"


def test_notes_name_what_is_mixed(tmp_path: Path) -> None:
    save_run(tmp_path, "a-0-0", 1.0)
    save_run(tmp_path, "b-1-0", 1.0, revision="other")
    (table,) = make_tables(plan(grid([run_cell("a"), run_cell("b")], (PSNR,))), find_results(tmp_path), {})
    assert notes(lay_out(table))[0].startswith("Attention: Code of 2 revisions: 0123456789ab (1 run), other (1 run)")


def test_a_table_alone_reads_without_a_style_sheet(table: ResultTable) -> None:
    """Its tags taken away: 31.05, one of three runs failed."""
    found = re.findall("<td class=.*?</td>", html(lay_out(table)), re.DOTALL)
    cells = [" ".join(re.sub("<.*?>", "", cell, flags=re.DOTALL).split()) for cell in found]
    assert cells[1] == "31.05 \u00b1 0.07 (2) \u2717 1 failed"
    assert "\u2020 reported" in cells


@pytest.mark.parametrize(
    ("labels", "naming"),
    [
        ([("s2w", "a"), ("s2w", "b"), ("e2s", "a")], 1),  # two of each: the last
        ([("s2w", "a"), ("e2s", "a"), ("h2z", "a")], 0),
        ([("s2w", "a"), ("s2w", "b"), ("s2w", "c")], 1),
    ],
)
def test_the_label_that_tells_rows_apart_stays_in_sight(
    labels: list[tuple[str, str]], naming: int, tmp_path: Path
) -> None:
    """Scrolled sideways, a column of `s2w` alone does not say which row one reads."""
    cells = [Cell({"data": data, "method": method}, "reported", (), {"psnr": 1.0}, {}) for data, method in labels]
    layout = lay_out(make_tables(plan(grid(cells)), find_results(tmp_path), {})[0])
    heads = re.findall(r'<th scope="col" class="label( naming)?"', html(layout))
    assert [bool(head) for head in heads] == [number == naming for number in range(2)]
    for line in html(layout).splitlines():
        if 'scope="row"' in line:
            assert [bool(head) for head in re.findall(r'<th scope="row"( class="naming")?', line)] == [
                number == naming for number in range(2)
            ]
