"""The program `hpcdistill`: every command behind one word, a list that answers at once, and what `import` shows."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hpcdistill
from hpcdistill import __main__ as front_door
from hpcdistill.__main__ import COMMANDS, Command
from hpcdistill.command import program, run_command
from hpcdistill.deploy.model import load
from hpcdistill.errors import UserError

CLONE = Path(__file__).resolve().parents[1]
MODULES = {command.module for command in COMMANDS.values()}
HEAVY = {"torch", "numpy", "pydantic", "yaml", "accelerate", "PIL", "huggingface_hub", "submitit"}


def started(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=CLONE, capture_output=True, text=True)


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_says_what_it_takes(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # the demos set them
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as ended:
        front_door.main([word, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hpcdistill {word} ")


@pytest.mark.parametrize("word", COMMANDS)
@pytest.mark.parametrize("option", ["--no-such-option", "--no-such-option=\n1"])
def test_a_wrong_option_is_one_line(
    word: str, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # the demos set them
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "argv", ["hpcdistill", word, option])
    with pytest.raises(SystemExit) as ended:
        run_command(front_door.main)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert re.fullmatch(rf"error: .+; see hpcdistill {word}( \w+)? --help", line)


def test_a_wrong_option_of_a_part_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as refused:
        front_door.main(["benchmark", "cost", "--jsn", "configs/fsrcnn/x4.yaml"])
    assert str(refused.value) == "unrecognized arguments: --jsn; see hpcdistill benchmark --help"
    with pytest.raises(
        UserError, match=r"--rounds: 0: must be a whole number.*; see hpcdistill benchmark latency --help"
    ):
        front_door.main(["benchmark", "latency", "pretrained:x4", "--rounds", "0"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_list_has_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main(words) == 0
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert listed == {word: command.about for word, command in COMMANDS.items()}
    assert all(len(about) + 13 <= 100 for about in listed.values())


def test_the_list_imports_nothing_heavy() -> None:
    script = (
        "import json, sys; from hpcdistill.__main__ import main; main(['--help']); "
        "sys.stderr.write(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(started("-c", script).stderr))
    assert "hpcdistill.__main__" in loaded
    assert not loaded & HEAVY
    assert not loaded & MODULES


def is_a_command(source: str) -> bool:
    """Whether a module parses a command line, runs as a program, or has a `main` of words, however that is written."""
    tree = ast.parse(source)
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in called}
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    of_words = [ast.unparse(argument.annotation or ast.Tuple([])) for main in mains for argument in main.args.args]
    return bool(names & {"ArgumentParser", "Parser", "run_command"}) or of_words == ["list[str]"]


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("def main(words: list[str]) -> int: ...", True),
        ("def main(\n    anything: list[str],\n) -> None:\n    ...", True),
        ("if __name__ == '__main__':\n    run_command(begin)", True),
        ("def begin(given):\n    return argparse.ArgumentParser().parse_args(given)", True),
        ("def main(text: str) -> None: ...\nif __name__ == '__main__':\n    main(sys.argv[1])", False),
        ("from hpcdistill.command import Parser, run_command\nimport argparse", False),
    ],
)
def test_what_is_a_command(source: str, command: bool) -> None:
    assert is_a_command(source) == command


def test_no_command_is_left_out() -> None:
    """A new command in the package, or a new script of the clone, needs a line in the table."""
    paths = {
        ".".join(path.relative_to(CLONE).with_suffix("").parts): path for path in (CLONE / "hpcdistill").rglob("*.py")
    }
    machinery = {"hpcdistill.__main__", "hpcdistill.command"}
    found = {name for name, path in paths.items() if is_a_command(path.read_text("utf-8"))}
    assert found - machinery == MODULES
    for name in MODULES:  # its errors would be several lines
        assert "ArgumentParser" not in paths[name].read_text("utf-8")
    scripts = [path for folder in ("shards", "slurm") for path in (CLONE / folder).glob("*.py")]
    assert len(scripts) >= 7
    for script in scripts:
        ran = re.search(r"^from (hpcdistill\.[\w.]+) import main$", script.read_text("utf-8"), re.MULTILINE)
        assert ran, f"{script.name}: is to call a main of the package, and no more"
        assert ran.group(1) in MODULES


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (("-m", "hpcdistill", "stage"), "python -m hpcdistill stage"),
        (("-m", "hpcdistill.stage"), "python -m hpcdistill.stage"),
        (("shards/stage.py",), "python shards/stage.py"),
        (("-c", "import sys; from hpcdistill.__main__ import run; run()", "stage"), "hpcdistill stage"),
    ],
)
def test_usage_lines_say_what_was_typed(words: tuple[str, ...], usage: str) -> None:
    done = started(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {usage} [-h]")


def test_the_console_script_is_the_program() -> None:
    scripts = tomllib.loads((CLONE / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts.pop("hpcdistill").partition(":")
    assert scripts == {}
    assert getattr(importlib.import_module(module), function) is front_door.run


def test_called_from_python_a_command_has_the_programs_name() -> None:
    assert program("train") == "hpcdistill train"


def test_mistakes_and_exit_codes() -> None:
    done = started("-m", "hpcdistill", "evalute", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: hpcdistill evalute: no such command; did you mean 'evaluate'?\n"
    done = started("-m", "hpcdistill", "verify", "/nowhere")  # a user's error of a command is its own
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", [None, 0, 1, 75])
def test_a_commands_exit_code_is_the_programs(code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    module = type(sys)("hpcdistill_made_up")
    module.begin = lambda arguments: given.append(arguments) or code  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpcdistill_made_up", module)
    monkeypatch.setitem(front_door.COMMANDS, "made", Command("hpcdistill_made_up", "", "begin"))
    monkeypatch.setattr(sys, "argv", ["hpcdistill", "made", "--x", "1"])
    with pytest.raises(SystemExit) as ended:
        run_command(front_door.main)
    assert ended.value.code == (code or 0)
    assert given == [["--x", "1"]]


def test_the_demos_ask_for_few_threads_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys; from hpcdistill.__main__ import main\n"
        "try: main(['demo-gan', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert started("-c", script).stdout.splitlines()[-1] == "False PASSIVE"


@pytest.mark.parametrize("word", [word for word, command in COMMANDS.items() if command.needs])
def test_without_the_clone(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = COMMANDS[word].needs
    assert needed is not None
    assert (CLONE / needed).is_dir()
    monkeypatch.setattr(front_door, "CLONE", tmp_path)
    with pytest.raises(UserError, match=f"{needed} of hpcdistill's clone"):
        front_door.main([word])


def test_the_package_shows_what_python_uses() -> None:
    assert set(hpcdistill.__all__) <= set(dir(hpcdistill))
    assert hpcdistill.load is load
    assert hpcdistill.UserError is UserError
    assert next(iter(inspect.signature(hpcdistill.load).parameters)) == "model"
    assert "pretrained:x4" in (inspect.getdoc(hpcdistill.load) or "")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        getattr(hpcdistill, "lode")  # noqa: B009 - a type checker would refuse it


def test_the_package_is_light() -> None:
    script = "import sys, hpcdistill; assert 'load' in dir(hpcdistill); print(sorted(sys.modules))"
    loaded = started("-c", script).stdout
    assert "'hpcdistill'" in loaded
    assert "'torch'" not in loaded
