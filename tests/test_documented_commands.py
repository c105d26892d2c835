"""Every command of README.md and docs/*.md is run: through its own parser, and its files, recipes and overrides read.

What cannot be run here stands in NOT_RUN with the reason; an entry that no page needs any more is an error too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from accelerate import Accelerator

from hpcdistill.__main__ import COMMANDS as FRONT_DOOR
from hpcdistill.__main__ import main as front_door
from hpcdistill.config import split_runs
from hpcdistill.data.fetch.weights import WEIGHTS
from hpcdistill.data.pack.fetching import wanted_at
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.errors import UserError
from hpcdistill.run import load_run
from hpcdistill.sweep.crop import parse_crop
from hpcdistill.sweep.grid import load_grids
from hpcdistill.training.metrics_log import MetricsLog
from hpcdistill.yaml_values import load_yaml

CLONE = Path(__file__).resolve().parents[1]
PAGES = [CLONE / "README.md", *sorted((CLONE / "docs").glob("*.md")), CLONE / "bench/README.md"]

# What is not run, and why. The whole command as the page has it, without its comment.
NOT_RUN = {
    "git clone <this repository>": "the address is the reader's",
    "cd hpcdistill": "the folder that git clone makes",
    ". .venv/bin/activate": "the environment that make install makes",
    "pip install --no-deps stlpips-pytorch": "a package that the lock leaves out: its licence is not clear",
    "scancel --signal=USR1 JOB": "SLURM's own; tests/slurm runs it",
    "scancel --full --signal=TERM JOB": "SLURM's own; tests/slurm runs it",
    "scancel JOB": "SLURM's own; tests/slurm runs it",
    "tensorboard --logdir runs": "TensorBoard's own: a server that does not end",
    "scontrol requeue": "the name of a SLURM command, not a whole one",
    "scontrol requeue JOB": "SLURM's own; tests/slurm runs it",
    "accelerate launch": "the name of a launcher, not a whole command",
    "accelerate launch --cpu --num_processes 2": "what is not to be used: the text says what happens",
}
# Words that stand for something of the reader's.
PLACEHOLDERS = {
    "CONFIG": "configs/dssd/x4.yaml",
    "VARIANT": "configs/variants/cpu.yaml",
    "key=value": "seed=1",
    "RECIPE": "set5",
    "GRID": "dssd-1",
    "DIR": "data/packed/set5",
    "mine": "default",  # a profile, slurm/clusters/mine.yaml
}
# What a reader brings along, or a scratch folder: not in the clone, and made by none of its commands.
READERS = {"my_photographs", "my_test_photographs", "cats2dogs", "maps", "MY_COPY", "SCRATCH", "data/packed/mine"}
READERS |= {"data/packed/cats2dogs", "data/packed/maps"}
# Images, those that a model has made of them, and the sets that are packed of both.
READERS |= {"horses/trainA", "horses/made", "edges", "made", "shoes_taught", "data/packed/taught/train"}
READERS |= {"data/packed/horse2zebra-taught/train", "data/packed/edges2shoes-r-taught"}
READERS |= {"data/packed/edges2shoes-r-taught/train"}
# Of docs/results: the images that were measured with, and sets packed of a hundred real pairs.
READERS_OF_RESULTS = {"sr_train", "Set5", "data/packed/e2s/train", "data/packed/e2s/test"}
READERS_OF_RESULTS |= {"data/packed/m2p/train", "data/packed/m2p/test", "data/packed/s2w/train", "data/packed/s2w/test"}
# The demo makes them.
READERS_OF_RESULTS |= {"runs/demo-gan/packed/train", "runs/demo-gan/packed/test"}
PROGRAMS = {"hpcdistill", "python", ".venv/bin/python", "torchrun", "accelerate", "srun", "sbatch", "make", "pip"}
PROGRAMS |= {"export"}
OTHERS = {
    "git",
    "cd",
    ".",
    "scancel",
    "scontrol",
    "squeue",
    "sacct",
    "tensorboard",
    "bash",
    "sh",
    "for",
    "docker",
    "curl",
}
ROOMS = ("configs", "shards", "slurm", "bench", "docs", "hpcdistill", "tests")
SECTIONS = ("train", "data", "eval", "method", "teacher", "teachers", "init")
# An override has to fit one of them.
METHODS = (
    "dssd/x4",
    "fsrcnn/x4",
    "fesd/horse2zebra",
    "fesd/edges2shoes",
    "dcd/horse2zebra",
    "omgd/horse2zebra",
    "wavelet_kd/horse2zebra",
    "taught/horse2zebra",
)


class Command(NamedTuple):
    page: str
    text: str


class Parsed(Exception):
    """Raised in place of running, with what the command's own parser made of its words."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


def blocks(text: str) -> Iterator[str]:
    """Fenced and indented blocks."""
    yield from re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?:^(?: {4}.*|\s*)\n)+", text, re.MULTILINE):
        yield re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


def commands_of(text: str) -> Iterator[str]:
    """The commands of a page, as they stand there, without comments."""
    for block in blocks(text):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        if not any(is_command(line) for line in lines):
            continue  # a file or a listing of folders
        for line in lines:
            line = re.sub(r"(^|\s)#\s.*", "", line).strip()
            for part in re.split(r"\s+&&\s+", line):
                if part:
                    yield part
    for code in re.findall(r"`([^`\n]+)`", text):
        if is_command(code) and " " in code:
            yield code


def is_command(line: str) -> bool:
    words = line.split()
    return bool(words) and (
        words[0] in PROGRAMS | OTHERS or re.fullmatch(r"(shards|slurm|bench)/\w+\.py", words[0]) is not None
    )


COMMANDS = list(
    dict.fromkeys(Command(page.name, text) for page in PAGES for text in commands_of(page.read_text("utf-8")))
)


def forms(text: str) -> list[str]:
    """A usage line's forms: without what stands in brackets, and with each choice of it."""
    optional = re.findall(r"\s\[([^\]]*)\]", text)
    bare = re.sub(r"\s\[[^\]]*\]", "", text)
    choices = [choice.replace("...", "").strip() for words in optional for choice in words.split("|")]
    return [bare, *(f"{bare} {choice}" for choice in choices)]


RUN = [command for command in COMMANDS if command.text not in NOT_RUN]


@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.page}: {command.text}")
def test_a_documented_command(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CLONE)
    monkeypatch.delenv("HPCDISTILL_DATA", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for form in forms(command.text):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(os.path.expandvars(form))]
        check(words, tmp_path)


def check(words: list[str], tmp_path: Path) -> None:
    """Run one command as far as it goes without training, fetching or submitting."""
    program, *rest = words
    if program in ("python", ".venv/bin/python"):
        python(rest, tmp_path)
    elif program == "hpcdistill":
        python(["-m", "hpcdistill", *rest], tmp_path)
    elif program.endswith(".py"):
        python(words, tmp_path)
    elif program == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(rest)
        python(["-m" if options.module else "", options.training_script, *options.training_script_args], tmp_path)
    elif program == "accelerate":
        launch(rest, tmp_path)
    elif program in ("srun", "sbatch"):
        left = [word for word in rest if not re.fullmatch(r"--[a-z-]+=\S+", word)]
        assert left[0] in ("python", "hpcdistill", "slurm/train.sbatch"), left
        assert (CLONE / "slurm/train.sbatch").is_file()
        check(["hpcdistill", "train", *left[1:]] if left[0] == "slurm/train.sbatch" else left, tmp_path)
    elif program == "make":
        targets = {word for word in rest if "=" not in word}  # the others are variables
        assert targets <= make_targets(), f"make has no target {targets}"
    elif program == "pip":
        installable(rest)
    elif program == "export":
        name = rest[0].partition("=")[0]
        sources = [path.read_text("utf-8") for path in (CLONE / "hpcdistill").rglob("*.py")]
        assert any(f'"{name}"' in source for source in sources), f"nothing reads {name}"
    else:
        pytest.fail(f"{shlex.join(words)}: nothing here runs it; say why in NOT_RUN")


def launch(words: list[str], tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    if options.config_file:
        load_config_from_file(options.config_file)
    python(["-m" if options.module else "", options.training_script, *options.training_script_args], tmp_path)


def python(words: list[str], tmp_path: Path) -> None:
    """A module, or a script of the clone, by its own `main` in this process."""
    words = [word for word in words if word]
    if words[:3] == ["-m", "pytest", "-m"]:
        settings = tomllib.loads((CLONE / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
        assert len(words) == 4
        assert words[3] in {mark.partition(":")[0] for mark in settings["markers"]}
        return
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if name == "hpcdistill":
        if not arguments or arguments[0].startswith("--"):
            assert front_door(arguments) == 0
            return
        command, *arguments = arguments
        assert command in FRONT_DOOR, f"hpcdistill has no command {command}"
        name = FRONT_DOOR[command].module
    main = module(name).main
    command = command_of(main, name)
    if command == "sweep":  # it has a dry run, which reads everything and writes nothing
        try:
            assert main([*arguments, "--dry-run", "--folder", str(tmp_path)]) == 0
        except UserError as error:
            if "hpcdistill prefetch" not in str(error):  # the data are not here, and it says how to get them
                raise
        return
    options = parsed(main, arguments)
    CHECKS.get(command, lambda options: None)(options)


def command_of(main: Callable[[list[str]], object], name: str) -> str:
    """The word of the program `hpcdistill` for what a module or a script runs; its name where there is none."""
    words = {command.module: word for word, command in FRONT_DOOR.items()}
    return words.get(main.__module__, words.get(name, name))


@cache
def module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = CLONE / name
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec, name
    assert spec.loader, name
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(path.parent))
    return loaded


def parsed(main: Callable[[list[str]], object], arguments: list[str]) -> argparse.Namespace:
    """What the command's parser makes of them; it is stopped there."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, method)

            def stop(
                self: argparse.ArgumentParser, *given: object, original: Callable[..., argparse.Namespace] = original
            ) -> None:
                raise Parsed(original(self, *given))

            patch.setattr(argparse.ArgumentParser, method, stop)
        try:
            main(arguments)
        except Parsed as result:
            return result.options
        except UserError as error:
            pytest.fail(f"{shlex.join(arguments)}: refused by the command line's parser ({error})")
    pytest.fail("the command has read no command line")


RESULTS = sorted(path for path in (CLONE / "docs/results").glob("*.md") if "python " in path.read_text("utf-8"))
STUBS = "".join(
    f'{program}() {{ printf "%q " {program} "$@"; echo; }}\n'
    for program in sorted(PROGRAMS - {"export", ".venv/bin/python"})
)


def expanded(script: str, folder: Path) -> list[list[str]]:
    """The commands that a shell makes of a script with loops and variables; nothing is started."""
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-c", STUBS + script], cwd=folder, env={"PATH": ""}, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.name)
def test_the_commands_behind_results(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of what was run, and a queue of what is to be: with loops, so a shell takes them apart."""
    monkeypatch.chdir(CLONE)
    monkeypatch.delenv("HPCDISTILL_DATA", raising=False)
    text = page.read_text("utf-8")
    scripts = [block for block in blocks(text) if any(is_command(line) for line in block.splitlines())]
    scripts += [code for code in re.findall(r"`([^`\n]+)`", text) if is_command(code) and " " in code]
    commands = {tuple(words) for script in scripts for words in expanded(script, tmp_path)}
    assert commands
    for words in sorted(commands):
        if words[1].startswith("docs/"):
            assert (CLONE / words[1]).is_file()  # it makes the page's tables of run folders
        else:
            check(list(words), tmp_path)


# What the words mean


def check_train(options: argparse.Namespace) -> None:
    words = [word for word in options.config if not is_run(Path(word))]
    if not words:
        return
    for run in split_runs(words):
        config = load_run(run).config
        for place in [*config.data.train, *config.data.eval.values()]:
            known_place(place)


def check_prefetch(options: argparse.Namespace) -> None:
    check_train(options)
    assert set(options.weights) <= set(WEIGHTS)


def check_benchmark(options: argparse.Namespace) -> None:
    if options.command == "cost":
        check_train(options)
        return
    overrides = [word for word in options.models if "=" in word]
    for word in options.models:
        if word.endswith(".yaml"):
            load_run([word, *overrides])
        elif word not in overrides:
            assert word == "pretrained:x4" or is_run(Path(word)), word
    if options.data is not None:
        known_place(str(options.data))


def check_fetch(options: argparse.Namespace) -> None:
    names = [options.recipe] if isinstance(options.recipe, str) else options.recipe
    for name in names:
        assert set(options.parts) <= set(load_recipe(name).parts)
    assert len(names) == 1 or not (options.origin or options.out or options.parts)


def check_pack(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe)
    assert options.source or recipe.builtin or (options.a and options.b)
    for place in (options.source, options.a, options.b, options.out):
        if place is not None:
            known_place(str(place))


def check_evaluate(options: argparse.Namespace) -> None:
    assert all(map(is_model, options.models)), options.models
    known_place(str(options.data))


def check_figures(options: argparse.Namespace) -> None:
    assert all(map(is_model, options.models)), options.models
    for crop in options.crop:
        parse_crop(crop)
    known_place(str(options.images))


def check_grids(options: argparse.Namespace) -> None:
    words = getattr(options, "grid", None) or ()
    load_grids([word for word in words if "=" not in word and not word.startswith("configs/variants/")])


CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": check_train,
    "prefetch": check_prefetch,
    "benchmark": check_benchmark,
    "evaluate": check_evaluate,
    "figures": check_figures,
    "fetch": check_fetch,
    "pack": check_pack,
    "verify": lambda options: [known_place(str(place)) for place in options.folders] and None,
    "stage": lambda options: [known_place(str(place)) for place in options.places] and None,
    "status": check_grids,
    "collect": check_grids,
}


def is_run(path: Path) -> bool:
    """A run's folder, or its config, as a page writes it: runs/<name of a configuration>-<8 hex>."""
    if re.match(r"(sweeps/tasks/<key>|runs/\.\.\.)/config\.\w+$", str(path)):
        return True
    match = re.fullmatch(r"runs/([\w-]+)-[0-9a-f]{8}", str(path))
    return match is not None and match.group(1) in run_names()


def is_model(word: str) -> bool:
    """A run's folder, weights that are shipped or converted, or pictures of the reader's, with a label or without."""
    path = word.rpartition("=")[2]
    if path.startswith("pretrained:"):
        return pretrained_file(path).is_file()
    return path in ("my_pictures", "their_pictures", "pruned.safetensors") or is_run(Path(path))


@cache
def run_names() -> set[str]:
    files = [
        path
        for path in (CLONE / "configs").glob("*/*.yaml")
        if path.parent.name in ("dssd", "pisr", "fsrcnn", "fesd", "original")
    ]
    variants = [load_yaml(path.read_text("utf-8")) for path in (CLONE / "configs/variants").glob("*.yaml")]
    named = {str(values["name"]) for values in variants if "name" in values}
    return named | {load_run([str(path)]).config.name for path in files}


def known_place(place: str) -> None:
    """A data set that a recipe makes, something of the clone or of the reader, or an address."""
    if place in READERS | READERS_OF_RESULTS or place.startswith(("https://", "/")) or (CLONE / place).exists():
        return
    folder = Path(place)
    whole = folder.parent == Path("data/packed") and folder.name in {
        path.stem for path in CLONE.glob("shards/recipes/*")
    }
    assert whole or wanted_at(folder) is not None, f"{place}: nothing makes it, and no reader has it"


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (CLONE / "Makefile").read_text("utf-8"), re.MULTILINE))


def installable(words: list[str]) -> None:
    """`pip install` of what the lock has, or of the clone itself with one of its extras."""
    assert words[0] == "install"
    project = tomllib.loads((CLONE / "pyproject.toml").read_text("utf-8"))["project"]
    locked = re.findall(r"^([\w.-]+)==", (CLONE / "requirements.lock").read_text("utf-8"), re.MULTILINE)
    for word in words[1:]:
        if word == "-e":
            continue
        own = re.fullmatch(r"\.\[([\w,]+)\]", word)
        if own:
            assert set(own.group(1).split(",")) <= set(project["optional-dependencies"])
        else:
            assert word in locked, f"{word}: not in requirements.lock, and this project is in no registry"


# What the pages rest on


def test_make_alone_lists_every_target() -> None:
    """And does nothing else: it once trained the demo."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(["make"], cwd=CLONE, env=outside, capture_output=True, text=True, check=True)
    listed = [re.fullmatch(r"make ([a-z-]+) +\S.*", line) for line in done.stdout.splitlines()]
    assert all(listed), done.stdout
    assert {line.group(1) for line in listed if line} == make_targets()


def test_trackers_write_where_the_page_says(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    MetricsLog(tmp_path / "metrics.jsonl", accelerator).start_trackers(0)
    for tracker in accelerator.trackers:
        tracker.finish()
    (folder,) = (path.name for path in tmp_path.iterdir())
    assert f"\n    {folder}/ " in (CLONE / "docs/training.md").read_text("utf-8")


# The lists above


def test_nothing_is_left_out_without_need() -> None:
    texts = {command.text for command in COMMANDS}
    assert not set(NOT_RUN) - texts, "no page has these any more"
    parts = (r"[\s\[\]|]+", r"[\s\[\]|{}:'=]+")
    words = {word for text in texts for part in parts for word in re.split(part, text)}
    assert not set(PLACEHOLDERS) - words
    assert not READERS - words


def test_commands_are_found() -> None:
    """The extraction itself: a page's commands, in whatever form it has them."""
    page = """
    python -m hpcdistill.train a.yaml \\
      b.yaml          # why
    # a comment
    cd x && make demo

text `python shards/pack.py x` and `not one`

    key: value
    other: python

```bash
make test
```
"""
    found = ["make test", "python -m hpcdistill.train a.yaml b.yaml", "cd x", "make demo", "python shards/pack.py x"]
    assert list(commands_of(page)) == found
    assert forms("python x.py [A ...] [--b | --c d]") == [
        "python x.py",
        "python x.py A",
        "python x.py --b",
        "python x.py --c d",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8")):
        for word in code.split():
            if word.split("/")[0] not in ROOMS or "/" not in word or "<" in word or "mine" in word:
                continue
            braces = re.search(r"\{([^}]*)\}", word)
            names = (
                [word.replace(braces.group(), choice) for choice in braces.group(1).split(",")] if braces else [word]
            )
            missing += [name for name in names if not any(any(place.glob(name)) for place in (CLONE, CLONE / "tests"))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_that_a_page_names_load(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CLONE)
    refused = []
    for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8")):
        override = re.fullmatch(rf"'?((?:{'|'.join(SECTIONS)})\.[\w.-]+=[^\s']+)'?", code)
        if override and "..." not in code and not any(loads(method, override.group(1)) for method in METHODS):
            refused.append(code)
    assert not refused


def loads(method: str, override: str) -> bool:
    try:
        load_run([f"configs/{method}.yaml", override])
    except UserError:
        return False
    return True
