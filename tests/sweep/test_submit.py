"""Submitting grids: which runs, in which arrays, waiting for what; with stand-ins for SLURM's programs."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from toy_sweep import put_grid, put_slurm

from hpcdistill.command import run_command
from hpcdistill.config import ConfigFiles
from hpcdistill.errors import UserError
from hpcdistill.file_lock import locked
from hpcdistill.run import load_run
from hpcdistill.sweep.slurm_jobs import undisturbed
from hpcdistill.sweep.submissions import utc
from hpcdistill.sweep.submit import collect_command, main
from hpcdistill.sweep.task import Command

CLONE = Path(__file__).resolve().parents[2]
CPU = "gpus_per_node: 0\nset: [train.device=cpu]\n"


class Site:
    """A folder with a grid and a profile, and a SLURM that notes what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slurm = folder / "slurm-stand-in"
        self.grid = put_grid(folder)
        self.profile("")

    def profile(self, text: str) -> None:
        (self.folder / "here.yaml").write_text(CPU + text)

    def submit(self, *words: str) -> int:
        return main(["toy.yaml", "--cluster", "./here.yaml", *words])

    def scripts(self) -> list[str]:
        """The scripts that sbatch was given, in order."""
        return [path.read_text() for path in sorted(self.slurm.glob("script-*"))]

    def options(self) -> list[dict[str, str]]:
        return [dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)) for text in self.scripts()]

    def plan(self) -> dict[str, Any]:
        """plan.json of the last submission."""
        last = max(self.folder.glob("sweeps/submissions/*"), key=lambda path: path.stat().st_ctime_ns)
        content: dict[str, Any] = json.loads((last / "plan.json").read_text())
        return content

    def forget(self) -> None:
        for script in self.slurm.glob("script-*"):
            script.unlink()

    def key(self, name: str, number: int = 0) -> str:
        """The key of the run of this name in the last plan."""
        return [key for key, run in self.plan()["runs"].items() if run["name"].startswith(name)][number]

    def end(self, key: str, state: str) -> None:
        """Give a run a result, or the state.json of a failure."""
        name = self.plan()["runs"][key]["name"]
        if state == "finished":
            folder = self.folder / "runs" / f"{name}-{key[:8]}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"name": name, "key": key, "last": None}))
        else:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            content = {"key": key, "name": name, "state": state, "attempt": 1, "job": self.plan()["jobs"].get(key)}
            content |= {"host": "elsewhere", "pid": 1, "started": now, "ended": now, "run": None, "code": 2}
            content |= {"message": "error: it was so", "log": None}
            (self.folder / "sweeps" / "tasks" / key / "state.json").write_text(json.dumps(content))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.setenv("PATH", f"{put_slurm(site.slurm)}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return site


def test_two_submissions_at_once_are_not_made(site: Site) -> None:
    (site.folder / "sweeps").mkdir()
    with locked(Path("sweeps/.submit.lock")) as held:
        assert held
        with pytest.raises(UserError, match="sweeps: another submission is being made there; wait for it to end"):
            site.submit()
    assert not site.scripts()
    assert site.submit() == 0


def test_a_grid_is_one_array_a_stage_and_the_collector(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit("--parallel", "3") == 0
    teachers, alone, students, last = site.options()
    assert (teachers["array"], students["array"]) == ("0-1%2", "0-3%3")
    assert "array" not in alone
    assert "dependency" not in teachers
    assert "dependency" not in alone
    assert students["dependency"] == "afterany:101", "two students of one teacher do not pair with it"
    assert last["dependency"] == "afterany:101:102:103"
    assert "array" not in last
    for options in (teachers, alone, students):
        assert options["signal"] == "USR2@120"
        assert "requeue" in options
        assert (options["nodes"], options["ntasks-per-node"], options["cpus-per-task"]) == ("1", "1", "4")
        assert "gpus-per-node" not in options
    script = site.scripts()[0]
    assert "srun --unbuffered" in script
    assert "--cpus-per-task=4 --kill-on-bad-exit=0 --wait=60" in script
    assert 'scontrol requeue "${job:-$SLURM_JOB_ID}"' in script
    assert f"export PYTHONPATH={CLONE}" in script
    plan = site.plan()
    assert len(plan["runs"]) == len(plan["jobs"]) == 7
    assert sorted(plan["jobs"].values()) == ["101_0", "101_1", "102", *(f"103_{n}" for n in range(4))]
    assert plan["collector"] == "104"
    assert plan["profile"]["name"] == "./here.yaml"
    assert plan["environment"]["packages"]["submitit"]
    assert [len(grid["cells"]) for grid in plan["grids"].values()] == [6]
    assert "104" in capsys.readouterr().err
    for key, run in plan["runs"].items():
        config = site.folder / "sweeps" / "tasks" / key / "config.json"
        assert load_run([str(config)]).key == key
        assert (config.with_name("teacher.json")).is_file() == (run["teacher"] is not None)
        assert load_run(run["arguments"]).key == key
    # The pickles lie where submitit looks for them on the node, and can be read there.
    jobs = next(site.folder.glob("sweeps/submissions/*/jobs"))
    assert sorted(path.name for path in jobs.glob("*/*.pkl")) == sorted(
        [*(f"{job}_submitted.pkl" for job in plan["jobs"].values()), "104_submitted.pkl"]
    )


def test_students_that_pair_with_their_teachers_wait_for_them_alone(site: Site) -> None:
    site.grid.write_text(site.grid.read_text().replace('"2": {set: [method.weight_vid=2e-6]}', ""))
    assert site.submit() == 0
    teachers, _, students, _ = site.options()
    assert (teachers["array"], students["array"]) == ("0-1%2", "0-1%2")
    assert students["dependency"] == "aftercorr:101"
    assert students["kill-on-invalid-dep"] == "yes"
    plan = site.plan()
    for key, run in plan["runs"].items():
        if run["teacher"]:
            assert plan["jobs"][key].partition("_")[2] == plan["jobs"][run["teacher"]].partition("_")[2]


@pytest.mark.parametrize(
    ("file", "answer"),
    [("most", "2"), ("parameters", "bf_interval=1,max_array_tasks=2,preempt_youngest_first")],
    ids=["the cluster's largest", "what the scheduler takes"],
)
def test_arrays_are_cut_below_slurms_limit(site: Site, file: str, answer: str) -> None:
    (site.slurm / file).write_text(answer)
    assert site.submit("--parallel", "3") == 0
    *options, last = site.options()
    assert [entry.get("array") for entry in options] == ["0-1%2", None, "0-1%1", "0-1%1"], "one alone is no array"
    assert last["dependency"] == "afterany:101:102:103:104"


def test_a_refused_array_names_the_key_of_the_profile(site: Site) -> None:
    (site.slurm / "refuse").write_text("101")
    (site.slurm / "complaint").write_text("Batch job submission failed: Invalid job array specification")
    said = (
        r"here.yaml: sbatch refused: .*Invalid job array specification; an array of 2 tasks .* `array:` in the profile"
    )
    with pytest.raises(UserError, match=said):
        site.submit()


def at_a_time(options: list[dict[str, str]]) -> int:
    """The most runs that may run together: each job takes the places of those that it waits for."""
    parallel = [int(entry["array"].partition("%")[2]) if "array" in entry else 1 for entry in options]
    waits = [set(map(int, re.findall(r"\d+", entry.get("dependency", "")))) for entry in options]
    numbers = range(101, 101 + len(options))
    best = 0
    for chosen in range(1 << len(options)):
        together = [n for i, n in enumerate(numbers) if chosen >> i & 1]
        if not any(_waits_for(a, b, waits) for a in together for b in together if a != b):
            best = max(best, sum(parallel[n - 101] for n in together))
    return best


def _waits_for(job: int, other: int, waits: list[set[int]]) -> bool:
    return other in waits[job - 101] or any(_waits_for(before, other, waits) for before in waits[job - 101])


@pytest.mark.parametrize(
    ("parallel", "most", "shapes"),
    [
        (1, 3, ""),
        (1, 1000, ""),  # teachers, and a run beside them
        (2, 1, ""),
        (2, 3, ""),
        (3, 1000, ""),
        (2, 2, "shapes: {student: {hours: 1}, plain: {hours: 2}}\n"),
    ],
)
def test_no_more_runs_of_a_stage_at_a_time_than_parallel(site: Site, parallel: int, most: int, shapes: str) -> None:
    site.profile(f"parallel: {parallel}\narray: {most}\n{shapes}")
    site.grid.write_text(site.grid.read_text().replace('weight: "0"}, base: plain.yaml}', ALONE))
    assert site.submit() == 0
    by_stage: dict[str, list[dict[str, str]]] = {"0": [], "1": []}
    for entry in site.options()[:-1]:
        by_stage[entry["job-name"].partition("-stage")[2][0]].append(entry)
    assert sum(len(entries) for entries in by_stage.values()) == len(site.plan()["arrays"])
    # Of the first stage alone, whose jobs have the first numbers; those of the second wait for jobs of it as well.
    assert at_a_time(by_stage["0"]) == parallel, "no more, and no fewer: the places are all used"


ALONE = 'weight: "0"}, base: plain.yaml}\n' + "\n".join(
    f'  - {{labels: {{encoder: none, weight: "{n}"}}, base: plain.yaml, set: [train.steps={n}]}}' for n in range(10, 13)
)


def test_students_that_pair_wait_for_a_place_as_well(site: Site) -> None:
    (site.folder / "longer.yaml").write_text("teacher: {overrides: {train: {steps: 9}}}\n")
    site.grid.write_text(site.grid.read_text().replace("set: [method.weight_vid=2e-6]", "overlays: [longer.yaml]"))
    site.profile("parallel: 1\narray: 2\n")
    assert site.submit() == 0
    waits = {entry["job-name"]: entry.get("dependency") for entry in site.options()[:-1]}
    assert list(waits.values()) == [None, "afterany:101", "afterany:102", "aftercorr:101", "aftercorr:102,afterany:104"]


def test_inside_a_job_the_new_one_is_as_from_a_login_node(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = {"SLURM_JOB_ID": "17", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_STEP_ID": "0", "SRUN_DEBUG": "3"}
    outer |= {"SLURM_MEM_PER_CPU": "300", "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": "0", "PMI_RANK": "0"}
    outer |= {"SBATCH_TIMELIMIT": "1", "SBATCH_MEM_BIND": "local", "RANK": "0", "SLURMD_NODENAME": "n1"}
    for name, value in (outer | {"SLURM_CONF": "/etc/x.conf"}).items():
        monkeypatch.setenv(name, value)
    assert site.submit() == 0
    files = sorted(site.slurm.glob("environment-*"))
    assert len(files) == 4, "the runs' jobs, and the one that collects"
    for file in files:
        given = dict(line.partition("=")[::2] for line in file.read_text().splitlines())
        assert given.keys() & outer.keys() == set()
        assert given["SLURM_CONF"] == "/etc/x.conf"
    assert outer.items() <= os.environ.items(), "for this process nothing has changed"
    said = capsys.readouterr().err
    assert said.count("submitted from inside SLURM job 17: SBATCH_TIMELIMIT not passed on") == 1


def test_on_a_login_node_what_is_set_for_sbatch_reaches_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    assert site.submit() == 0
    assert all("SBATCH_ACCOUNT=lab\n" in file.read_text() for file in site.slurm.glob("environment-*"))


def test_again_nothing_that_is_queued_or_has_finished_is_submitted(site: Site) -> None:
    assert site.submit() == 0
    plan = site.plan()
    in_queue(site, *plan["jobs"].values())
    site.forget()
    assert site.submit() == 0
    assert site.scripts() == [], "all of it is in the queue"
    # Half of the students have finished, one job was cancelled before it began.
    cancelled, finished = site.key("student", 1), [site.key("student", 0), site.key("teacher", 0)]
    for key in finished:
        site.end(key, "finished")
    in_queue(site, *(job for key, job in plan["jobs"].items() if key not in (*finished, cancelled)))
    assert site.submit() == 0
    assert list(site.plan()["jobs"]) == [cancelled]
    assert "dependency" not in site.options()[0], "its teacher has finished"


def test_a_student_of_a_queued_teacher_waits_for_that_job(site: Site) -> None:
    assert site.submit() == 0
    teacher = site.key("teacher", 0)
    job = site.plan()["jobs"][teacher]
    students = [key for key, run in site.plan()["runs"].items() if run["teacher"] == teacher]
    in_queue(site, *(job for key, job in site.plan()["jobs"].items() if key not in students))
    site.forget()
    assert site.submit() == 0
    assert site.options()[0]["dependency"] == f"afterany:{job}"
    assert set(site.plan()["jobs"]) == set(students)


@pytest.mark.parametrize(("retry", "names"), [("missing", ["plain"]), ("failed", ["teacher"]), ("all", None)])
def test_retry(site: Site, retry: str, names: list[str] | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit() == 0
    plan = site.plan()
    failed = site.key("teacher", 0)
    students = [key for key, run in plan["runs"].items() if run["teacher"] == failed]
    for key, run in plan["runs"].items():
        if key == failed:
            site.end(key, "failed")
        elif key in students:
            site.end(key, "blocked")
        elif run["name"] != "plain":
            site.end(key, "finished")
    in_queue(site)
    site.forget()
    capsys.readouterr()
    assert site.submit("--retry", retry) == 0
    started = [site.plan()["runs"][key]["name"] for key in site.plan()["jobs"]]
    wanted = {"missing": ["plain"], "failed": ["teacher", "student", "student"]}
    wanted["all"] = ["teacher", "plain", "student", "student"]
    assert sorted(started) == sorted(wanted[retry])
    if retry == "missing":
        assert "2 its teacher teacher is failed" in capsys.readouterr().err


def test_a_dry_run_shows_everything_and_touches_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(site.folder.rglob("*"))
    shutil.rmtree(site.slurm / "bin")  # not even SLURM is needed
    assert site.submit("--dry-run") == 0
    assert sorted(site.folder.rglob("*")) == [path for path in before if not path.is_relative_to(site.slurm / "bin")]
    shown = capsys.readouterr().out
    assert "as of the files; SLURM was not asked" in shown
    for text in ("CARN", "31.90", "reported", "HFRM", "stage0-0", "stage1-0", "#SBATCH --array=0-1%2", "7 distinct"):
        assert text in shown, text
    assert "6 cells, 1 of them reported" in " ".join(shown.split())


def test_other_numbers_of_a_profile_reach_sbatch(site: Site) -> None:
    site.profile(
        "partition: long\naccount: lab\nqos: high\nconstraint: avx\nmemory: 1.5\nhours: 2.5\n"
        "tasks_per_node: 2\nnodes: 2\nsetup: [module load x]\nenvironment: {A: $HOME/b}\npython: container python\n"
        "requeue: false\nsbatch: {exclude: n7, exclusive: true}\nsignal_seconds: 33\n"
        "shapes: {teacher: {memory: 3, hours: 1}}\ncollect: {partition: short, hours: 0.5}\n"
    )
    assert site.submit() == 0
    by_name = {entry["job-name"]: entry for entry in site.options()}
    plain, teachers = by_name["hpcdistill-stage0-0"], by_name["hpcdistill-stage0-1"]
    if plain["mem"] != "1536M":
        plain, teachers = teachers, plain
    assert (plain["mem"], teachers["mem"]) == ("1536M", "3072M")
    assert (plain["time"], teachers["time"]) == ("150", "60")
    assert (plain["partition"], plain["account"], plain["qos"], plain["constraint"]) == ("long", "lab", "high", "avx")
    assert (plain["nodes"], plain["ntasks-per-node"], plain["signal"]) == ("2", "2", "USR2@33")
    assert plain["exclude"] == "n7"
    assert "exclusive" in plain
    assert "no-requeue" in plain
    script = site.scripts()[0]
    assert "scontrol requeue" not in script
    assert "\nmodule load x\n" in script
    assert 'export A="$HOME/b"' in script
    assert " container python -u -m submitit.core._submit" in script
    assert (by_name["hpcdistill-collect"]["partition"], by_name["hpcdistill-collect"]["time"]) == ("short", "30")


def test_a_snapshot_is_the_code_that_is_run(site: Site) -> None:
    site.profile("snapshot: true\n")
    assert site.submit() == 0
    code = next(site.folder.glob("sweeps/submissions/*/code"))
    assert f"export PYTHONPATH={code}" in site.scripts()[0]
    assert (code / "hpcdistill" / "train.py").read_bytes() == (CLONE / "hpcdistill" / "train.py").read_bytes()
    assert not (code / ".git").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import hpcdistill; print(hpcdistill.__file__)"],
        env=os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        cwd=CLONE,  # the clone's own must not come first
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(code / "hpcdistill" / "__init__.py")


def test_what_was_submitted_before_a_refusal_is_known(site: Site) -> None:
    (site.slurm / "refuse").write_text("102")
    with pytest.raises(UserError, match=r"here.yaml: sbatch refused: invalid partition specified: nope"):
        site.submit()
    assert sorted(site.plan()["jobs"].values()) == ["101_0", "101_1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope.yaml"], "nope.yaml: no such grid file"),
        (["toy.yaml", "--cluster", "nope"], "--cluster nope: no such profile"),
        (["toy.yaml", "--cluster", "here.yaml", "train.batch_sise=3"], "toy.yaml: (HFRM, 1): command line: train.bat"),
        (
            ["toy.yaml", "--cluster", "here.yaml", "seeded.yaml"],
            "seeded.yaml: seed: not for every run of a sweep; give",
        ),
        (["toy.yaml", "--cluster", "here.yaml", "plain.yaml"], "plain.yaml: method.name: a run's whole configuration"),
        (
            ["toy.yaml", "--cluster", "wrong.yaml"],
            "toy.yaml: (HFRM, 1): --cluster wrong.yaml: set: train.batch_sise: u",
        ),
        (["wrong-set.yaml", "--cluster", "here.yaml"], "wrong-set.yaml: (HFRM, 1): set: train.batch_sise: unknown key"),
        (["wrong-axis.yaml", "--cluster", "here.yaml"], "wrong-axis.yaml: (HFRM, 2): set: method.weight_vdi: unknown"),
        (["toy.yaml", "--cluster", "here.yaml", "train.device=cuda"], "toy.yaml: (HFRM, 1): teacher, --cluster here"),
        (["toy.yaml", "--cluster", "here.yaml", "--folder", "toy.yaml"], "toy.yaml"),
    ],
)
def test_mistakes_are_one_line(
    site: Site, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "slurm").mkdir()
    (site.folder / "slurm" / "clusters").symlink_to(CLONE / "slurm" / "clusters")
    (site.folder / "wrong.yaml").write_text("gpus_per_node: 0\nset: [train.batch_sise=3]\n")
    (site.folder / "seeded.yaml").write_text("seed: 3\n")
    text = site.grid.read_text()
    (site.folder / "wrong-set.yaml").write_text(f"{text}set: [train.batch_sise=3]\n")
    (site.folder / "wrong-axis.yaml").write_text(text.replace("weight_vid", "weight_vdi"))
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert site.scripts() == []


def test_without_slurm_it_says_what_else_there_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(site.slurm / "bin")
    monkeypatch.setenv("PATH", str(site.folder))
    with pytest.raises(UserError, match=r"no SLURM on this machine \(no sbatch\); give --local"):
        site.submit()


def test_a_cell_whose_configuration_does_not_exist(site: Site) -> None:
    (site.folder / "plain.yaml").unlink()
    with pytest.raises(UserError, match=r"toy.yaml: \(none, 0\): .*plain.yaml: no such configuration file"):
        site.submit()


def test_the_collector_is_told_what_the_sweep_was_told() -> None:
    command = collect_command(["a.yaml", "b"], ["train.steps=3"], [0, 1], Path("runs"), Path("sweeps"))
    assert " ".join(command) == (
        "slurm/collect.py runs train.steps=3 --grid a.yaml b --with-others "
        "--folder sweeps --out sweeps/report --seeds 0 1"
    )
    assert "--grid all" in " ".join(collect_command([], [], None, Path("runs"), Path("sweeps")))


def test_an_overlay_lies_over_every_run_and_goes_to_the_collector(site: Site) -> None:
    (site.folder / "short.yaml").write_text("train: {steps: 3}\n")
    assert site.submit("short.yaml", "train.batch_size=2") == 0
    plan = site.plan()
    assert len(plan["runs"]) == 7
    for key in plan["runs"]:
        values = json.loads((site.folder / "sweeps" / "tasks" / key / "config.json").read_text())
        assert (values["train"]["steps"], values["train"]["batch_size"]) == (3, 2)
    assert {run["steps"] for run in plan["runs"].values()} == {3}
    assert plan["overrides"] == ["train.device=cpu", "short.yaml", "train.batch_size=2"]
    assert "short.yaml" in plan["command"], "`status.py --retry` gives the same words"
    words = " ".join(collector(site).command)
    assert "runs train.device=cpu short.yaml train.batch_size=2 --grid" in words
    in_queue(site, *plan["jobs"].values())
    site.forget()
    assert site.submit("short.yaml", "train.batch_size=2") == 0
    assert site.scripts() == [], "the same runs again"


def without_data(site: Site) -> None:
    shutil.rmtree(site.folder / "data")


@pytest.mark.parametrize("where", [[], ["--local"]])
def test_missing_data_are_said_once_before_anything_is_started(site: Site, where: list[str]) -> None:
    without_data(site)
    (site.folder / "plain.yaml").write_text(
        (site.folder / "plain.yaml").read_text().replace("eval: {toy: data/toy}", "eval: {set5: data/packed/set5}")
    )
    site.grid.write_text(site.grid.read_text().replace("base: plain.yaml}", "base: plain.yaml, of: {psnr: null}}"))
    site.grid.write_text(site.grid.read_text().replace("of: {psnr: null}", "of: {psnr: student/set5/psnr}"))
    with pytest.raises(UserError) as caught:
        site.submit(*where, "train.batch_size=2")
    said = str(caught.value)
    assert "\n" not in said
    command = "hpcdistill prefetch train.device=cpu train.batch_size=2 --grid toy.yaml"
    assert f"data/packed/set5: run `{command}` where there is a network" in said
    assert "data/toy, which no recipe is called: pack it with `python shards/pack.py`" in said
    assert said.count("data/toy") == said.count("data/packed/set5") == 1, "once, not for each of seven runs"
    assert "--no-data-check goes on" in said
    assert not list(site.folder.glob("sweeps/tasks/*"))
    assert not list(site.folder.glob("sweeps/submissions/*"))
    assert site.scripts() == []


def test_a_dry_run_shows_the_plan_and_then_what_is_missing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    without_data(site)
    assert site.submit("--dry-run") == 0
    shown = capsys.readouterr()
    assert "7 distinct" in shown.out
    [line] = shown.err.splitlines()
    assert line.startswith("warning: the runs need what is not on this machine; data/toy")


def test_data_that_only_the_nodes_see(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    without_data(site)
    assert site.submit("--dry-run", "--no-data-check") == 0
    assert "not on this machine" not in capsys.readouterr().err
    assert site.submit("--no-data-check") == 0
    assert len(site.scripts()) == 4
    assert "--no-data-check" in site.plan()["command"]


def test_what_nothing_reads_any_more_is_not_asked_for(site: Site) -> None:
    assert site.submit() == 0
    for key in site.plan()["runs"]:
        site.end(key, "finished")
    in_queue(site)
    without_data(site)
    assert site.submit() == 0, "nothing is left to be run"


def test_many_cells_are_one_call_an_array(site: Site) -> None:
    """So that a thousand are submitted in seconds: bench/sweep.py measures it."""
    assert site.submit("--seeds", *map(str, range(40))) == 0
    assert len(site.plan()["jobs"]) == 202, "200 cells, and two teachers that they share"
    assert len(site.scripts()) == 4, "one call an array, and the collector"


def test_a_configuration_is_checked_once_a_cell_not_a_seed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = [], ConfigFiles.checked
    monkeypatch.setattr(ConfigFiles, "checked", lambda self, layers: checked.append(layers) or check(self, layers))
    assert site.submit("--dry-run", "--seeds", *map(str, range(20))) == 0
    assert len(checked) <= 12, "five cells, the teachers of four, and the teacher's file alone"


def with_many_alone(site: Site) -> None:
    """Twenty networks that nothing waits for, beside the two teachers."""
    cells = [
        f'  - {{labels: {{encoder: alone, weight: "{n}"}}, base: plain.yaml, set: [train.steps={n + 7}]}}\n'
        for n in range(20)
    ]
    site.grid.write_text(site.grid.read_text() + "".join(cells))


def test_students_do_not_wait_for_runs_beside_their_teachers(site: Site) -> None:
    with_many_alone(site)
    assert site.submit("--parallel", "8") == 0
    teachers, alone, students, _ = site.options()
    assert teachers["array"] == "0-1%2", "not throttled for the many beside them"
    assert alone["array"] == "0-20%6"
    assert students["dependency"] == "afterany:101"
    plan = site.plan()
    names = {job.partition("_")[0]: plan["runs"][key]["name"] for key, job in plan["jobs"].items()}
    assert names == {"101": "teacher", "102": "plain", "103": "student"}


def test_retry_starts_the_failed_teacher_of_students_in_the_queue(site: Site) -> None:
    assert site.submit() == 0
    plan, failed = site.plan(), site.key("teacher", 0)
    site.end(failed, "failed")
    in_queue(site, *(job for key, job in plan["jobs"].items() if key != failed))
    site.forget()
    assert site.submit("--retry", "failed") == 0
    assert list(site.plan()["jobs"]) == [failed]


def test_no_teacher_is_started_for_students_that_have_finished(site: Site) -> None:
    assert site.submit() == 0
    plan, failed = site.plan(), site.key("teacher", 0)
    for key in plan["runs"]:
        site.end(key, "failed" if key == failed else "finished")
    in_queue(site)
    site.forget()
    assert site.submit("--retry", "all") == 0
    assert site.scripts() == []


def test_students_of_a_teacher_outside_slurm_are_left(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit() == 0
    plan, teacher = site.plan(), site.key("teacher", 0)
    state = {"key": teacher, "name": "teacher", "state": "running", "attempt": 1, "job": None, "run": None, "log": None}
    state |= {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": utc(),
        "ended": None,
        "code": None,
        "message": None,
    }
    place = site.folder / "sweeps" / "tasks" / teacher / "state.json"
    place.write_text(json.dumps(state))
    shutil.rmtree(next(site.folder.glob("sweeps/submissions/*")))
    (site.slurm / "queue").write_text("")
    site.forget()
    capsys.readouterr()
    assert site.submit() == 0
    students = {key for key, run in plan["runs"].items() if run["teacher"] == teacher}
    assert set(site.plan()["jobs"]) == set(plan["runs"]) - students - {teacher}
    said = " ".join(capsys.readouterr().err.split())
    assert "2 its teacher teacher is running outside SLURM: submit again when it has ended" in said


def test_ctrl_c_waits_until_the_job_is_written_down(site: Site) -> None:
    sbatch = site.slurm / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace('echo "Submitted', 'kill -INT $PPID\necho "Submitted'))
    with pytest.raises(KeyboardInterrupt):
        site.submit()
    assert len(site.scripts()) == 1
    assert set(site.plan()["jobs"].values()) == {"101_0", "101_1"}


def test_what_a_grid_says_is_no_markup(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    text = site.grid.read_text().replace("title: Toy", 'title: "Toy [/nope] [red]x"')
    text = text.replace("encoder: CARN", 'encoder: "CARN [/b] [i]"').replace("{psnr: {of", '{psnr: {label: "[/P]", of')
    site.grid.write_text(text)
    assert site.submit("--dry-run") == 0
    shown = capsys.readouterr().out
    for said in ("Toy [/nope] [red]x (toy.yaml", "CARN [/b] [i]", "[/P] (paper)"):
        assert said in shown


def test_values_of_the_environment_reach_the_job_as_they_are(site: Site) -> None:
    site.profile("environment: {A: 'say \"hi\" in $PWD', B: 'back\\slash`x`', C: '\\$HOME'}\n")
    assert site.submit() == 0
    lines = [line for line in site.scripts()[0].splitlines() if re.match("export [ABC]=", line)]
    script = "\n".join([*lines, 'printf "%s\\n" "$A" "$B" "$C"'])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines() == ['say "hi" in /', "back\\slash`x`", "$HOME"]


def collector(site: Site) -> Command:
    """The collecting job of the last submission, as its node would read it."""
    [file] = sorted(site.folder.glob("sweeps/submissions/*/jobs/collect/*_submitted.pkl"))[-1:]
    call = cloudpickle.loads(file.read_bytes()).function
    assert isinstance(call, Command)
    return call


def test_the_collector_of_a_snapshot_works_in_the_copy(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = tmp_path / "snapshot.yaml"
    profile.write_text("gpus_per_node: 0\nsnapshot: true\n")
    own = tmp_path / "own.yaml"
    metrics = "metrics: {psnr: {of: student/set5/psnr, better: higher}}\n"
    own.write_text(f"title: Own\n{metrics}base: configs/fsrcnn/x4.yaml\ncells: [{{labels: {{method: FSRCNN}}}}]\n")
    monkeypatch.chdir(CLONE)
    monkeypatch.setenv("HPCDISTILL_DATA", "data/packed")
    sweeps = tmp_path / "sweeps"
    words = [os.path.relpath(own), "--cluster", str(profile), "--folder", str(sweeps), "--no-data-check"]
    assert main(words) == 0
    code = next(sweeps.glob("submissions/*/code"))
    call = collector(site)
    assert call.cwd == code
    assert call.command[0] == str(code / "slurm" / "collect.py")
    words = list(call.command)
    assert words[1] == str(CLONE / "runs")
    assert Path(words[words.index("--grid") + 1]).samefile(own)
    assert Path(words[words.index("--grid") + 1]).is_absolute()
    assert words[words.index("--folder") + 1] == str(sweeps)
    assert words[words.index("--data-root") + 1] == "data/packed"


def test_the_collector_of_a_snapshot_works_here_when_the_copy_lacks_something(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.profile("snapshot: true\n")
    assert site.submit() == 0
    assert f"snapshot: {site.folder} is not in it; the tables will be made" in capsys.readouterr().err
    call = collector(site)
    assert call.cwd == site.folder, "its configurations are not the clone's"
    assert call.command[0].endswith("/code/slurm/collect.py")


def in_queue(site: Site, *jobs: str) -> None:
    """What squeue says from now on."""
    place = next(site.folder.glob("sweeps/submissions/*")).name
    lines = [f"{job}|PENDING|{int(time.time())}|N/A|Priority|submissions/{place}/jobs/x.sh" for job in jobs]
    (site.slurm / "queue").write_text("\n".join(lines) + "\n" if lines else "")


def test_an_own_grid_has_no_column_of_a_paper(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit("--dry-run") == 0
    assert "psnr (paper)" in capsys.readouterr().out  # CARN's is printed
    site.grid.write_text(site.grid.read_text().replace(", printed: {psnr: 31.9}", ""))
    assert site.submit("--dry-run") == 0
    assert "(paper)" not in capsys.readouterr().out


def test_a_grid_without_anything_to_run_is_known_to_status_and_tables(site: Site) -> None:
    assert site.submit() == 0
    for key in site.plan()["runs"]:
        site.end(key, "finished")
    shutil.rmtree(site.folder / "sweeps")
    assert site.submit() == 0
    assert site.submit() == 0
    assert len(list(site.folder.glob("sweeps/submissions/*"))) == 1
    assert set(site.plan()["grids"]) == {"toy"}
    assert site.plan()["jobs"] == {}


def test_a_grid_from_elsewhere_is_known_by_its_name_afterwards(site: Site) -> None:
    place = site.folder / "elsewhere" / "own.yaml"
    place.parent.mkdir()
    site.grid.rename(place)
    arguments = ["--cluster", "./here.yaml"]
    assert main([str(place), *arguments]) == 0
    (site.folder / "configs/grids").mkdir(parents=True)
    assert main(["own", *arguments]) == 0
    assert site.plan()["command"][0] == "own"
    assert Path(site.plan()["grids"]["own"]["path"]) == place


def test_ctrl_c_that_was_ignored_interrupts_nothing() -> None:
    """As in what a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_are_not_submitted_into_their_data(site: Site) -> None:
    with pytest.raises(UserError, match=r"runs data/toy: is a data set of this run; name another folder"):
        site.submit("--dry-run", "runs=data/toy")


def test_the_home_sign_in_a_sweep(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sh nor zsh expands it in `runs=~/x`; the sweep's own folder and the profile are paths as well."""
    home = site.folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (site.folder / "here.yaml").rename(home / "here.yaml")
    assert main(["toy.yaml", "--cluster", "~/here.yaml", "--folder", "~/sweeps", "runs=~/runs"]) == 0
    assert (home / "sweeps" / "submissions").is_dir()
    assert not (site.folder / "~").exists()
    task = json.loads(next((home / "sweeps").rglob("config.json")).read_text())
    assert task["runs"] == str(home / "runs")
