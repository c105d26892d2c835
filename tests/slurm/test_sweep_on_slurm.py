"""A toy grid of both methods on a real SLURM: submitted, requeued, finished, collected, submitted again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ENDED, Cluster, ClusterError, until

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the support modules of the data tests
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))  # and of the methods'

from packed_sets import noise, write_set
from translation import write_vgg

pytestmark = pytest.mark.slurm

CLONE = Path(__file__).resolve().parents[2]
STEPS = 200  # of the run that is stopped: long enough to be caught
SR_GRID = """\
title: Toy of DSSD
metrics: {psnr: {of: student/toy/psnr, better: higher}}
overlays: [sr.yaml]
cells:
  - {labels: {method: alone}, base: CLONE/configs/fsrcnn/x2.yaml, set: [train.steps=STEPS, eval.every=STEPS]}
  - {labels: {method: DSSD}, base: CLONE/configs/dssd/x2.yaml}
  - {labels: {method: CARN}, kind: reported, printed: {psnr: 37.76}}
"""
GAN_GRID = """\
title: Toy of FESD
metrics: {psnr: {of: student/toy/psnr, better: higher}}
base: CLONE/configs/fesd/edges2shoes.yaml
overlays: [gan.yaml]
axes: {shift: {FESD: {}}}
"""
# Two teachers of which one cannot be trained, and their students: the tasks of the two stages pair.
BAD_GRID = """\
title: A teacher that fails
metrics: {psnr: {of: student/toy/psnr, better: higher}}
base: CLONE/configs/dssd/x2.yaml
overlays: [sr.yaml]
axes: {teacher: {good: {}, bad: {overlays: [nowhere.yaml]}}}
"""
LONG_GRID = """\
title: Long
metrics: {psnr: {of: student/toy/psnr, better: higher}}
overlays: [sr.yaml]
cells: [{labels: {method: alone}, base: CLONE/configs/fsrcnn/x2.yaml, set: [train.steps=1000000, eval.every=1000000]}]
"""
PROFILE = """\
gpus_per_node: 0
cpus_per_task: 1
memory: 0.2
hours: 0.5
parallel: 4
environment: {OMP_NUM_THREADS: 1}
set: [train.device=cpu, train.threads=1, data.workers=0]
collect: {memory: 0.2}
shapes:
  fsrcnn-*: {tasks_per_node: 2}
  dssd-x2: {nodes: 2}
"""


class Sweep:
    """A folder of grids, data and runs, and the commands on the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        write_set(folder / "sr", "lr-hr", _lr_hr(), scales=(2,))
        write_set(folder / "pairs", "paired", [{"ab.jpg": noise(48, 96, seed)} for seed in range(3)])
        self._write("cluster.yaml", PROFILE)
        self._write(
            "sr.yaml",
            f"data: {{train: {folder}/sr, eval: {{toy: {folder}/sr}}, patch: 48, samples_per_epoch: 3}}\n"
            "train: {steps: 4, batch_size: 4, log_every: 10, checkpoint_every: 100, gradient_norms_every: 0,\n"
            "  trackers: []}\neval: {every: 4}\n",
        )
        width = "{ngf: 8, levels: 4, blocks: 3}"
        self._write(
            "gan.yaml",
            f"data: {{train: {folder}/pairs, eval: {{toy: {folder}/pairs}}, crop: 48, load_size: 52}}\n"
            "train: {steps: 2, log_every: 1, gradient_norms_every: 0, trackers: [], batch_size: 1}\n"
            "eval: {every: 2, features: efficientnet-lite0, kid: false, lpips: false}\n"
            f"method: {{ndf: 4, discriminator_strides: 2, teacher: {width}, student: {width},\n"
            f"  vgg: {folder}/vgg.safetensors}}\n",
        )
        self._write("nowhere.yaml", "teacher: {overrides: {name: bad-teacher, data: {train: [nowhere]}}}\n")
        for name, text in {"toy-sr": SR_GRID, "toy-gan": GAN_GRID, "bad": BAD_GRID, "long": LONG_GRID}.items():
            self._write(f"{name}.yaml", text.replace("CLONE", str(CLONE)).replace("STEPS", str(STEPS)))

    def submit(self, *words: str) -> dict[str, Any] | None:
        """plan.json of the submission; None when there was nothing to submit."""
        before = set(self.folder.glob("sweeps/submissions/*"))
        script = CLONE / "slurm" / "submit_ablations.py"
        done = self.cluster.run(
            sys.executable, script, *words, "--cluster", "./cluster.yaml", cwd=self.folder, seconds=120
        )
        assert done.returncode == 0, done.stderr
        new = set(self.folder.glob("sweeps/submissions/*")) - before
        if not new:
            return None
        plan: dict[str, Any] = json.loads((new.pop() / "plan.json").read_text())
        return plan

    def await_job(self, job: str, seconds: float = 240) -> dict[str, str]:
        try:
            return self.cluster.wait_for(int(job), lambda shown: shown["JobState"] in ENDED, seconds)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.logs()}") from None

    def state(self, key: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "sweeps" / "tasks" / key / "state.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def result(self, name: str) -> dict[str, Any]:
        [path] = self.folder.glob(f"runs/{name}-*/result.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def logs(self) -> str:
        """The ends of all logs, for a test that failed."""
        files = [*self.folder.glob("sweeps/tasks/*/attempt-*/*"), *self.folder.glob("sweeps/submissions/*/**/*.out")]
        files += self.folder.glob("sweeps/submissions/*/collect.log")
        queue = self.cluster.run("squeue").stdout
        return queue + "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)


def _lr_hr() -> list[dict[str, Any]]:
    return [{"hr.png": noise(48, 60, seed), "lr2.png": noise(24, 30, seed)} for seed in range(3)]


@pytest.fixture
def sweep(cluster: Cluster, tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, cluster)


def named(plan: dict[str, Any], name: str) -> str:
    """The key of the run called so."""
    [key] = [key for key, run in plan["runs"].items() if run["name"] == name]
    return key


@pytest.mark.timeout(600)
def test_a_grid_of_both_methods_to_its_tables(sweep: Sweep, cluster: Cluster) -> None:
    grids = ("toy-sr.yaml", "toy-gan.yaml")
    write_vgg(sweep.folder / "vgg.safetensors")
    plan = sweep.submit(*grids)
    assert plan is not None
    assert len(plan["jobs"]) == 4
    alone = named(plan, "fsrcnn-x2")
    # The run of two ranks is told to stop while it trains; it must come back by itself and end as if it had not been.
    until(lambda: _steps(sweep), lambda steps: steps > 0, 150, "its first metrics")
    cluster.ask("scancel", "--signal=USR2", plan["jobs"][alone])
    until(lambda: sweep.state(alone).get("state"), lambda state: state == "stopped", 60, "its stop")
    assert _steps(sweep) < STEPS, "it had finished before it was stopped"
    again = sweep.submit(*grids)
    assert again is None, "all of it is in the queue, what was stopped as well"
    ended = sweep.await_job(plan["collector"])
    said = sweep.logs()
    assert ended["JobState"] == "COMPLETED", said
    states = {plan["runs"][key]["name"]: sweep.state(key) for key in plan["jobs"]}
    assert {name: state["state"] for name, state in states.items()} == dict.fromkeys(states, "finished"), said
    assert {name: state["attempt"] for name, state in states.items()} == {
        name: 1 + (name == "fsrcnn-x2") for name in states
    }
    assert sweep.result("fsrcnn-x2")["processes"] == 2, "one node, two tasks"
    assert sweep.result("dssd-x2")["processes"] == 2, "two nodes"
    assert sweep.result("dssd-teacher-x2")["processes"] == 1
    assert sweep.result("fsrcnn-x2")["steps"] == STEPS
    for key, state in ((key, sweep.state(key)) for key in plan["jobs"]):
        assert json.loads((Path(state["run"]) / "result.json").read_text())["key"] == key
    report = sweep.folder / "sweeps" / "report"
    assert (report / "index.html").is_file(), said
    csv = (report / "results.csv").read_text()
    assert all(key in csv for key in plan["jobs"] if plan["runs"][key]["name"] != "dssd-teacher-x2")
    # Half of it is lost; exactly that is run again, and no more is submitted for it.
    student = named(plan, "dssd-x2")
    (Path(sweep.state(student)["run"]) / "result.json").unlink()
    plan = sweep.submit(*grids)
    assert plan is not None
    assert list(plan["jobs"]) == [student]
    assert sweep.await_job(plan["collector"])["JobState"] == "COMPLETED", sweep.logs()
    assert sweep.state(student)["state"] == "finished"
    assert sweep.state(student)["attempt"] == 2
    assert sweep.submit(*grids) is None


@pytest.mark.timeout(400)
def test_a_teacher_that_fails_takes_only_its_student_along(sweep: Sweep, cluster: Cluster) -> None:
    plan = sweep.submit("bad.yaml", "--no-data-check")
    assert plan is not None
    assert plan["arrays"][1]["dependency"].startswith("aftercorr:"), "the stages pair"
    sweep.await_job(plan["collector"])
    said = sweep.logs()
    runs = plan["runs"]
    states = {key: sweep.state(key).get("state") for key in runs}
    by_teacher = {runs[key]["teacher"]: state for key, state in states.items() if runs[key]["teacher"]}
    good, bad = named(plan, "dssd-teacher-x2"), named(plan, "bad-teacher")
    assert (states[good], states[bad]) == ("finished", "failed"), said
    assert by_teacher[good] == "finished", said
    assert by_teacher[bad] in (None, "blocked"), "SLURM has cancelled it, or it has seen so itself"
    shown = cluster.run(sys.executable, CLONE / "slurm" / "status.py", "--json", "--all", cwd=sweep.folder)
    assert shown.returncode == 1, "something has failed"
    assert json.loads(shown.stdout)["summary"] == {"finished": 2, "failed": 1, "blocked": 1}
    assert "nowhere" in sweep.state(bad)["message"]
    assert (sweep.folder / "sweeps" / "report" / "index.html").is_file(), said
    until(lambda: cluster.ask("squeue", "--noheader"), lambda jobs: not jobs, 60, "an empty queue")


# In the interpreter's place: what a job of the sweep was given, and how many cores it is bound to.
RECORDER = """\
#!/usr/bin/env bash
{ env | grep -E "^(SLURM|SBATCH|SRUN|SALLOC|PMI|CUDA)" | cut -d= -f1 | sort
  echo "cores $(env -u OMP_NUM_THREADS nproc)"; } > "$(dirname "$0")/$WHERE-$SLURM_JOB_NAME"
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("outer", ["srun -n1 -c1 --mem-per-cpu=300", "salloc -n2 -c1 --mem-per-cpu=300"])
def test_from_inside_a_job_the_sweep_is_as_from_a_login_node(sweep: Sweep, cluster: Cluster, outer: str) -> None:
    (sweep.folder / "python").write_text(RECORDER)
    (sweep.folder / "python").chmod(0o755)
    for where, around in {"login": "", "inside": outer}.items():
        values = f"python: {sweep.folder}/python\ncpus_per_task: 2\nenvironment: {{WHERE: {where}}}\n"
        values += "sbatch: {exclusive: true}\n"  # a node's first two cores: further ones a machine may not have
        sweep._write(f"{where}.yaml", f"gpus_per_node: 0\nmemory: 0.2\n{values}set: [train.device=cpu]\n")
        words = ["long.yaml", "--cluster", f"./{where}.yaml", "--folder", where]
        command = [*around.split(), sys.executable, str(CLONE / "slurm" / "submit_ablations.py"), *words]
        done = cluster.run(*command, cwd=sweep.folder, seconds=120)
        assert done.returncode == 0, done.stderr
    until(lambda: cluster.ask("squeue", "--noheader"), lambda jobs: not jobs, 150, "an empty queue")
    said = sweep.logs() + "".join(file.read_text() for file in sweep.folder.glob("*/submissions/**/*.out"))
    for job in ("hpcdistill-stage0-0", "hpcdistill-collect"):
        found = {where: (sweep.folder / f"{where}-{job}") for where in ("login", "inside")}
        assert all(file.exists() for file in found.values()), said
        (given, cores), (wanted, _) = (found[where].read_text().split("cores ") for where in ("inside", "login"))
        assert given == wanted, said
        assert job.endswith("collect") or int(cores) == min(2, os.cpu_count() or 1), said


@pytest.mark.timeout(300)
def test_what_is_cancelled_stays_so_until_it_is_submitted_again(sweep: Sweep, cluster: Cluster) -> None:
    plan = sweep.submit("long.yaml")
    assert plan is not None
    [(key, job)] = plan["jobs"].items()
    until(lambda: _steps(sweep), lambda steps: steps > 0, 150, "its first metrics")
    cluster.ask("scancel", job)
    assert sweep.await_job(job)["JobState"] == "CANCELLED"
    until(lambda: sweep.state(key).get("state"), lambda state: state == "stopped", 60, "its stop")
    assert sweep.state(key)["code"] == 75, "saved"
    assert sweep.await_job(plan["collector"])["JobState"] == "COMPLETED", sweep.logs()
    assert cluster.job(int(job))["Restarts"] == "0"
    again = sweep.submit("long.yaml")
    assert again is not None
    assert list(again["jobs"]) == [key]
    until(lambda: sweep.state(key), lambda state: state["attempt"] == 2, 60, "its second attempt")
    cluster.cancel_all(60)


def _steps(sweep: Sweep) -> int:
    """Steps that the run of the network alone has logged."""
    steps = [0]
    for path in sweep.folder.glob("runs/fsrcnn-x2-*/metrics.jsonl"):
        steps += [json.loads(line).get("step", 0) for line in path.read_text().splitlines(True) if line.endswith("\n")]
    return max(steps)
