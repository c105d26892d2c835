"""Plans: which cells are one run, what waits for what, and that a plan's command is what will be run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcdistill.config import ConfigFiles, _UnusualError
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Method
from hpcdistill.run import Run, load_run
from hpcdistill.sweep.estimates import Estimates, load_estimates
from hpcdistill.sweep.grid import load_grid, load_grids
from hpcdistill.sweep.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
X4 = "configs/dssd/x4.yaml"

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _clone_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HPCDISTILL_DATA", "nowhere/packed")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a grid of one metric; returns its path."""

    def writer(cells: str, name: str = "mine", of: str = "student/set5/psnr") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"metrics: {{m: {{of: {of}, better: higher}}}}\n{cells}")
        return path

    return writer


def run_of(plan: Plan, grid: str, seed: int = 0, **labels: str) -> str | None:
    [found] = [each for each in plan.grids if each.name == grid]
    [number] = [n for n, cell in enumerate(found.cells) if labels.items() <= cell.labels.items()]
    return plan.cells[grid, number, seed]


def show(plan: Plan) -> None:
    """What `--dry-run` will say, in short; seen with pytest -s."""
    for run in plan.runs.values():
        cells = ", ".join(f"{grid}[{number}]" for grid, number, _ in run.uses)
        print(f"{run.stage} {run.key} {run.name} steps={run.steps} hours={run.hours} teacher={run.teacher} {cells}")


def test_the_papers_tables_are_59_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(self: Method) -> None:
        raise AssertionError("a plan builds no network")

    monkeypatch.setattr(Method, "__init__", unexpected)
    plan = make_plan(load_grids())
    show(plan)
    assert len(plan.cells) == 102
    assert sum(key is None for key in plan.cells.values()) == 36
    # By hand. FESD: Original, OMGD, DCD, FESD on 3 sets; BL+PCS on 2; 3 more directions, 2 amplitudes, 2 shares: 21.
    # DSSD: FSRCNN*, PISR, DSSD at 3 scales; bicubic encoder, no SDM, 2 degradations, 2 supervisions; VDSR and IDN in 3
    # settings: 9 + 6 + 6 = 21, of which all but FSRCNN* (3), VDSR* and IDN* have a teacher of their own: 16.
    # And Wavelet KD on horse2zebra, which the Original teaches.
    assert len(plan.runs) == 21 + 21 + 16 + 1
    assert [len(stage) for stage in plan.stages] == [42, 17]
    teachers = {run.teacher for run in plan.runs.values()} - {None}
    assert len(teachers) == 17
    taught_by = Counter(plan.runs[key].loaded.config.method.name for key in teachers if key)
    assert taught_by == {"privileged_teacher": 16, "cyclegan": 1}
    assert [run.stage for run in plan.runs.values()] == [0] * 42 + [1] * 17


def test_one_run_in_many_tables() -> None:
    plan = make_plan(load_grids())
    full = {
        run_of(plan, "dssd-2", degradation="SDM"),
        run_of(plan, "dssd-3", supervision="both levels"),
        run_of(plan, "dssd-4", network="FSRCNN", setting="DSSD"),
        run_of(plan, "dssd-A1", scale="x4", method="DSSD"),
    }
    [key] = full
    assert key
    assert plan.runs[key].name == "dssd-x4"
    assert [use[0] for use in plan.runs[key].uses] == ["dssd-2", "dssd-3", "dssd-4", "dssd-A1"]
    teacher = plan.runs[plan.runs[key].teacher or ""]
    assert teacher.uses == plan.runs[key].uses
    pisr = run_of(plan, "dssd-1", encoder="PISR")  # written as a variant of DSSD here, as a file of its own there
    assert pisr == run_of(plan, "dssd-A1", scale="x4", method="PISR")
    assert run_of(plan, "dssd-1", encoder="HFRM") == run_of(plan, "dssd-2", degradation="no SDM")
    bl = {
        run_of(plan, "fesd-1", dataset="summer2winter", method="DCD"),
        run_of(plan, "fesd-3", direction="none"),
        run_of(plan, "fesd-4", amplitude="none"),
        run_of(plan, "fesd-5", alpha="none"),
        run_of(plan, "fesd-6", method="BL", dataset="summer2winter"),
    }
    assert len(bl) == 1
    shifted = {run_of(plan, "fesd-3", direction="bi"), run_of(plan, "fesd-4", amplitude="2")}
    assert len({*shifted, run_of(plan, "fesd-5", alpha="1/8")}) == 1
    assert run_of(plan, "fesd-1", dataset="summer2winter", method="DMAD") is None


@pytest.mark.parametrize("seeds", [None, [0, 7]])
def test_one_run_teaches_both_directions(seeds: list[int] | None) -> None:
    """Wavelet KD's teachers are the generators of the Original in the same table, whatever the student's seed."""
    plan = make_plan(load_grids(["fesd-1"]), seeds)
    original = run_of(plan, "fesd-1", dataset="horse2zebra", method="Original")
    for seed in seeds or [0]:
        run = plan.runs[run_of(plan, "fesd-1", seed, method="Wavelet KD") or ""]
        assert run.teacher == original
        assert (run.stage, run.seed, run.steps) == (1, seed, 266_800)
        assert run.hours
        assert (again := load_run(run.arguments)).key == run.key
        assert {teacher.run.key for teacher in again.teachers.values() if teacher.run} == {original}


def test_what_two_runs_would_have_to_teach_is_not_planned(write: Write) -> None:

    def planned(*overrides: str) -> Plan:
        cell = {"labels": {"x": "y"}, "base": "configs/wavelet_kd/horse2zebra.yaml", "set": overrides}
        return make_plan(load_grids([str(write(f"cells: [{json.dumps(cell)}]\n", of="student/horse2zebra/fid"))]))

    for override in ("teachers.ba.overrides.seed=1", "teachers.ba.config=configs/original/summer2winter.yaml"):
        with pytest.raises(UserError, match="a sweep trains one run before another; name the other teachers by a"):
            planned(override)
    with pytest.raises(
        UserError, match=r"wavelet_kd: needs the teacher ba; name its config under `teachers\.ba\.config`"
    ):
        planned("teachers.ba=null")
    for overrides in (["teachers.ba=null", "method.direction=a2b"], ["teachers.ba={run: runs/mine}"]):
        assert [run.stage for run in planned(*overrides).runs.values()] == [0, 1]


def test_a_planned_run_is_what_its_command_line_says() -> None:
    overlays = ["configs/variants/cpu.yaml", "eval.kid=false", "data.eval={set5: elsewhere, b100: ../b100}"]
    for plan in (make_plan(load_grids()), make_plan(load_grids(["dssd-1", "dssd-4"]), [0, 7], overlays)):
        for run in plan.runs.values():
            again = load_run(run.arguments)
            assert again.config.dump() == run.loaded.config.dump(), run.arguments
            taught, ours = (
                {role: teacher.run for role, teacher in loaded.teachers.items() if teacher.run}
                for loaded in (again, run.loaded)
            )
            assert {role: each.config.dump() for role, each in taught.items()} == {
                role: each.config.dump() for role, each in ours.items()
            }
            assert again.key == run.key
            assert again.files == run.loaded.files
            assert {each.key for each in taught.values()} == ({run.teacher} if run.teacher else set())


def outcome(load: Callable[[list[str]], Run], arguments: list[str]) -> Run | str:
    """What `load` makes of `arguments`, or says about them."""
    try:
        return load(arguments)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        [X4, "data.eval.mine=elsewhere"],
        [X4, "data.eval={mine: elsewhere}"],
        [X4, "configs/variants/demo.yaml", "train.steps=3"],
        [X4, "teacher.overrides.train.steps=5", "method.weight_vid=2e-6"],
        [X4, "method.scale=${data.patch}"],
        ["configs/fesd/edges2shoes.yaml", "configs/variants/gan-cpu.yaml", "configs/variants/gan-cpu-pairs.yaml"],
        ["configs/fesd/horse2zebra.yaml", "data.crop=128"],
        ["configs/fesd/horse2zebra.yaml", "name=${data.direction}", "method.crop=${train.batch_size}"],
        [X4, "train.step=3"],
        [X4, "method.scale=5"],
        [X4, "method.name=plain"],
        [X4, "data.cache=${nothing.there}"],
        [X4, "name=${oc.env:SURELY_NOT_SET}"],
        ["configs/dssd/x5.yaml"],
        ["train.steps=3"],
        [X4, "=3"],
        *([X4, odd] for odd in ("train.steps=010", "train=[1]", "method=[1]", "data.train=5", "name=1e5", "seed=0x10")),
        *([X4, odd] for odd in ("train.epochs=.inf", "teacher.overrides.name=1e5", "runs=on", "data.flip=off")),
    ],
)
def test_interpolations_are_omegaconf_s(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual ones are replaced without OmegaConf, which takes 30 ms for them: with the same values and errors."""
    found = outcome(load_run, arguments)

    def unusual(self: ConfigFiles, value: object, root: object) -> None:
        raise _UnusualError

    monkeypatch.setattr(ConfigFiles, "_resolved", unusual)
    expected = outcome(load_run, arguments)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    assert found.config.dump() == expected.config.dump()
    assert type(found.config.method) is type(expected.config.method)
    assert (found.files, found.overrides) == (expected.files, expected.overrides)
    assert (found.teacher is None) == (expected.teacher is None)
    if found.teacher and expected.teacher:
        assert found.teacher.config.dump() == expected.teacher.config.dump()


def test_every_planned_run_can_be_built() -> None:
    for run in make_plan(load_grids()).runs.values():
        with torch.device("meta"):
            assert run.loaded.untrained().generators


def test_seeds_are_the_students() -> None:
    plan = make_plan(load_grids(["dssd-1"]), [0, 1, 2])
    assert len(plan.runs) == 3 + 9
    assert [len(stage) for stage in plan.stages] == [3, 9]
    assert {run.seed for run in plan.stages[0]} == {0}
    seeds = [plan.runs[key].seed for key in plan.cells.values() if key]
    assert seeds == [0, 1, 2] * 3
    second = plan.runs[run_of(plan, "dssd-1", seed=2, encoder="HFRM") or ""]
    assert second.arguments[-2:] == ("seed=2", "teacher.overrides.seed=0")
    assert second.teacher == plan.runs[run_of(plan, "dssd-1", seed=0, encoder="HFRM") or ""].teacher


def test_a_grids_own_seeds_and_no_seed_among_the_overrides(write: Write) -> None:
    path = write("seeds: [3, 4]\ncells: [{labels: {a: b}, base: configs/fsrcnn/x2.yaml}]\n")
    plan = make_plan([load_grid(path)])
    assert [run.seed for run in plan.runs.values()] == [3, 4]
    assert [run.seed for run in make_plan([load_grid(path)], [5]).runs.values()] == [5]
    with pytest.raises(UserError, match="give --seeds"):
        make_plan([load_grid(path)], None, ["seed=3"])
    with pytest.raises(UserError, match="expected different whole numbers"):
        make_plan([load_grid(path)], [1, 1])


def test_the_key_is_of_what_changes_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*arguments: str) -> str:
        return load_run([X4, *arguments]).key

    same = ["name=other", "runs=elsewhere", "data.workers=0", "train.log_every=7", "data.eval.mine=elsewhere"]
    assert len(key()) == 12
    assert {key(argument) for argument in same} == {key()}
    different = [
        "seed=1",
        "teacher.overrides.seed=1",
        "teacher.checkpoint=best",
        "train.steps=10",
        "method.weight_vid=2e-6",
        "data.train=elsewhere",
        "data.eval={set5: elsewhere}",
        "eval.select=b100",
        "init.student=runs/other",
    ]
    assert len({key(), *(key(argument) for argument in different)}) == 1 + len(different)
    before = key()
    monkeypatch.setenv("HPCDISTILL_DATA", "/scratch/project/data")
    assert key() == before
    assert key("data.train=/scratch/project/data/div2k/train") == before


def test_test_sets_of_cells_that_are_one_run_are_joined(write: Write) -> None:
    one = write("base: configs/fsrcnn/x2.yaml\ncells: [{labels: {a: b}}]\n", "one")
    two = write(
        "base: configs/fsrcnn/x2.yaml\nset: [data.eval.mine=here]\ncells: [{labels: {a: b}}]\n",
        "two",
        of="student/mine/psnr",
    )
    [run] = make_plan([load_grid(one), load_grid(two)]).runs.values()
    assert list(run.loaded.config.data.eval) == ["set5", "set14", "b100", "urban100", "mine"]
    assert load_run(run.arguments).config.dump() == run.loaded.config.dump()
    assert [use[0] for use in run.uses] == ["one", "two"]
    three = write("base: configs/fsrcnn/x2.yaml\nset: [data.eval.mine=there]\ncells: [{labels: {a: b}}]\n", "three")
    with pytest.raises(UserError, match=r"three.yaml: \(b\): data.eval.mine: there here and here in another cell"):
        make_plan([load_grid(one), load_grid(two), load_grid(three)])


def test_cells_of_one_grid_that_are_one_run_are_warned_of(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("base: configs/fsrcnn/x2.yaml\naxes: {a: {b: {}, c: {set: [data.workers=0]}}}\n")
    assert len(make_plan([load_grid(path)]).runs) == 1
    assert "(c) and (b) are the same run" in capsys.readouterr().err


def test_a_resolved_configuration_in_a_file_has_the_same_key(tmp_path: Path) -> None:
    """As a task's folder has it, and a run's."""
    for number, run in enumerate(make_plan(load_grids(["dssd-1", "fesd-3"]), [7]).runs.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = run.loaded.config.dump()
        if run.loaded.teacher:
            (folder / "teacher.json").write_text(json.dumps(run.loaded.teacher.config.dump()))
            values["teacher"] = {"config": "teacher.json", "checkpoint": values["teacher"]["checkpoint"]}
        (folder / "config.json").write_text(json.dumps(values))
        assert load_run([str(folder / "config.json")]).key == run.key


@pytest.mark.parametrize(
    ("cell", "of", "expected"),
    [
        ("base: configs/dssd/x5.yaml", "student/set5/psnr", "x5.yaml: no such configuration file; did you mean"),
        (f"base: {X4}, overlays: [configs/variants/bl-pc.yaml]", "student/set5/psnr", "did you mean 'bl-pcs.yaml'?"),
        (f"base: {X4}, set: [train.step=3]", "student/set5/psnr", "train.step: unknown key; did you mean 'steps'?"),
        (f"base: {X4}", "student/set6/psnr", "it is not evaluated on 'set6'; did you mean 'set5'?"),
        (f"base: {X4}", "student/set5/fid", "'fid' is not measured; valid: psnr, ssim"),
        (f"base: {X4}", "teacher/set5/psnr", "privileged_student has no generator 'teacher'; valid: student"),
        (f"base: {X4}", "psnr", "expected generator/test set/metric"),
        ("base: configs/original/horse2zebra.yaml", "student/horse2zebra/fid", "has no generator 'student'"),
        ("base: configs/fesd/horse2zebra.yaml", "student/horse2zebra/lpips", "'lpips' is not measured"),
        (f"base: {X4}, set: [eval.select=nine]", "student/set5/psnr", "eval.select: 'nine' is not one of data.eval"),
    ],
)
def test_a_cell_that_cannot_be_run(write: Write, cell: str, of: str, expected: str) -> None:
    path = write(f"cells: [{{labels: {{a: b}}, {cell}}}]\n", of=of)
    with pytest.raises(UserError) as caught:
        make_plan([load_grid(path)])
    assert str(caught.value).startswith(f"{path}: (b): ")
    assert expected in str(caught.value)


def test_a_students_missing_teacher_is_said(write: Write, tmp_path: Path) -> None:
    (tmp_path / "alone.yaml").write_text(
        f"extends: {ROOT}/configs/base/sr.yaml\nmethod: {{name: privileged_student, scale: 4}}\n"
    )
    path = write(f"cells: [{{labels: {{a: b}}, base: {tmp_path}/alone.yaml}}]\n")
    with pytest.raises(UserError, match="needs a teacher"):
        make_plan([load_grid(path)])
    # A student of nobody needs none, whatever its file names.
    path = write(f"cells: [{{labels: {{a: b}}, base: {X4}, set: [method.vid=none, method.initialise=random]}}]\n")
    [run] = make_plan([load_grid(path)]).runs.values()
    assert (run.teacher, run.stage) == (None, 0)


def test_the_users_own_overrides_may_leave_a_metric_out(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(load_grids(["dssd-1"]), None, ["data.eval={mine: here}"])
    assert len(plan.runs) == 6
    said = capsys.readouterr().err
    assert said.count("not evaluated on 'set5'") == 1


def test_steps_and_hours() -> None:
    estimates = Estimates.model_validate(
        {
            "seconds_per_step": [
                {"when": {"method.name": ["plain_sr", "cyclegan"], "method.scale": [None, 2]}, "seconds": 0.36},
                {"when": {"method.name": "plain_sr"}, "seconds": 3.6},
            ],
            "samples": {"horse2zebra/train": 1334},
        }
    )

    def of(*arguments: str) -> tuple[int | None, float | None]:
        return estimates.of(load_run(arguments).config)

    assert of("configs/fsrcnn/x2.yaml") == (1_000_000, pytest.approx(100))
    assert of("configs/fsrcnn/x4.yaml") == (1_000_000, pytest.approx(1000))
    assert of("configs/original/horse2zebra.yaml") == (266_800, pytest.approx(26.68))
    assert of("configs/original/summer2winter.yaml") == (None, None)
    assert of(X4, "train.steps=5") == (5, None)
    # As docs/results/gpu_queue.md: 3 seeds of FSRCNN, PISR, DSSD with their teachers at x4 are 31 hours.
    plan = make_plan(load_grids(["dssd-A1"]), None, [], load_estimates())
    x4 = [run.hours for run in plan.runs.values() if run.loaded.config.method.model_dump()["scale"] == 4]
    assert 3 * sum(hours or 0 for hours in x4) == pytest.approx(31, rel=0.02)


def test_many_cells_read_each_file_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand cells are planned in seconds (bench/sweep.py measures it) because they share what they read."""
    values = ", ".join(f"{number}: {{set: [method.weight_vid={number + 1}e-9]}}" for number in range(100))
    path = write(
        f"base: {X4}\naxes:\n  vid: {{{values}}}\n"
        "  encoder: {pisr: {overlays: [configs/variants/encoder-pisr.yaml]}, full: {}}\n"
    )
    read: Counter[Path] = Counter()
    real = ConfigFiles._read

    def counted(files: ConfigFiles, path: Path, seen: tuple[Path, ...]) -> Iterator[Any]:
        read[path] += not seen  # what a file extends is read with it
        return real(files, path, seen)

    monkeypatch.setattr(ConfigFiles, "_read", counted)
    plan = make_plan([load_grid(path)])
    assert len(plan.runs) == 202
    assert {Path(X4).name, "encoder-pisr.yaml"} <= {path.name for path in read}
    assert max(read.values()) == 1, read
