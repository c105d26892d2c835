"""What networks take, in the tables: from latency.json into FESD's table 7 and DSSD's A.I, times compared with none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import grid, plan, save_run

from hpcdistill.metrics.measured_cost import is_cost, is_time, save_latency
from hpcdistill.run import load_run
from hpcdistill.sweep.grid import Cell, Grid, Metric, load_grid
from hpcdistill.sweep.plan import missing_metric
from hpcdistill.sweep.plots import main_metric
from hpcdistill.sweep.results import find_results
from hpcdistill.sweep.table_formats import markdown, tidy_csv
from hpcdistill.sweep.table_layout import lay_out, notes
from hpcdistill.sweep.table_rows import ResultTable, best_rows
from hpcdistill.sweep.tables import make_tables

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FID = {"generator/horse2zebra/fid": 61.0, "student/horse2zebra/fid": 62.0}
CPU = "AMD EPYC, 1 thread"


def measure(
    run: Path, generator: str, params: int, macs: int, time: float, device: str = CPU, kind: str = "cpu"
) -> None:
    entry = {"metric": "latency_ms", "kind": kind, "time": "2026-01-01", "mean_ms": time}
    about = {"params": params, "macs": macs}
    save_latency(run, generator, about, device, {**entry, "median_ms": time, "p95_ms": time})


def table_7() -> Grid:
    """Horses alone: Original is cell 0, the student cell 1."""
    made = load_grid(CONFIGS / "grids" / "fesd-7.yaml")
    return replace(made, cells=made.cells[:2], seeds=(0,))


def collected(runs: Path) -> ResultTable:
    (table,) = make_tables(plan(table_7()), find_results(runs), {})
    return table


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for number in range(2):
        save_run(tmp_path, f"horse2zebra-{number}-0", FID)
    return tmp_path


def test_table_7_is_filled_and_says_of_which_device(runs: Path) -> None:
    measure(runs / "run-horse2zebra-0-0", "generator", 11_378_179, 56_799_000_000, 812.5)
    measure(runs / "run-horse2zebra-1-0", "student", 137_347, 1_408_000_000, 61.25)
    table = collected(runs)
    original, student = (row.entries for row in table.rows)
    assert original["latency"].ours is not None
    assert original["latency"].ours.mean == 812.5
    assert original["latency"].printed == 8.87
    assert original["latency"].difference is None  # an RTX 3080 Ti against a processor
    assert original["macs"].difference == pytest.approx(-0.001)
    assert student["params"].difference == pytest.approx(0.000347)
    assert table.unmeasured == ()
    layout = lay_out(table)
    heads = [(column.metric.name, column.head) for panel in layout.panels for column in panel.columns if column.metric]
    assert [head for name, head in heads if name == "latency"] == ["paper", "ours"]
    assert [head for name, head in heads if name == "macs"] == ["paper", "ours", "diff."]
    assert [head for name, head in heads if name == "fid"][-1] == "ours, last"
    said = f"latency (ms): ours on {CPU}; the paper's on an RTX 3080 Ti: not to be compared."
    assert said in notes(layout)
    text = markdown(layout)
    assert said in text
    assert "812.50" in text
    latency = table.grid.metrics[0]
    assert best_rows(table, latency, printed=True) == {1}
    assert best_rows(table, latency, printed=False) == set()  # none is called the better one
    assert table.orders == ()  # of two networks, whatever is trained
    main = main_metric(table)
    assert main is not None
    assert main.name == "fid"
    line = next(line for line in tidy_csv([table]).splitlines() if "812.5" in line)
    assert ",latency," in line


def test_who_was_not_measured_says_how(runs: Path) -> None:
    table = collected(runs)
    folder = runs / "run-horse2zebra-0-0"
    command = f"hpcdistill benchmark latency {folder} --generator generator --protocol paper"
    assert len(table.unmeasured) == 2  # a line a run, not one a column
    assert f"`{command}` measures it" in table.unmeasured[0]
    assert table.rows[0].states("latency") == {"unmeasured": 1}
    assert table.devices == []


def test_a_damaged_record_is_a_line_and_the_column_stays_empty(runs: Path) -> None:
    file = runs / "run-horse2zebra-1-0" / "latency.json"
    file.write_text("{", encoding="utf-8")
    measure(runs / "run-horse2zebra-0-0", "generator", 1, 1, 9.0)
    table = collected(runs)
    flags = [flag for flag in table.flags if str(file) in flag]
    assert len(flags) == 1
    assert "damaged" in flags[0]
    assert table.rows[1].entries["latency"].ours is None
    assert table.rows[1].entries["fid"].ours is not None
    assert table.unmeasured == ()


def test_two_devices_are_pointed_out(runs: Path) -> None:
    """A GPU's number is taken where a run has one; then the rows are of different devices."""
    measure(runs / "run-horse2zebra-0-0", "generator", 1, 1, 812.5)
    measure(runs / "run-horse2zebra-0-0", "generator", 1, 1, 9.5, "NVIDIA H200")
    measure(runs / "run-horse2zebra-1-0", "student", 1, 1, 61.25)
    table = collected(runs)
    assert table.rows[0].entries["latency"].ours is not None
    assert table.rows[0].entries["latency"].ours.mean == 9.5
    assert sorted(table.devices) == [CPU, "NVIDIA H200"]
    assert any("differ in the device that times are of" in flag and CPU in flag for flag in table.flags)


def test_a_table_of_costs_alone(tmp_path: Path) -> None:
    metric = Metric("latency", "latency", "student/cost/latency_ms", "lower", 2)
    cells = [Cell({"method": name}, "run", ("x.yaml",), {}, {"latency": metric.of or ""}) for name in "ab"]
    for number, name in enumerate("ab"):
        measure(save_run(tmp_path, f"{name}-{number}-0", {}), "student", 1, 1, 2.0 + number)
    (table,) = make_tables(plan(grid(cells, (metric,))), find_results(tmp_path), {})
    assert main_metric(table) is None
    assert "2.00" in markdown(lay_out(table))
    assert "the paper's on a device of its own" in " ".join(notes(lay_out(table)))


def test_grids_ask_for_what_there_is() -> None:
    run = load_run([str(CONFIGS / "fesd" / "horse2zebra.yaml")])
    assert missing_metric("student/cost/latency_ms", run.config) is None
    assert "did you mean 'latency_ms'" in (missing_metric("student/cost/latency", run.config) or "")
    assert "no generator 'studnt'" in (missing_metric("studnt/cost/macs_G", run.config) or "")


def test_names_of_costs() -> None:
    assert is_time("student/cost/latency_ms")
    assert is_cost("student/cost/macs_G")
    assert not is_time("student/cost/macs_G")
    for name in ("", "student/set5/psnr", "student/cost", "/cost/macs_G", "student/cost/psnr", "cost/macs_G"):
        assert not is_cost(name)


def test_dssd_runtime_takes_its_columns() -> None:
    made = load_grid(CONFIGS / "grids" / "dssd-A1.yaml")
    ours = next(cell for cell in made.cells if cell.kind == "run")
    assert {name: ours.of[name] for name in ("runtime", "macs", "params")} == {
        "runtime": "student/cost/runtime_ms",
        "macs": "student/cost/macs_G",
        "params": "student/cost/params_k",
    }
