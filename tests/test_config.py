"""Loading, merging and refusing configurations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpcdistill.command import run_command
from hpcdistill.config import config_files, to_yaml
from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.train import main

CLONE = Path(__file__).resolve().parents[1]
CONFIGS = CLONE / "configs"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return write(tmp_path, "base.yaml", "name: base\nmethod: {name: plain_sr, scale: 4}\ntrain: {batch_size: 8}\n")


def test_later_files_and_overrides_win(tmp_path: Path, base: str) -> None:
    variant = write(tmp_path, "variant.yaml", "train: {batch_size: 2, epochs: 3}\nseed: 7\n")
    config = load_run([base, variant, "seed=9"]).config
    assert (config.train.batch_size, config.train.epochs, config.seed) == (2, 3, 9)
    assert load_run([variant, base]).config.train.batch_size == 8


def test_extends_is_relative_to_the_file_and_weaker_than_it(tmp_path: Path, base: str) -> None:
    child = write(tmp_path, "deep/child.yaml", "extends: ../base.yaml\nname: child\ntrain: {epochs: 5}\n")
    config = load_run([child]).config
    assert (config.name, config.train.batch_size, config.train.epochs) == ("child", 8, 5)


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_run([first])


def test_a_file_replaces_the_test_sets_and_the_command_line_adds_one(tmp_path: Path, base: str) -> None:
    sets = write(tmp_path, "sets.yaml", "data: {eval: {set5: a, set14: b}}\n")
    own = write(tmp_path, "own.yaml", "data: {eval: {mine: c}}\n")
    assert load_run([base, sets, own]).config.data.eval == {"mine": "c"}
    assert load_run([base, own, "data.eval.more=d"]).config.data.eval == {"mine": "c", "more": "d"}


def test_an_override_may_name_a_file_and_a_file_may_have_an_equals_sign(tmp_path: Path, base: str) -> None:
    config = load_run([base, "data.eval.a=b.yaml"]).config
    assert config.data.eval == {"a": "b.yaml"}
    odd = write(tmp_path, "lr=1/x.yaml", "seed: 5\n")
    assert load_run([base, odd]).config.seed == 5


def test_interpolation(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "x.yaml", "data: {train: '${oc.env:HPCDISTILL_DATA,data/packed}/t91'}\n")
    assert load_run([base, file]).config.data.train == ("data/packed/t91",)
    monkeypatch.setenv("HPCDISTILL_DATA", "elsewhere")
    assert load_run([base, file]).config.data.train == ("elsewhere/t91",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bach_size=4", r"command line: train.bach_size: unknown key; did you mean 'batch_size'\?"),
        ("trian.batch_size=4", r"command line: trian: unknown key; did you mean 'train'\?"),
        ("method.scael=2", r"command line: method.scael: unknown key; did you mean 'scale'\?"),
        ("method.optimizer.learning_rat=1", "did you mean 'learning_rate'"),
        ("train.batch_size=0", "command line: train.batch_size: expected greater than 0, got 0"),
        ("train.batch_size=many", 'command line: train.batch_size: expected a valid integer.*got "many"'),
        ("method.scale=5", "command line: method.scale: expected 2, 3 or 4, got 5"),
        ("method.name=plain_srr", "method.name: unknown method 'plain_srr'; did you mean 'plain_sr'"),
        ("train.precision=fp8", "train.precision: expected 'fp32', 'bf16', 'fp16' or 'auto'"),
        ("method.optimizer.eps=-1", "method.optimizer.eps: expected greater than 0"),
        ("seed=${nowhere}", "seed"),
        ("=4", "not an override"),
        ("train..x=4", "not an override"),
        ("train=[1", "not valid YAML"),
        ("train=" + "[" * 200, "not valid YAML: nested more than 50 deep"),
        (".".join("a" * 100) + "=1", "not an override"),
        ("[=1", "not an override"),
        ("name=${name}", "name"),
        ("name=" + "n" * 300, "command line: name: .*at most 200 characters"),
    ],
)
def test_a_wrong_override_is_one_line_with_key_and_remedy(base: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_run([base, override])
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("text", ["method: [1]", "data: [1]", "train: 5", "method: {optimizer: on}", "teacher: [1]"])
def test_an_overlay_of_another_type_is_one_line_with_its_name(tmp_path: Path, base: str, text: str) -> None:
    overlay = write(tmp_path, "overlay.yaml", text)
    with pytest.raises(UserError, match=r"overlay\.yaml: .*expected"):
        load_run([base, overlay])


def test_what_aliases_share_is_changed_alone(tmp_path: Path) -> None:
    text = "method: {name: distilled_gan, teacher: &small {ngf: 8, blocks: 2}, student: *small}\n"
    config = load_run([write(tmp_path, "a.yaml", text), "method.student.ngf=4"]).config.dump()["method"]
    assert (config["teacher"]["ngf"], config["student"]["ngf"]) == (8, 4)


def test_an_error_of_a_whole_section_leaves_its_values_out() -> None:
    with pytest.raises(UserError, match=r"method: direction: pix2pix translates a to b only.*BtoA$"):
        load_run([str(CONFIGS / "fesd" / "edges2shoes.yaml"), "method.direction=both"])


def test_the_file_that_set_the_wrong_value_is_named(tmp_path: Path, base: str) -> None:
    variant = write(tmp_path, "variant.yaml", "train: {epochs: -1}\n")
    with pytest.raises(UserError, match=r"variant\.yaml: train\.epochs: expected greater than 0, got -1"):
        load_run([base, variant, "seed=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "expected `key: value` lines"),
        ("train: {batch_size: 1}\n", "method.name: missing"),
        ("method: {name: plain_sr}\n", "method.scale: missing"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("a: " + "[" * 200 + "]" * 200, "bad.yaml: not valid YAML: nested more than 50 deep"),
        ("a: &x [*x]", "bad.yaml: not valid YAML: an alias stands for what it is in"),
        ("method: [1]\n", r"bad.yaml: method: expected keys, such as name, got \[1\]"),
        ("method: plain_sr\n", "bad.yaml: method: expected keys, such as name"),
        ("just words\n", "expected `key: value` lines"),
        ("extends: [[a.yaml]]\n", "extends: expected a file name"),
        (
            "method: {name: output_distillation, scale: 2}\nteachers: {guide: {nework: student}}\n",
            "bad.yaml: teachers.guide.nework: unknown key; did you mean 'network'",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run([write(tmp_path, "bad.yaml", text)])


def test_a_missing_file_names_the_nearest(tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match=r"did you mean 'base\.yaml'"):
        load_run([str(tmp_path / "bse.yaml")])
    with pytest.raises(UserError, match="no such configuration file"):
        load_run([str(tmp_path / "no" / "where.yaml")])
    with pytest.raises(UserError, match="no configuration file"):
        load_run(["seed=1"])


class TestTeacher:
    """A student's configuration names its teacher's."""

    @pytest.fixture
    def student(self, tmp_path: Path) -> str:
        write(tmp_path, "teacher.yaml", "name: t\nmethod: {name: privileged_teacher, scale: 4}\ntrain: {epochs: 2}\n")
        text = "name: s\nteacher: {config: teacher.yaml}\nmethod: {name: privileged_student, scale: 4}\n"
        return write(tmp_path, "student.yaml", text)

    def test_overlays_and_overrides_reach_the_teacher_except_what_makes_the_student(
        self, tmp_path: Path, student: str
    ) -> None:
        variant = write(tmp_path, "v.yaml", "name: v\nmethod: {vid: none}\ntrain: {batch_size: 4}\n")
        loaded = load_run([student, variant, "seed=3", "method.vid=gaussian"])
        assert loaded.teacher is not None
        teacher = loaded.teacher.config
        assert (teacher.name, teacher.seed, teacher.train.batch_size, teacher.train.epochs) == ("t", 3, 4, 2)
        assert teacher.method.name == "privileged_teacher"
        assert loaded.config.name == "v"

    def test_its_own_overrides_come_last(self, tmp_path: Path, student: str) -> None:
        variant = write(
            tmp_path,
            "v.yaml",
            "train: {steps: 20}\nteacher: {overrides: {train: {steps: 5}, method: {encoder: pisr}}}\n",
        )
        loaded = load_run([student, variant])
        assert loaded.teacher is not None
        assert loaded.config.train.steps == 20
        assert loaded.teacher.config.train.steps == 5
        assert loaded.teacher.config.dump()["method"]["encoder"] == "pisr"

    def test_how_the_student_is_carried_out_holds_for_its_teacher(self, tmp_path: Path, student: str) -> None:
        with Path(student).open("a") as file:
            file.write("train: {deepspeed: zero2.json, device: cpu, threads: 1, batch_size: 8}\n")
        own = (tmp_path / "teacher.yaml").read_text().replace("{epochs: 2}", "{threads: 3}")
        write(tmp_path, "teacher.yaml", own)
        loaded = load_run([student])
        assert loaded.teacher is not None
        train = loaded.teacher.config.train
        assert (train.deepspeed, train.device, train.threads) == ("zero2.json", "cpu", 3)
        assert train.batch_size == 16  # that is the teacher's own affair

    def test_a_variants_words_to_a_teacher_do_nothing_without_one(self, tmp_path: Path, base: str) -> None:
        variant = write(tmp_path, "v.yaml", "teacher: {overrides: {method: {encoder: pisr}}}\n")
        assert load_run([base, variant]).config.teacher is None

    def test_a_wrong_override_of_the_teacher_is_named(self, student: str) -> None:
        with pytest.raises(UserError, match=r"teacher\.overrides: method\.encoder: expected 'hfrm'"):
            load_run([student, "teacher.overrides.method.encoder=vgg"])


def test_the_printed_configuration_loads_again(tmp_path: Path, base: str) -> None:
    config = load_run([base, "train.steps=5"]).config
    again = load_run([write(tmp_path, "again.yaml", to_yaml(config))]).config
    assert again.dump() == config.dump()


def loads(*files: Path) -> bool:
    try:
        load_run([str(file) for file in files])
    except UserError:
        return False
    return True


def test_every_configuration_that_ships_is_valid() -> None:
    files = config_files(CONFIGS)
    assert {f"{method}/x{scale}.yaml" for method in ("dssd", "pisr", "fsrcnn") for scale in (2, 3, 4)} <= {
        str(path.relative_to(CONFIGS)) for path in files
    }
    assert {
        f"{row}/{data}.yaml"
        for row in ("fesd", "dcd", "original")
        for data in ("horse2zebra", "summer2winter", "edges2shoes", "edges2shoes-r")
    } <= {str(path.relative_to(CONFIGS)) for path in files}
    variants = sorted((CONFIGS / "variants").glob("*.yaml"))
    for path in files:
        load_run([str(path)])
    for variant in variants:
        # What a variant is for: super-resolution, a distilled GAN, or an Original.
        bases = ("dssd/x4.yaml", "fesd/horse2zebra.yaml", "original/horse2zebra.yaml")
        valid = [base for base in bases if loads(CONFIGS / base, variant)]
        assert valid, variant


def test_the_papers_recipe() -> None:
    """dssd.md, section 3."""
    config = load_run([str(CONFIGS / "dssd" / "x4.yaml")]).config
    steps = config.train.epochs * config.data.samples_per_epoch / config.train.batch_size
    assert (config.data.patch, config.train.batch_size, config.train.epochs, steps) == (192, 16, 1000, 1_000_000)
    optimizer = config.dump()["method"]["optimizer"]
    assert (optimizer["learning_rate"], optimizer["final_learning_rate"]) == (1e-3, 1e-5)
    assert optimizer["schedule"] == "cosine"
    assert optimizer["betas"] == [0.9, 0.999]
    short = load_run([str(CONFIGS / "dssd" / "x4.yaml"), str(CONFIGS / "variants" / "short.yaml")]).config
    assert short.train.epochs * short.data.samples_per_epoch / short.train.batch_size == 50_000


def test_print_config_shows_both_stages_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(CONFIGS / "dssd/x4.yaml"), str(CONFIGS / "variants/cpu.yaml")]
    assert main([*files, "train.batch_size=4", "--print-config"]) == 0
    student, teacher = yaml.safe_load_all(capsys.readouterr().out)
    assert student["train"]["batch_size"] == teacher["train"]["batch_size"] == 4
    assert teacher["method"]["name"] == "privileged_teacher"


def test_print_config_shows_a_teacher_of_two_roles_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CONFIGS / "wavelet_kd/horse2zebra.yaml"), "--print-config"]) == 0
    own, teacher = capsys.readouterr().out.split("# configuration of ab and ba\n---\n")
    assert yaml.safe_load(own)["name"] == "wavelet_kd-horse2zebra"
    assert yaml.safe_load(teacher)["name"] == "original-horse2zebra"


def test_no_argument_is_a_guide_and_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    guide = capsys.readouterr().out
    assert "configs/dssd/x4.yaml" in guide
    assert "configs/variants/cpu.yaml" in guide
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert not ended.value.code
    assert "--print-config" in capsys.readouterr().out


WRONG = [["configs/dssd/x5.yaml"], ["configs/dssd/x4.yaml", "train.bach_size=4"], ["configs/fsrcnn/x4.yaml"]]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_users_error_is_one_line_and_exit_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(CLONE)
    monkeypatch.setattr(sys, "argv", ["train", *arguments, f"runs={tmp_path}", f"data.train={tmp_path / 'nothing'}"])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert said.startswith("error: ")


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "hpcdistill.train", *WRONG[1]]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
