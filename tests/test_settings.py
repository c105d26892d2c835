"""Every field of every configuration takes what it means, or says in one line what it expected."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from hpcdistill.command import positive, whole
from hpcdistill.config import RunConfig
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.methods.settings import config_class
from hpcdistill.run import load_run
from hpcdistill.settings import Section, identity_values
from hpcdistill.sweep.estimates import Estimates, load_estimates
from hpcdistill.sweep.grid_file import GridFile, read_grid_file
from hpcdistill.sweep.profile import Profile, load_profile

CLONE = Path(__file__).resolve().parents[1]
ODD = (
    *(".inf", "-.inf", ".nan", "on", "true", "9223372036854775808", "-1", "1e30", "010", "1_000", "1:30", "null"),
    *("[1]", "[[1]]", "{}", "{x: 1}", "x" * 300, '"\\0"', '"\\ud800"', "2026-11-30", "9" * 5000, "${nowhere}"),
)
SMALL = {
    "cyclegan": "{generator: {ngf: 4, blocks: 1}, ndf: 4}",
    "pix2pix": "{generator: {ngf: 4, levels: 3}, ndf: 4}",
    "distilled_gan": "{teacher: {ngf: 4, blocks: 1}, student: {ngf: 4, blocks: 1}, ndf: 4}",
    "wavelet_kd": "{student: {ngf: 4, blocks: 1}, ndf: 4}",
    "omgd": "{family: pix2pix, teacher: {ngf: 4, levels: 3}, student: {ngf: 4, levels: 3}, deep: {ngf: 4, levels: 3}}",
}


def leaves(section: type[Section], before: str = "") -> Iterator[tuple[str, str]]:
    """The keys of `section` that are no sections themselves, and what each takes."""
    for name, field in section.model_fields.items():
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        sections = [kind for kind in inner if issubclass(kind, Section)]
        if sections and name != "method":
            yield from leaves(sections[0], f"{before}{name}.")
        elif name != "method":
            yield f"{before}{name}", repr(field)


CASES = [("plain_sr", key) for key, _ in leaves(RunConfig)]
# What several methods have alike is tried with one of them.
METHOD_FIELDS = {leaf: name for name in METHODS for leaf in leaves(config_class(name), "method.")}
CASES += [(name, key) for (key, _), name in METHOD_FIELDS.items()]


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small configuration of each method."""
    folder = tmp_path_factory.mktemp("methods")
    for name in METHODS:
        method = SMALL.get(name, "{scale: 2}").replace("{", f"{{name: {name}, ", 1)
        teacher = "teacher: {config: privileged_teacher.yaml}\n" if name == "privileged_student" else ""
        (folder / f"{name}.yaml").write_text(f"{teacher}method: {method}\n")
    return {name: str(folder / f"{name}.yaml") for name in METHODS}


@pytest.mark.parametrize(("method", "key"), CASES)
def test_an_odd_value_of_a_run_is_taken_or_refused_in_one_line(
    configurations: dict[str, str], method: str, key: str
) -> None:
    for value in ODD:
        said = ""
        try:
            load_run([configurations[method], f"{key}={value}"]).untrained()
        except UserError as error:
            said = str(error)
        assert not said or key.split(".")[-1] in said or "teacher" in said, f"{key}={value}: {said}"


@pytest.mark.parametrize(
    ("model", "read"), [(Profile, load_profile), (GridFile, read_grid_file), (Estimates, load_estimates)]
)
def test_an_odd_value_of_another_file_is_taken_or_refused_in_one_line(tmp_path: Path, model: Any, read: Any) -> None:
    for key in (
        *(key for key, _ in leaves(model)),
        "sbatch.x",
        "environment.X",
        "shapes.x.hours",
        "metrics.a.digits",
        "samples.x",
    ):
        *sections, last = key.split(".")
        for value in ODD:
            path = tmp_path / "odd.yaml"
            path.write_text("".join(f"{'  ' * n}{part}:\n" for n, part in enumerate(sections)))
            with path.open("a") as file:
                file.write(f"{'  ' * len(sections)}{last}: {value}\n")
            with contextlib.suppress(UserError):
                read(str(path) if read is load_profile else path)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["name", "roots", "images", "downloads", "kind", "layouts"])
def test_an_odd_value_of_a_recipe_is_taken_or_refused_in_one_line(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "odd.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(UserError):
        load_recipe(str(tmp_path / "odd.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.optimizer.learning_rate", ".inf", "expected a finite number"),
        ("method.optimizer.eps", ".inf", "expected a finite number"),
        ("method.optimizer.eps", "2", "expected less than or equal to 1"),
        ("method.optimizer.betas", "[0.9, 1.5]", "expected less than 1"),
        ("method.optimizer.betas", "[0.9]", "missing"),
        ("train.batch_size", "on", "expected a valid integer"),
        ("train.batch_size", "true", "expected a number, got true"),
        ("train.batch_size", "9223372036854775808", "expected less than or equal to"),
        ("train.steps", "010", "no 0 in front"),
        ("train.steps", "1_000", "plain digits"),
        ("train.epochs", "1:30", "plain digits"),
        ("train.epochs", "true", "expected a number, got true"),
        ("train.threads", "100000", "expected less than or equal to 1024"),
        ("runs", "true", "expected text; put it in quotes"),
        ("runs", '"a\\0b"', "NUL"),
        ("name", "n" * 300, "at most 200 characters"),
    ],
)
def test_the_error_says_what_was_expected(configurations: dict[str, str], key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=f"command line: {key}.*{message}"):
        load_run([configurations["plain_sr"], f"{key}={value}"])


@pytest.mark.parametrize("text", ["0712", "1:30", "1_000", "on", "1e5", "1.10", "123", "0x10", "2026-11-30"])
def test_text_is_as_it_is_written(configurations: dict[str, str], tmp_path: Path, text: str) -> None:
    config = load_run([configurations["plain_sr"], f"runs={text}", f"data.train=[{text}]", f"data.eval.a={text}"])
    assert (config.config.runs, config.config.data.train, config.config.data.eval) == (text, (text,), {"a": text})
    (tmp_path / "overlay.yaml").write_text(f"runs: {text}\ndata: {{train: {text}, eval: {{{text}: x}}}}\n")
    config = load_run([configurations["plain_sr"], str(tmp_path / "overlay.yaml")])
    assert (config.config.runs, config.config.data.train, config.config.data.eval) == (text, (text,), {text: "x"})


@pytest.mark.parametrize("option", [whole, positive])
def test_numbers_of_options_are_in_plain_digits(option: Callable[[str], int]) -> None:
    assert option("12") == 12
    for text in ("010", "1_0", "1:30", "x", "", "1.0", "٣", " 1", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number"):
            option(text)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("method.optimizer.learning_rate=1e-4", "method.optimizer.learning_rate", 1e-4),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.epochs=3", "train.epochs", 3.0),
        ("train.epochs=.5", "train.epochs", 0.5),
        ("seed=0x10", "seed", 16),
        ("data.flip=off", "data.flip", False),
        ("data.workers=${oc.env:WORKERS}", "data.workers", 3),
        ("train.log_every=${method.scale}", "train.log_every", 2),
    ],
)
def test_a_number_may_be_written_as_before(
    configurations: dict[str, str], monkeypatch: pytest.MonkeyPatch, override: str, key: str, value: Any
) -> None:
    monkeypatch.setenv("WORKERS", "3")
    found: Any = load_run([configurations["plain_sr"], override]).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


ADDED = ("edges2shoes-r.yaml",)  # since the digests were taken


@cache
def shipped() -> dict[str, str]:
    """Of each folder of configurations, a digest of what its runs' and their teachers' identities are made of."""
    parts: dict[str, list[Any]] = {}
    for path in sorted((CLONE / "configs").glob("*/*.yaml")):
        if path.parent.name not in ("base", "variants", "grids", "accelerate") and path.name not in ADDED:
            loaded = load_run([str(path), "train.steps=1e3", "method.optimizer.eps=1e-7"])
            teacher = identity_values(loaded.teacher.config) if loaded.teacher else None
            parts.setdefault(path.parent.name, []).append([path.name, identity_values(loaded.config), teacher])
    return {
        folder: hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
        for folder, found in parts.items()
    }


@pytest.mark.parametrize(
    ("folder", "digest"),
    [
        ("dcd", "a1717ccc639c08f3"),
        ("dssd", "b04352e15a916445"),
        ("fesd", "b1990a45da7d6736"),
        ("fsrcnn", "b92cc589002d4eca"),
        ("original", "fb9a81bdcde751e9"),
        ("pisr", "88bc93e44dc9f3d5"),
    ],
)
def test_what_the_shipped_configurations_say_is_as_it_was(folder: str, digest: str) -> None:
    """Taken from the code before YAML was read as 1.2: another digest would give runs other identities.

    Those of the GANs once more when their default schedule and what the spectral classifier sees changed
    (test_identity.py has the older ones' keys).
    """
    assert shipped()[folder] == digest
