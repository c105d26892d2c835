"""Who teaches: a configuration, a finished run, a file, a run that was taught itself; and a method from outside."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CONFIGS, tiny_variant

from hpcdistill.data.read.cache import FlatLayout
from hpcdistill.errors import UserError
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.sr_network import build_network
from hpcdistill.run import Run, load_run
from hpcdistill.trainer import train

STUDENT = """
name: student
method: {name: output_distillation, scale: 2}
"""
OUTSIDE = '''
"""A method of one's own, in a file beside the run."""

from typing import Literal

import torch
from pydantic import Field

from hpcdistill.losses import l1
from hpcdistill.methods.base import NO_TEACHERS, Role, constant, weigh
from hpcdistill.methods.sr import SuperResolution
from hpcdistill.methods.sr_settings import SuperResolutionConfig


class Agreeing(SuperResolution):
    """L1 to the mean of two teachers' images."""

    class Config(SuperResolutionConfig):
        weight: float = Field(2.0, ge=0, description="of the L1 to the teachers' mean")

        def roles(self):
            return {role: Role(takes=("lr",), scale=self.scale, channels=self.channels) for role in ("first", "second")}

    def __init__(self, config, teachers=NO_TEACHERS):
        super().__init__(config, teachers)
        self.register_buffer("weight", constant(config.weight), persistent=False)
        wanted = config.roles()
        self.teachers = torch.nn.ModuleList(wanted[role].filled(role, teachers) for role in wanted)

    def student_loss(self, batch, carry, progress):
        sr = self.call("student", self.lr(batch))
        with torch.no_grad():
            taught = sum(teacher(self.lr(batch)) for teacher in self.teachers) / len(self.teachers)
        return {"agreement": weigh(self.weight, l1(sr, taught))}
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_variant(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of FSRCNN at x2, which teaches in most of these tests."""
    run = load_run([str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path_factory.mktemp('finished')}"])
    assert train(run) is not None
    return run


def written(folder: Path, text: str, name: str = "student.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def trained(*arguments: str) -> tuple[Run, dict[str, Any]]:
    run = load_run(arguments)
    result = train(run)
    assert result is not None
    return run, result


def test_networks_that_do_not_fit_into_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSRCNN, "__init__", lambda *_, **__: torch.empty(1 << 45))  # 128 TiB, which no system has
    with pytest.raises(UserError, match=r"method: the networks of plain_sr do not fit into memory .*; make them"):
        load_run([str(CONFIGS / "fsrcnn" / "x2.yaml")]).untrained()


def test_a_step_that_does_not_fit_into_memory_is_one_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(network: FSRCNN, *_: object, **__: object) -> torch.Tensor:
        return torch.empty(1 << 45)

    monkeypatch.setattr(FSRCNN, "forward", forward)
    run = load_run([str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path}", "data.eval={}"])
    with pytest.raises(UserError, match=r"fsrcnn-x2: no memory is left on cpu .*train\.accumulation=2"):
        train(run)


def test_a_set_that_does_not_fit_on_the_device_after_all_is_one_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have taken the memory that was free when the device was asked."""
    monkeypatch.setattr(FlatLayout, "bytes", 0)
    monkeypatch.setattr("hpcdistill.data.read.device.decode_all", lambda *_: torch.empty(1 << 45))
    run = load_run([str(CONFIGS / "fsrcnn" / "x2.yaml"), tiny, f"runs={tmp_path}", "data.cache=device"])
    with pytest.raises(UserError, match=r"fsrcnn-x2: no memory is left on cpu"):
        train(run)


def test_any_configuration_teaches_and_is_trained_first(tiny: str, tmp_path: Path) -> None:
    config = written(tmp_path, STUDENT + f"teacher: {{config: {CONFIGS / 'fsrcnn' / 'x2.yaml'}}}\n")
    run, result = trained(config, tiny, f"runs={tmp_path / 'runs'}")
    [teacher] = (tmp_path / "runs").glob("fsrcnn-x2-*")
    assert result["teacher"] == teacher.name
    assert (teacher / "result.json").exists()
    student = load_generator(run.folder / "generators" / "last" / "student.safetensors")[0]
    assert sum(parameter.numel() for parameter in student.parameters()) == 12_644
    # The saved configuration is the same run, from its own folder alone.
    again = load_run([str(run.folder / "config.yaml")])
    assert again.identity == run.identity
    assert again.teachers["teacher"].file.parent.parent.parent.samefile(teacher)


def test_the_example_that_ships_is_idn_into_fsrcnn() -> None:
    run = load_run([str(CONFIGS / "output" / "x4.yaml")])
    assert run.teacher is not None
    assert type(run.untrained().generators["student"]).__name__ == "FSRCNN"
    assert type(run.teachers["teacher"].untrained()).__name__ == "IDN"
    assert run.teacher.config.name == "idn-x4"


def test_a_run_s_folder_is_the_same_teacher_as_its_configuration(finished: Run, tiny: str, tmp_path: Path) -> None:
    by_config = written(tmp_path, STUDENT + f"teacher: {{config: {CONFIGS / 'fsrcnn' / 'x2.yaml'}}}\n")
    by_folder = written(tmp_path, STUDENT + f"teacher: {{run: {finished.folder}}}\n", "by_folder.yaml")
    first = load_run([by_config, tiny, f"runs={finished.config.runs}"])
    second = load_run([by_folder, tiny, f"runs={tmp_path}"])
    assert first.identity == second.identity
    _, result = trained(by_folder, tiny, f"runs={tmp_path}")
    assert result["teacher"] == finished.folder.name


def test_a_teacher_on_the_command_line_replaces_the_file_s(finished: Run, tiny: str, tmp_path: Path) -> None:
    config = written(tmp_path, STUDENT + "teacher: {config: nowhere.yaml}\n")
    run = load_run([config, tiny, f"teacher.run={finished.folder}"])
    assert run.teacher is None
    assert run.teachers["teacher"].folder == finished.folder


def test_a_file_of_weights_teaches(tiny: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = build_network("idn", 2)
    save_generator(network, tmp_path / "idn.safetensors")
    config = written(tmp_path, STUDENT + f"teacher: {{weights: {tmp_path / 'idn.safetensors'}}}\n")
    run, result = trained(config, tiny, f"runs={tmp_path}")
    assert result["teacher"] == "idn.safetensors"
    loaded = run.teachers["teacher"].load()
    assert all(torch.equal(mine, its) for mine, its in zip(loaded.parameters(), network.parameters(), strict=True))
    # Its content is part of the identity, its place is not.
    (tmp_path / "elsewhere.safetensors").write_bytes((tmp_path / "idn.safetensors").read_bytes())
    moved = load_run([config, tiny, f"teacher.weights={tmp_path / 'elsewhere.safetensors'}"])
    assert moved.identity == run.identity
    save_generator(build_network("idn", 2), tmp_path / "idn.safetensors")
    assert load_run([config, tiny]).identity != run.identity


def test_best_or_last_and_which_network(finished: Run, tiny: str, tmp_path: Path) -> None:
    config = written(tmp_path, STUDENT + f"teacher: {{run: {finished.folder}}}\n")
    last = load_run([config, tiny]).teachers["teacher"]
    best = load_run([config, tiny, "teacher.checkpoint=best"]).teachers["teacher"]
    assert (last.file.parent.name, best.file.parent.name) == ("last", "best")
    with pytest.raises(UserError, match=r"teacher\.network: the run has no network 'studnt'; did you mean 'student'"):
        _ = load_run([config, tiny, "teacher.network=studnt"]).teachers["teacher"].file
    # A second network makes it ambiguous; one that was saved beside the generators can be named.
    folder = tmp_path / "several"
    for name, kind in (("student", "generators"), ("other", "generators"), ("discriminator", "saved")):
        (folder / kind / "last").mkdir(parents=True, exist_ok=True)
        save_generator(build_network("fsrcnn", 2), folder / kind / "last" / f"{name}.safetensors")
    words = r"teacher\.network: the run has several networks; name one of discriminator, other, student"
    with pytest.raises(UserError, match=words):
        _ = load_run([config, tiny, f"teacher.run={folder}"]).teachers["teacher"].file
    beside = load_run([config, tiny, f"teacher.run={folder}", "teacher.network=discriminator"]).teachers["teacher"]
    assert beside.file == folder / "saved" / "last" / "discriminator.safetensors"


def test_whoever_was_taught_can_teach(finished: Run, tiny: str, tmp_path: Path) -> None:
    """A chain: FSRCNN taught a student, which teaches the next one; each is trained once."""
    middle = written(tmp_path, STUDENT + f"teacher: {{run: {finished.folder}}}\n", "middle.yaml")
    config = written(tmp_path, STUDENT.replace("student", "last-one") + "teacher: {config: middle.yaml}\n")
    run, result = trained(config, tiny, f"runs={tmp_path / 'runs'}")
    assert run.teacher is not None
    assert result["teacher"] == run.teacher.folder.name
    assert {folder.name.rpartition("-")[0] for folder in (tmp_path / "runs").iterdir()} == {"student", "last-one"}
    assert middle == str(run.teacher.files[0])


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("{config: student.yaml}", "student.yaml: is its own teacher"),
        ("{checkpoint: best}", "teacher: name one of config, run, weights; none is given"),
        ("{run: a, weights: b}", "teacher: name one of config, run, weights; run and weights is given"),
        ("{run: nowhere}", "teacher.run: nowhere: no such run folder"),
    ],
)
def test_what_cannot_teach(teacher: str, words: str, tiny: str, tmp_path: Path) -> None:
    config = written(tmp_path, STUDENT + f"teacher: {teacher}\n")
    with pytest.raises(UserError, match=words):
        _ = load_run([config, tiny]).identity


def test_a_run_that_has_not_finished_does_not_teach(finished: Run, tiny: str, tmp_path: Path) -> None:
    """It has an identity and best weights already; those would be others the next day, under the same identity."""
    folder = tmp_path / "unfinished"
    shutil.copytree(finished.folder, folder)
    (folder / "result.json").unlink()
    config = written(tmp_path, STUDENT + f"teacher: {{run: {folder}, checkpoint: best}}\n")
    with pytest.raises(UserError, match=r"teacher\.run: .*unfinished has not finished"):
        train(load_run([config, tiny, f"runs={tmp_path / 'runs'}"]))


def test_a_role_that_the_method_does_not_have(finished: Run, tiny: str, tmp_path: Path) -> None:
    config = written(tmp_path, STUDENT + f"teachers: {{techer: {{run: {finished.folder}}}}}\n")
    with pytest.raises(UserError, match=r"teachers\.techer: the method has no such role; did you mean 'teacher'"):
        load_run([config, tiny]).untrained()


def test_an_outside_method_with_two_teachers(
    finished: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of the package knows it: a file on Python's path, a configuration; both teachers are finished runs."""
    (tmp_path / "one_s_own.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    lines = [
        "name: agreeing",
        "method: {name: 'one_s_own:Agreeing', scale: 2}",
        f"teachers: {{first: {{run: {finished.folder}}}, second: {{run: {finished.folder}, checkpoint: best}}}}",
    ]
    run, result = trained(written(tmp_path, "\n".join(lines)), tiny, f"runs={tmp_path / 'runs'}")
    assert result["method"] == "one_s_own:Agreeing"
    assert result["teachers"] == dict.fromkeys(("first", "second"), finished.folder.name)
    assert run.identity["teachers"] == {"first": [finished.short, "last"], "second": [finished.short, "best"]}
    assert load_file(run.folder / "generators" / "last" / "student.safetensors")
    assert load_run([str(run.folder / "config.yaml")]).identity == run.identity
    sys.modules.pop("one_s_own")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.to.be.found:Method", "no method 'nowhere.to.be.found:Method': No module named 'nowhere'"),
        ("hpcdistill.errors:UserError", "'hpcdistill.errors:UserError' is no method"),
        ("hpcdistill.errors:Nothing", "has no attribute 'Nothing'"),
        ("plain_srr", "unknown method 'plain_srr'; did you mean 'plain_sr'"),
    ],
)
def test_a_method_that_is_none(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"method.name: .*{words}"):
        load_run([written(tmp_path, f"method: {{name: '{name}', scale: 2}}\n")])
