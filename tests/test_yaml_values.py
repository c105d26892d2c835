"""YAML 1.2's values: what is written is what is got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from hpcdistill.yaml_values import DEEPEST, dump_yaml, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("12:30:45.5", "12:30:45.5"),
        ("0712", "0712"),  # 458
        ("010", "010"),
        ("09.5", "09.5"),
        ("1_000", "1_000"),
        *((word, word) for word in ("on", "off", "yes", "no", "y", "N", "On")),
        ("2026-11-30", "2026-11-30"),
        ("=", "="),
        ("'5'", "5"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-4", 1e-4),  # YAML 1.1: text
        ("1e5", 1e5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("9" * 400, math.inf),
        ("{on: 1, 010: 2, true: 3}", {"on": 1, "010": 2, "true": 3}),
        ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
    ],
)
def test_a_value_is_as_yaml_1_2_says(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert found == value
    assert isinstance(found, type(value))
    if value is not None and not isinstance(value, bool | dict | str):
        assert str(found) == text


def repeated(lines: int) -> str:
    """Text that aliases make 10^lines times as long."""
    return "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (DEEPEST + 1), "nested more than"),
        ("[" * 100_000, "nested more than"),
        ("- " * 1000 + "x", "nested more than"),
        ("{a: " * 1000, "nested more than"),
        ("a: &x [*x]", "an alias stands for what it is in"),
        (repeated(20), "aliases stand for too much"),
        ("a: 1\nb: 2\na: 3", "'a' is there twice"),
        ("? [a]\n: 1", "a key must be text"),
        ("!!int 010", "not a number"),
        ("!!bool maybe", "not true or false"),
        ("!!timestamp x", "could not determine a constructor"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1\n---\nb: 1", "expected a single document"),
    ],
)
def test_what_cannot_be_meant_is_yamls_error(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


@pytest.mark.parametrize(
    "value", ["1e5", "010", "1:30", "on", "1_000", "0x10", "true", "~", "", ".5", "plain", 1e-5, 7]
)
def test_what_is_dumped_is_read_as_the_same(value: Any) -> None:
    found = load_yaml(dump_yaml({"key": value}))["key"]
    assert found == value
    assert isinstance(found, type(value))
