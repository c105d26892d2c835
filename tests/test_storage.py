"""Paths as users write them: `~` is the home folder wherever one is read, and what is no path is one line."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_sets import noise, write_set

from hpcdistill import demo, demo_gan, evaluate
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.storage import json_texts, parse_json, replacing, user_path, user_place, write_bytes
from hpcdistill.sweep import collect, status_command, submit
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.profile import load_profile

CLONE = Path(__file__).resolve().parents[1]
NOBODY = "~nobody-of-this-name/x"
BASE = "name: base\nmethod: {name: plain_sr, scale: 4}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    "text", ["x", "./x/", "a/~/b", "x~", "https://host/~user/set", "http:/one/slash", "data/packed/"]
)
def test_what_has_no_home_sign_stays_as_it_is(text: str) -> None:
    """Byte for byte: keys of runs are made of these texts."""
    assert user_place(text) == text
    assert user_path(text) == Path(text)


def test_the_home_folder(home: Path) -> None:
    assert user_path("~") == home
    assert user_path("~/a/b") == home / "a" / "b"
    assert user_path(Path("~/a")) == home / "a"
    assert user_place("~/a/") == f"{home}/a/"
    assert user_path("~root/a") == Path("~root").expanduser() / "a"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "--out: is empty; name a file or folder"),
        ("a\0b", "--out 'a\\x00b': has a NUL character, which no path may have; write it again"),
        (
            NOBODY,
            f"--out '{NOBODY}': there is no such home folder; write the whole path, or ./{NOBODY} for that very name",
        ),
    ],
)
def test_what_is_no_path(text: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        user_path(text, "--out")
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b'{"a": "\\ud800"}',
            "surrogates not allowed",
        ),  # an own `json.loads` takes it, and no file can be written of it
        ('{"a": 1}'.encode("utf-16"), "can't decode byte 0xff"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "expected an object, got [1]"),
        (b'{"a": "b", "c": 1}', "c: expected a text, got 1"),
    ],
)
def test_what_is_no_json_object_of_texts(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_json(content, json_texts)
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', json_texts) == {"a": "\U0001f600"}


def script(name: str) -> Callable[[list[str]], object]:
    spec = importlib.util.spec_from_file_location(name, CLONE / "shards" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], object] = module.main
    return main


COMMANDS: dict[str, tuple[Callable[[list[str]], object], list[str], list[str]]] = {
    "evaluate": (evaluate.main, ["--baseline", "bicubic", "--scale", "4", "--data", "x"], ["--data", "--save-images"]),
    "evaluate run": (evaluate.main, ["--data", "x"], [""]),
    "demo": (demo.main, [], ["--out", "--data"]),
    "demo_gan": (demo_gan.main, [], ["--out"]),
    "pack": (script("pack"), ["folder"], ["--source", "--out"]),
    "fetch": (script("fetch"), ["folder"], ["--from", "--out"]),
    "stage": (script("stage"), ["x"], ["--to"]),
    "stage set": (script("stage"), ["--to", "x"], [""]),
    "verify": (script("verify"), [], [""]),
    "verify from": (script("verify"), ["x", "--repair"], ["--from"]),
    "submit": (submit.main, [], ["--folder"]),
    "submit grid": (submit.main, ["--dry-run", "--local"], [""]),
    "status": (status_command.main, [], ["--folder", "--runs"]),
    "collect": (collect.main, [], ["--out", "--folder", "--data-root", ""]),
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, _, options) in COMMANDS.items() for option in options]
)
@pytest.mark.parametrize("text", [NOBODY, ""])
def test_every_path_on_a_command_line(
    name: str, option: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder that there is not shows who reads it; an unset variable of the shell leaves an empty text."""
    monkeypatch.chdir(tmp_path)
    main, before, _ = COMMANDS[name]
    with pytest.raises(UserError, match="is empty" if text == "" else "there is no such home folder"):
        main([*before, option, text] if option else [text, *before])
    assert not list(tmp_path.iterdir())


def test_no_command_reads_a_path_by_itself() -> None:
    files = [file for folder in ("hpcdistill", "shards", "slurm", "bench") for file in (CLONE / folder).rglob("*.py")]
    wrong = [str(file) for file in files if re.search(r"type=(pathlib\.)?Path\b", file.read_text(encoding="utf-8"))]
    assert wrong == []


def test_every_path_of_a_configuration(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDISTILL_DATA", "~/data")
    (home / "base.yaml").write_text(BASE)
    (home / "teacher.yaml").write_text("name: teacher\nmethod: {name: plain_sr, scale: 4}\n")
    (tmp_path / "a.yaml").write_text(
        "extends: ~/base.yaml\nruns: ~/runs\nteacher: {config: ~/teacher.yaml}\ninit: {student: ~/s.safetensors}\n"
        "data: {train: ['~/a', 'https://host/~me/b', '${oc.env:HPCDISTILL_DATA}/c'], eval: {set: ~/e}}\n"
        "train: {deepspeed: ~/zero.json}\n"
    )
    loaded = load_run([str(tmp_path / "a.yaml"), "data.stage=~/scratch"])
    config = loaded.config
    assert config.data.train == (f"{home}/a", "https://host/~me/b", f"{home}/data/c")
    assert (config.data.eval["set"], config.data.stage) == (f"{home}/e", f"{home}/scratch")
    assert (config.runs, config.init["student"]) == (f"{home}/runs", f"{home}/s.safetensors")
    assert config.train.deepspeed == f"{home}/zero.json"
    assert loaded.teacher is not None
    assert loaded.teacher.config.name == "teacher"
    assert load_run(["~/base.yaml", "data.train=~/x", "runs=~/y"]).config.data.train == (f"{home}/x",)


@pytest.mark.parametrize(
    ("section", "key"), [("teacher: {config: X}", "teacher"), ("teachers: {older: {config: X}}", "teachers.older")]
)
def test_what_is_no_path_of_a_teacher(section: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE + section.replace("X", NOBODY))
    with pytest.raises(UserError, match=rf"a\.yaml: {re.escape(key)}\.config: '{NOBODY}': there is no such home"):
        load_run([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text(BASE + section.replace("X", "''"))
    with pytest.raises(UserError, match=rf"a\.yaml: {re.escape(key)}\.config: is empty"):
        load_run([str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("key", ["runs", "data.train", "data.eval.x", "data.stage", "init.student", "train.deepspeed"])
def test_what_is_no_path_in_a_configuration(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.yaml").write_text(BASE)
    line = rf"command line.*: {re.escape(key)}.*: '{NOBODY}': there is no such home folder"
    with pytest.raises(UserError, match=line):
        load_run([str(tmp_path / "a.yaml"), f"{key}={NOBODY}"])
    with pytest.raises(UserError, match=rf"{re.escape(key)}.*: .*is empty; name a file or folder"):
        load_run([str(tmp_path / "a.yaml"), f"{key}=''"])


def test_the_home_sign_changes_no_run(home: Path, tmp_path: Path) -> None:
    """A run whose data are named by `~` is the run whose data are named by the whole path."""
    (tmp_path / "a.yaml").write_text(BASE)
    base = str(tmp_path / "a.yaml")
    write_set(home / "set", "lr-hr", [{"hr.png": noise(24, 24, 1), "lr4.png": noise(6, 6, 2)}])
    short, whole = (
        load_run([base, f"data.train={root}/set", f"data.eval.s={root}/set", f"runs={root}/runs"])
        for root in ("~", home)
    )
    assert short.identity == whole.identity
    assert short.key == whole.key
    assert short.folder == whole.folder


def test_profiles_grids_and_recipes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "mine.yaml").write_text("parallel: 3\n")
    assert load_profile("~/mine.yaml").parallel == 3
    grid = "metrics: {psnr: {of: a/b/psnr, better: higher}}\nbase: base.yaml\ncells: [{labels: {x: y}}]\n"
    (home / "grid.yaml").write_text(grid)
    (home / "both.yaml").write_text("include: [~/grid.yaml]\n")
    assert [grid.name for grid in load_grids(["~/both.yaml"])] == ["grid"]
    recipe = "name: own\ntitle: t\nlicence: l\norigin: o\nlayouts: [{all: {hr: HR}}]\n"
    (home / "own.yaml").write_text(recipe)
    assert load_recipe("~/own.yaml").name == "own"
    (home / "wrong.yaml").write_text(recipe.replace("HR", "~/HR"))
    with pytest.raises(UserError, match="'~/HR' leads out of the source's folder"):
        load_recipe("~/wrong.yaml")


def test_an_empty_data_root_is_not_the_root_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(BASE + "data: {train: '${oc.env:HPCDISTILL_DATA,data/packed}/photos/train'}\n")
    monkeypatch.setenv("HPCDISTILL_DATA", "")
    with pytest.raises(UserError, match="HPCDISTILL_DATA: is empty"):
        load_run([str(tmp_path / "a.yaml")])


def test_two_threads_that_write_one_file_each_have_their_own(tmp_path: Path) -> None:
    path = tmp_path / "features"
    with replacing(path) as temporary:
        temporary.write_bytes(b"one")
        other = threading.Thread(target=write_bytes, args=(path, b"the other"))
        other.start()
        other.join()
        assert path.read_bytes() == b"the other"
        assert temporary.read_bytes() == b"one"
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
