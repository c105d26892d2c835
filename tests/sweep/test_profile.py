"""Cluster profiles: the files that come with the clone, mistakes in one, and which runs fit."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import yaml

from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.plan import make_plan
from hpcdistill.sweep.profile import CollectShape, Profile, Shape, load_profile

CLONE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CLONE)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CLONE / "slurm" / "clusters").glob("*.yaml")))
def test_the_profiles_here_load(name: str) -> None:
    profile = load_profile(name)
    assert profile == load_profile(f"slurm/clusters/{name}.yaml")
    assert profile.hours > 1 / 6, "submitit takes every stop of a shorter job for a time-out"


def test_the_default_profile_names_every_key_with_its_default() -> None:
    values = yaml.safe_load((CLONE / "slurm/clusters/default.yaml").read_text())
    assert list(values) and set(values) == set(Profile.model_fields)  # noqa: PT018
    assert set(values["collect"]) == set(CollectShape.model_fields)
    assert load_profile("default") == Profile()
    text = (CLONE / "slurm/clusters/default.yaml").read_text().splitlines()
    for key in set(values) - {"account", "qos", "collect"}:
        assert any(line.startswith(f"{key}:") and "#" in line for line in text), f"{key} is not explained"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu\n", "partitoin: unknown key; did you mean 'partition'?"),
        ("collect: {cpu: 1}\n", "collect.cpu: unknown key; did you mean 'cpus'?"),
        ("shapes: {a*: {gpu_per_node: 2}}\n", "did you mean 'gpus_per_node'?"),
        ("nodes: 0\n", "nodes: expected greater than or equal to 1, got 0"),
        ("hours: a day\n", 'hours: expected a valid number, unable to parse string as a number, got "a day"'),
        ("set: [cpu]\n", "'cpu' is not an override; write key=value"),
        ("sbatch: {array: 0-3}\n", "'array' is set by the sweep itself; use the key parallel or array"),
        ("sbatch: {dependency: 'afterok:1'}\n", "'dependency' is set by the sweep itself; leave it out"),
        ("sbatch: {--ntasks_per_node: 3}\n", "is set by the sweep itself; use the key tasks_per_node"),
        ("- nodes\n", "expected `key: value` lines"),
        ("nodes: [\n", "not valid YAML"),
        ("hours: 1:30\n", "hours: expected a number in plain digits, like 1.5"),
        ("hours: .inf\n", "hours: expected a finite number"),
        ("shapes: {a*: {hours: 1:30}}\n", "shapes.a*.hours: expected a number in plain digits"),
        ("collect: {memory: 1_000}\n", "collect.memory: expected a number in plain digits"),
        ("nodes: 010\n", "nodes: expected a number in plain digits"),
        ("nodes: on\n", "nodes: expected a valid integer"),
        ("parallel: true\n", "parallel: expected a number, got true"),
        ("array: 9223372036854775808\n", "array: expected less than or equal to"),
        ("account: true\n", "account: expected text; put it in quotes, got true"),
        ("nodes: 1\nnodes: 2\n", "'nodes' is there twice"),
    ],
)
def test_mistakes_are_one_line_with_the_file_and_the_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["0712", "712", "1:30", "1_000", "1e5", "1.10", "no", "0x10"])
def test_text_is_as_it_is_written(tmp_path: Path, written: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"account: {written}\nqos: {written}\nenvironment: {{X: {written}}}\nsetup: [{written}]\n")
    profile = load_profile(str(path))
    assert (profile.account, profile.qos, profile.environment, profile.setup) == (
        written,
        written,
        {"X": written},
        (written,),
    )


def test_options_of_sbatch_are_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("sbatch: {time-min: 1:30, nice: 010, exclusive: true, mincpus: 4, switches: 1@0:30}\n")
    expected = {"time-min": "1:30", "nice": "010", "exclusive": True, "mincpus": 4, "switches": "1@0:30"}
    assert load_profile(str(path)).sbatch == expected


def test_an_unknown_profile_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such profile in slurm/clusters; did you mean 'preemptible'"):
        load_profile("preemptable")
    with pytest.raises(UserError, match="no such cluster profile"):
        load_profile(str(tmp_path / "none.yaml"))


def test_the_first_pattern_gives_a_runs_shape() -> None:
    profile = Profile.model_validate(
        {"gpus_per_node": 2, "hours": 5, "shapes": {"big-*": {"nodes": 3}, "big-one": {"nodes": 9}}}
    )
    assert profile.shape_of("small") == Shape(gpus_per_node=2, hours=5)
    assert profile.shape_of("big-one") == Shape(nodes=3, gpus_per_node=2, hours=5)
    assert (profile.shape_of("big-one").tasks, profile.shape_of("big-one").ranks) == (2, 6)
    assert Shape(gpus_per_node=0).ranks == 1
    assert Shape(gpus_per_node=0, tasks_per_node=4, nodes=2).ranks == 8


@pytest.mark.parametrize(
    ("profile", "overrides", "said"),
    [
        ({"nodes": 3}, [], "train.batch_size 16 cannot be cut over 3 ranks"),
        ({"gpus_per_node": 32}, [], "cannot be cut over 32 ranks"),
        ({"gpus_per_node": 4}, ["train.accumulation=3"], "into 3 equal micro-batches"),
        ({"gpus_per_node": 0}, ["train.device=cuda"], "train.device is cuda and gpus_per_node 0"),
        ({}, ["train.device=cpu"], "train.device is cpu, and 1 GPU a node would be idle"),
        ({"shapes": {"dssd-*": {"nodes": 5}}}, [], "over 5 ranks"),
        ({"nodes": 2, "gpus_per_node": 8}, [], None),
        ({"gpus_per_node": 0}, [], None),
        ({"gpus_per_node": 0}, ["train.device=cpu"], None),
    ],
)
def test_what_fits(profile: dict[str, object], overrides: list[str], said: str | None) -> None:
    config = load_run(["configs/dssd/x4.yaml", "train.batch_size=16", *overrides]).config
    if said is None:
        Profile.model_validate(profile).check_fits(config)
        return
    with pytest.raises(UserError, match=said):
        Profile.model_validate(profile).check_fits(config)


def test_the_profiles_that_are_shown_fit_the_papers_grids() -> None:
    shown = re.search(r"^    partition: gpu\n(?:    .*\n)+", (CLONE / "docs/cluster.md").read_text(), re.MULTILINE)
    said = re.search(r"^shapes:.*: (\{\".*\}\})$", (CLONE / "slurm/clusters/default.yaml").read_text(), re.MULTILINE)
    assert shown
    assert said
    plan = make_plan(load_grids())
    for values in (yaml.safe_load(shown[0]), {"shapes": yaml.safe_load(said[1])}):
        profile = Profile.model_validate(values)
        assert profile.shapes
        for pattern in profile.shapes:
            assert any(fnmatch.fnmatchcase(run.name, pattern) for run in plan.runs.values()), f"{pattern} fits no run"
        for run in plan.runs.values():
            profile.check_fits(run.loaded.config)


def test_further_options_of_sbatch_are_taken() -> None:
    assert Profile.model_validate({"sbatch": {"exclude": "n7", "mail-type": "END"}}).sbatch["exclude"] == "n7"
