"""From result.json to numbers: means, deviations and orders computed by hand, and nothing dropped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_runs import NAME, PSNR, age, grid, plan, run_cell, save_identity, save_run

from hpcdistill.config import to_yaml
from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.sweep.grid import Cell, Metric, load_grid
from hpcdistill.sweep.plan import make_plan
from hpcdistill.sweep.results import find_results, finished_run
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import TaskStatus, task_statuses
from hpcdistill.sweep.table_layout import lay_out, notes
from hpcdistill.sweep.table_rows import Summary, best_rows, describe_protocol
from hpcdistill.sweep.tables import make_tables


def status(key: str, state: str, **values: object) -> TaskStatus:
    return TaskStatus(key, "run", state, **values)  # type: ignore[arg-type]


def test_mean_and_sample_deviation(tmp_path: Path) -> None:
    made = grid([run_cell("a", 31.0)], seeds=(0, 1, 2))
    for seed, best, last in ((0, 30.9, 30.0), (1, 31.0, 30.5), (2, 31.4, 31.0)):
        save_run(tmp_path, f"a-0-{seed}", best, last)
    (table,) = make_tables(plan(made), find_results(tmp_path), {})
    entry = table.rows[0].entries["psnr"]
    assert entry.best is not None
    assert entry.last is not None
    assert entry.best.deviation is not None
    assert entry.difference is not None
    # By hand: mean 31.1; squares 0.04 + 0.01 + 0.09 = 0.14; 0.14 / (3 - 1) = 0.07.
    assert entry.best.n == 3
    assert math.isclose(entry.best.mean, 31.1, rel_tol=1e-12)
    assert math.isclose(entry.best.deviation, 0.07**0.5, rel_tol=1e-9)
    assert math.isclose(entry.last.mean, 30.5, rel_tol=1e-12)
    assert entry.last.deviation == 0.5  # squares 0.25 + 0 + 0.25, over 2: 0.25
    assert math.isclose(entry.difference, 0.1, rel_tol=1e-9)
    assert table.counts == {"finished": 3}


def test_one_run_has_no_deviation() -> None:
    assert Summary((31.0,)).deviation is None
    assert Summary((31.0,)).mean == 31.0
    assert math.isnan(Summary((31.0, math.nan)).mean)
    assert math.isnan(Summary((math.inf, -math.inf)).mean)
    assert Summary((math.inf, 1.0)).mean == math.inf
    assert math.isnan(Summary((math.inf, 1.0)).deviation or 0.0)


def test_order_by_hand(tmp_path: Path) -> None:
    """Printed 1 2 3 4, ours 1 3 2 4: of 6 pairs 5 agree and 1 does not, (5 - 1) / 6."""
    cells = [run_cell(name, value) for name, value in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)]
    cells.append(run_cell("unprinted"))
    cells.append(run_cell("unfinished", 0.5))
    for number, value in enumerate((1.0, 3.0, 2.0, 4.0, 9.0)):
        save_run(tmp_path, f"{'abcd'[number] if number < 4 else 'unprinted'}-{number}-0", value)
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    (order,) = table.orders
    assert order.n == 4
    assert math.isclose(order.tau, 4 / 6, rel_tol=1e-12)


def test_order_with_ties_is_tau_b(tmp_path: Path) -> None:
    """Printed 1 1 2, ours 1 2 3: 2 pairs agree, 1 is tied in print; 2 / sqrt((3 - 1) * 3)."""
    cells = [run_cell("a", 1.0), run_cell("b", 1.0), run_cell("c", 2.0)]
    for number, value in enumerate((1.0, 2.0, 3.0)):
        save_run(tmp_path, f"{'abc'[number]}-{number}-0", value)
    (order,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})[0].orders
    assert math.isclose(order.tau, 2 / 6**0.5, rel_tol=1e-12)


def test_groups_are_compared_apart(tmp_path: Path) -> None:
    """x2's numbers are higher than x4's: an order over both would say nothing of the methods."""
    cells = [run_cell("a", 37.0, scale="x2"), run_cell("a", 31.0, scale="x4")]
    cells += [run_cell("b", 38.0, scale="x2"), run_cell("b", 32.0, scale="x4")]
    for number, value in enumerate((37.5, 31.5, 37.1, 31.6)):
        save_run(tmp_path, f"{'aabb'[number]}-{number}-0", value)
    (table,) = make_tables(plan(grid(cells, within=("scale",))), find_results(tmp_path), {})
    assert {order.group: (order.tau, order.n) for order in table.orders} == {("x2",): (-1.0, 2), ("x4",): (1.0, 2)}
    assert [row.cell.title for row in table.rows] == ["a, x2", "b, x2", "a, x4", "b, x4"]  # group by group
    assert best_rows(table, PSNR, printed=True) == {1, 3}
    assert best_rows(table, PSNR, printed=False) == {0, 3}


def test_best_ties_as_they_are_shown(tmp_path: Path) -> None:
    cells = [run_cell(name) for name in "abc"]
    for number, value in enumerate((31.0712, 31.0749, 31.06)):  # 31.07, 31.07, 31.06
        save_run(tmp_path, f"{'abc'[number]}-{number}-0", value)
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    assert best_rows(table, PSNR, printed=False) == {0, 1}
    assert best_rows(table, PSNR, printed=True) == set()
    fid = Metric("psnr", "FID", NAME, "lower", 2)
    assert best_rows(table, fid, printed=False) == {2}


def test_nothing_is_dropped(tmp_path: Path) -> None:
    names = ["done", "gone", "failed", "running", "queued", "blocked", "stopped", "broken", "unmeasured"]
    cells = [run_cell(name, 30.0) for name in names]
    cells.append(Cell({"method": "CARN"}, "reported", (), {"psnr": 32.13}, {"psnr": NAME}))
    cells.append(Cell({"method": "bicubic"}, "reported", (), {"psnr": 28.42}, {"psnr": NAME}, {"psnr": 28.426}))
    save_run(tmp_path, "done-0-0", 30.0)
    broken = save_run(tmp_path, "broken-7-0", 30.0)
    (broken / "result.json").write_text('{"name": "run", "key": "brok', encoding="utf-8")
    (broken / "config.yaml").write_text("nonsense", encoding="utf-8")
    save_run(tmp_path, "unmeasured-8-0", {"student/set14/psnr": 27.0})
    found = find_results(tmp_path)
    assert [run.folder.name for run in found.unreadable] == ["run-broken-7-0"]
    assert "Unterminated string" in found.unreadable[0].reason
    states = ("failed", "running", "queued", "blocked", "stopped")
    statuses = {f"{name}-{2 + n}-0": status(f"{name}-{2 + n}-0", name) for n, name in enumerate(states)}
    statuses["failed-2-0"] = status("failed-2-0", "failed", reason="out of memory", log=Path("a.log"))
    statuses["gone-1-0"] = status("gone-1-0", "finished", run=tmp_path / "elsewhere")
    statuses["broken-7-0"] = status("broken-7-0", "failed", reason="damaged")
    (table,) = make_tables(plan(grid(cells)), found, statuses)
    shown = [(row.cell.title, dict(row.states("psnr"))) for row in table.rows]
    assert shown == [
        ("done", {}),
        ("gone", {"missing": 1}),
        ("failed", {"failed": 1}),
        ("running", {"running": 1}),
        ("queued", {"queued": 1}),
        ("blocked", {"blocked": 1}),
        ("stopped", {"stopped": 1}),
        ("broken", {"failed": 1}),
        ("unmeasured", {"unmeasured": 1}),
        ("CARN", {"reported": 1}),
        ("bicubic", {"measured": 1}),
    ]
    assert table.rows[2].trials[0].reason == "out of memory (log: a.log)"
    assert "not in this folder" in table.rows[1].trials[0].reason
    bicubic = table.rows[10].entries["psnr"]
    assert bicubic.best == Summary((28.426,))
    assert bicubic.last is None


def test_result_under_another_key(tmp_path: Path) -> None:
    """A run of the same identity, written before there were keys: its task knows the folder."""
    folder = save_run(tmp_path, "other", 30.0)
    statuses = {"a-0-0": status("a-0-0", "finished", run=Path("/moved") / folder.name)}
    (table,) = make_tables(plan(grid([run_cell("a")])), find_results(tmp_path), statuses)
    assert table.rows[0].trials[0].run


def test_key_of_an_old_result(tmp_path: Path) -> None:
    """result.json without a key: by the run's configuration."""
    loaded = load_run(["configs/fsrcnn/x4.yaml", "seed=3"])
    folder = save_run(tmp_path, "x", 30.0, key=None)
    (folder / "config.yaml").write_text(to_yaml(loaded.config), encoding="utf-8")
    stray = save_run(tmp_path, "y", 30.0, key=None)
    found = find_results(tmp_path)
    assert {run.folder: run.key for run in found.runs} == {folder: loaded.key, stray: None}
    assert list(found.by_key) == [loaded.key]


def test_an_old_result_of_another_version_of_its_method_has_no_key(tmp_path: Path) -> None:
    """Its numbers are of other code: they are no cell's of today."""
    loaded = load_run(["configs/fsrcnn/x4.yaml"])
    version = loaded.config.method.VERSION
    folders = {}
    for name, trained in (("old", version - 1), ("now", version)):
        folders[name] = save_run(tmp_path, name, 30.0, key=None)
        (folders[name] / "config.yaml").write_text(to_yaml(loaded.config), encoding="utf-8")
        identity = {"identity": {"data": ["d1"], "version": trained}}
        (folders[name] / "environment.json").write_text(json.dumps(identity), encoding="utf-8")
    found = find_results(tmp_path)
    assert {run.folder: run.key for run in found.runs} == {folders["old"]: None, folders["now"]: loaded.key}
    assert found.runs[0].data == {"training data": ("d1",)}


def test_an_old_result_of_a_method_that_cannot_be_imported_has_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One's own method may raise anything; the page of all the other runs is written all the same."""
    (tmp_path / "broken_method.py").write_text("undefined_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save_run(tmp_path / "runs", "old", 30.0, key=None)
    (folder / "config.yaml").write_text("method: {name: 'broken_method:Method', scale: 2}\n", encoding="utf-8")
    assert [run.key for run in find_results(tmp_path / "runs").runs] == [None]


def test_how_to_measure_what_a_finished_run_lacks(tmp_path: Path) -> None:
    """A later grid wants a test set that the run, which is not trained again, knew nothing of."""
    path = tmp_path / "late.yaml"
    path.write_text(
        "title: Late\nmetrics: {psnr: {of: student/late set/psnr, better: higher}}\nbase: configs/fsrcnn/x4.yaml\n"
        "set: ['data.eval.late set=data/late set']\ncells: [{labels: {method: FSRCNN}}]\n",
        encoding="utf-8",
    )
    made = make_plan([load_grid(path)])
    [key] = made.runs
    folder = save_run(tmp_path / "runs", key, 30.0)
    (table,) = make_tables(made, find_results(tmp_path / "runs"), {})
    command = f"hpcdistill evaluate {folder} --generator student --data 'data/late set'"
    assert table.unmeasured == (f"{folder.name} has finished without late set; `{command}` measures it",)
    assert f"Not measured: {table.unmeasured[0]}." in notes(lay_out(table))
    save_run(tmp_path / "runs", f"{key}-again", {"student/late set/psnr": 31.0}, key=key)
    assert make_tables(made, find_results(tmp_path / "runs"), {})[0].unmeasured == ()


def test_the_later_of_two_counts(tmp_path: Path) -> None:
    new = save_run(tmp_path, "a-0-0", 31.0)
    old = save_run(tmp_path / "aside", "a-0-0", 30.0).rename(tmp_path / "zz")
    age(old, 60)
    found = find_results(tmp_path)
    assert found.by_key["a-0-0"].folder == new
    assert found.twice == ["zz and run-a-0-0 are the same run; the later one is shown"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "expected a JSON object"),
        ('{"name": "a", "best": 3}', "best: expected a step and metrics"),
        ('{"name": "a", "best": {"step": 1, "metrics": {"m": "high"}}}', "m: expected a number, got 'high'"),
        ('{"best": null}', "name: missing"),
        ('{"name": "a", "protocol": "pisr"}', "protocol: expected a JSON object"),
        ("", "Expecting value"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, content: str, why: str) -> None:
    folder = save_run(tmp_path, "a", 1.0)
    (folder / "result.json").write_text(content, encoding="utf-8")
    found = find_results(tmp_path)
    assert found.runs == []
    assert why in found.unreadable[0].reason


@pytest.mark.parametrize(
    "change",
    [
        {"last": 3},
        {"last": {"metrics": {"m": True}}},
        {"protocol": []},
        {"steps": "many"},
        {"key": 3},
        {"name": None},
        {},
    ],
    ids=json.dumps,
)
def test_status_and_the_tables_agree_on_what_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save_run(tmp_path / "runs", "k", 31.0, **change)
    state = {"state": "finished", "run": str(folder), "attempt": 1, "name": "run"}
    (tmp_path / "tasks" / "k").mkdir(parents=True)
    (tmp_path / "tasks" / "k" / "state.json").write_text(json.dumps(state))
    [status] = task_statuses(["k"], tmp_path, tmp_path / "runs", Queue({"PATH": ""}))
    found = find_results(tmp_path / "runs")
    assert (status.state == "finished") == bool(found.runs) == (not change)
    if change:
        assert status.state == "failed"
        assert found.unreadable[0].reason in str(status.reason)
        assert finished_run(tmp_path / "runs", "k") is None


def test_not_finite_numbers_survive(tmp_path: Path) -> None:
    save_run(tmp_path, "a-0-0", {NAME: math.nan, "x": math.inf, "y": None})
    (run,) = find_results(tmp_path).runs
    metrics = run.metrics("best")
    assert math.isnan(metrics[NAME])
    assert math.isnan(metrics["y"])
    assert metrics["x"] == math.inf


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_results(tmp_path / "runz")


def test_flags(tmp_path: Path) -> None:
    cells = [run_cell("a"), run_cell("b"), run_cell("c")]
    protocol = {"metric": "PSNR on luma", "rule": "pisr", "scale": 4, "selects": "a", "test_sets": {"set5": 5}}
    more_sets = {"selects": "b", "test_sets": {"set5": 5, "set14": 14}}
    save_identity(save_run(tmp_path, "a-0-0", 1.0, protocol=protocol), ["d1"])
    save_identity(save_run(tmp_path, "b-1-0", 2.0, protocol=protocol | more_sets), ["d1"])
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    assert table.flags == ()  # another test set besides, and what chose the weights, do not matter
    other = protocol | {"rule": "matlab"}
    save_identity(save_run(tmp_path, "c-2-0", 3.0, protocol=other, revision="fedcba987654+"), ["d2"])
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    assert table.flags == (
        "Code of 2 revisions: 0123456789ab (2 runs), fedcba987654+ (1 run).",
        "1 run of code with changes that were not committed (+).",
        "Cells that are compared differ in rule: pisr (2 runs), matlab (1 run).",
        "Cells that are compared differ in training data: d1 (2 runs), d2 (1 run).",
    )


def test_rows_of_another_number_of_test_images_than_printed_are_named(tmp_path: Path) -> None:
    cells = [run_cell(name, 30.0, data="x") for name in "abcd"]
    for key, images in (("a-0-0", 2048), ("b-1-0", 200), ("c-2-0", 51), ("d-3-0", 200)):
        save_run(tmp_path, key, 1.0, protocol={"test_sets": {"set5": images, "set14": 14}})
    found = find_results(tmp_path)
    assert not any("printed" in flag for flag in make_tables(plan(grid(cells)), found, {})[0].flags)
    (table,) = make_tables(plan(grid(cells, printed_images={"set5": 2048})), found, {})
    named = "The printed numbers are of 2048 test images of set5; ours are of 200 (b, x; d, x), of 51 (c, x)."
    assert [flag for flag in table.flags if "printed" in flag] == [named]


def test_groups_may_differ_in_protocol(tmp_path: Path) -> None:
    cells = [run_cell("a", scale="x2"), run_cell("a", scale="x4")]
    for number, scale in enumerate((2, 4)):
        save_run(tmp_path, f"a-{number}-0", 1.0, protocol={"rule": "pisr", "scale": scale, "test_sets": {"set5": 5}})
    found = find_results(tmp_path)
    assert make_tables(plan(grid(cells, within=("scale",))), found, {})[0].flags == ()
    assert len(make_tables(plan(grid(cells)), found, {})[0].flags) == 1


def test_protocol_in_words() -> None:
    result = {"protocol": {"metric": "PSNR", "rule": "pisr", "scale": 4, "test_sets": {"set5": 5, "b100": 100}}}
    assert describe_protocol(result) == "PSNR; rule pisr, scale 4; set5 (5 images), b100 (100 images)"
    lr = {"lr": {"set5": "newer", "b100": "exact"}, "gray": {"set14": ["bridge"]}}
    assert describe_protocol({"protocol": result["protocol"] | lr}).startswith(
        "PSNR; rule pisr, scale 4, LR images exact and newer, taken as gray: bridge; set5"
    )
    assert describe_protocol({"protocol": {"note": "fid: weights", "test_sets": {}}}) == "fid: weights"
    assert describe_protocol(json.loads('{"protocol": null}')) == "nothing was measured"


def test_a_row_of_bicubic_and_who_is_below_it(tmp_path: Path) -> None:
    """A group of one scale each has its own; what a grid measures itself stays alone."""
    cells = [run_cell(name, scale=scale) for scale in ("x2", "x4") for name in "ab"]
    numbers = {"x2": 33.66, "x4": 28.42}
    for number, (cell, value) in enumerate(zip(cells, (36.0, 33.0, 28.40, 30.0), strict=True)):
        bicubic = {"set5": {"psnr": numbers[cell.labels["scale"]], "ssim": 0.9}}
        save_run(tmp_path, f"{cell.labels['method']}-{number}-0", value, bicubic=bicubic)
    found = find_results(tmp_path)
    (table,) = make_tables(plan(grid(cells, within=("scale",))), found, {})
    assert [row.cell.title for row in table.rows] == [
        *("a, x2", "b, x2", "bicubic enlargement, x2"),
        *("a, x4", "b, x4", "bicubic enlargement, x4"),
    ]
    ours = [row.entries["psnr"].best for row in table.rows]
    assert [entry.mean for entry in ours if entry] == [36.0, 33.0, 33.66, 28.40, 30.0, 28.42]
    assert table.rows[2].states("psnr") == {"measured": 1}
    assert best_rows(table, PSNR, printed=False) == {0, 4}
    assert table.flags == ("Below bicubic in Set5 PSNR: b, x2 (33.00 against 33.66); a, x4 (28.40 against 28.42).",)
    assert table.counts == {"finished": 4, "measured": 2}
    own = Cell({"method": "bicubic", "scale": "x2"}, "reported", (), {"psnr": 33.7}, {"psnr": NAME}, {"psnr": 33.66})
    (table,) = make_tables(plan(grid([*cells[:2], own], within=("scale",))), found, {})
    assert [row.cell.title for row in table.rows] == ["a, x2", "b, x2", "bicubic, x2"]
    assert len(table.flags) == 1


@pytest.mark.parametrize("bicubic", [None, 3, [], {"set5": 3}, {"set5": {"psnr": "high"}}, {"set5": {"psnr": None}}])
def test_results_without_bicubic_have_no_row(tmp_path: Path, bicubic: object) -> None:
    save_run(tmp_path, "a-0-0", 20.0, bicubic=bicubic)
    (table,) = make_tables(plan(grid([run_cell("a")])), find_results(tmp_path), {})
    assert [row.cell.title for row in table.rows] == ["a"]
    assert table.flags == ()


def test_runs_that_do_not_agree_on_bicubic_have_no_row(tmp_path: Path) -> None:
    for number, value in enumerate((28.42, 28.39)):
        save_run(tmp_path, f"{'ab'[number]}-{number}-0", 30.0, bicubic={"set5": {"psnr": value}})
    (table,) = make_tables(plan(grid([run_cell("a"), run_cell("b")])), find_results(tmp_path), {})
    assert [row.cell.title for row in table.rows] == ["a", "b"]


def test_last_weights_may_stand_beside_print(tmp_path: Path) -> None:
    """Everything that is compared is then of the last weights: by them b is the better one, as in print."""
    cells = [run_cell("a", 30.0), run_cell("b", 31.0)]
    bicubic = {"set5": {"psnr": 30.45}}
    for key, best, last in (("a-0-0", 33.0, 30.4), ("b-1-0", 32.0, 31.2)):
        save_run(tmp_path, key, best, last, bicubic=bicubic)
    found = find_results(tmp_path)
    for ours, differences, tau, winner, heads in (
        ("best", [3.0, 1.0], -1.0, 0, ["ours", "ours, last"]),
        ("last", [0.4, 0.2], 1.0, 1, ["ours", "ours, best"]),
    ):
        (table,) = make_tables(plan(grid(cells, ours=ours)), found, {})
        entries = [row.entries["psnr"] for row in table.rows[:2]]
        assert [entry.difference for entry in entries] == pytest.approx(differences)
        assert [order.tau for order in table.orders] == [tau]
        assert best_rows(table, PSNR, printed=False) == {winner}
        layout = lay_out(table)
        assert [column.head for column in layout.panels[0].columns if "ours" in column.head] == heads
        assert [cell.text for cell in layout.panels[0].rows[0][2:]] == (
            ["33.00", "+3.00", "30.40"] if ours == "best" else ["30.40", "+0.40", "33.00"]
        )
        assert any("a (30.40 against 30.45)" in flag for flag in table.flags) == (ours == "last")
        assert any(line.startswith(f"Ours: the run's {ours} weights; its best are chosen by") for line in notes(layout))


def test_the_foot_says_which_sets_chose(tmp_path: Path) -> None:
    """Of a run from before that was said, the metric; the choice of most runs comes first."""
    cells = [run_cell(label) for label in "abc"]
    save_run(tmp_path, "a-0-0", 31.0)
    protocol = {"selects": NAME, "chosen_by": "PSNR on held_out, 10 training images held out"}
    save_run(tmp_path, "b-1-0", 31.0, protocol=protocol)
    save_run(tmp_path, "c-2-0", 31.0, protocol=protocol)
    (table,) = make_tables(plan(grid(cells)), find_results(tmp_path), {})
    assert (
        "Ours: the run's best weights; its best are chosen by PSNR on held_out, 10 training images held out; "
        "or by PSNR on set5; seed 0."
    ) in notes(lay_out(table))


def test_how_many_evaluations_the_best_was_chosen_from(tmp_path: Path) -> None:
    """From result.json or, of an older run, counted in its log: lines with the metric that chooses, each step once."""
    cells = [run_cell(label) for label in "abc"]
    save_run(tmp_path, "a-0-0", 31.0, evaluations=40)
    rows = [
        {"step": 10, "student/loss": 1.0},
        *({"step": step, NAME: 30.0, "teacher/set5/psnr": 31.0} for step in (10, 20, 20, 30)),
        {"step": 40, NAME: None},  # not finite
        {"step": 40, "teacher/set5/psnr": 31.0},
    ]
    log = save_run(tmp_path, "b-1-0", 31.0) / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 50, "student/set5/ps')
    folder = save_run(tmp_path, "c-2-0", 31.0)  # a result alone: nothing is known
    found = find_results(tmp_path)
    assert {run.folder.name: run.evaluations for run in found.runs} == {
        "run-a-0-0": 40, "run-b-1-0": 4, folder.name: None
    }  # fmt: skip
    (table,) = make_tables(plan(grid(cells)), found, {})
    named = "number of evaluations that the best weights are chosen from: 40 (1 run), 4 (1 run), not given (1 run)"
    assert [flag for flag in table.flags if "evaluations" in flag] == [f"Cells that are compared differ in {named}."]
    layout = lay_out(table)
    first = notes(layout)[1]
    assert (
        first == "Ours: the run's best weights; its best are chosen from 4 to 40 evaluations by PSNR on set5; seed 0."
    )
    ours, last = layout.panels[0].rows[0][-2:]
    assert ours.explained.endswith("run-a-0-0, of 40 evaluations")
    assert last.explained.endswith("run-a-0-0")
    (table,) = make_tables(plan(grid(cells, ours="last")), found, {})
    assert not any("evaluations" in flag for flag in table.flags)


@pytest.mark.parametrize("path", sorted(Path("configs/grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_super_resolution_is_compared_by_its_last_weights(path: Path) -> None:
    """PISR tests its last checkpoint; the literature of FESD reports the best FID."""
    if path.stem.startswith(("dssd-", "fesd-")):
        assert load_grid(path).ours == ("last" if path.stem.startswith("dssd-") else "best")
