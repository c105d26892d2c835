"""YAML as the whole project reads it: configurations, overrides, grids, profiles, recipes, estimates.

Plain words have the values of YAML 1.2. PyYAML's own are those of 1.1, where 1:30 is 90, 0712 is 458, 1_000 is 1000
and `on` is true. Numbers remember how they were written, so that they can be text where text is meant.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

DEEPEST = 50  # levels of nesting; libyaml's own reader ends the process without a word at some thousands
_MOST_REPEATED = 10_000  # nodes that aliases may add: a few lines of them can stand for billions
_DIGITS = 300  # of a whole number, at most: Python refuses some thousands
_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(rf"[-+]?(?:0|[1-9][0-9]{{0,{_DIGITS}}})|0o[0-7]{{1,{_DIGITS}}}|0x[0-9a-fA-F]{{1,{_DIGITS}}}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class WrittenInt(int):
    """A whole number and the text that stood for it; `str()` gives that text."""

    written: str

    def __new__(cls, value: int, written: str = "") -> WrittenInt:
        number = super().__new__(cls, value)
        number.written = written or int.__repr__(number)
        return number

    def __str__(self) -> str:
        return self.written


class WrittenFloat(float):
    """A number and the text that stood for it; `str()` gives that text."""

    written: str

    def __new__(cls, value: float, written: str = "") -> WrittenFloat:
        number = super().__new__(cls, value)
        number.written = written or float.__repr__(number)
        return number

    def __str__(self) -> str:
        return self.written


Word = str | WrittenInt | WrittenFloat  # what may be meant as text


def load_yaml(text: str) -> Any:
    """The value of one YAML document; keys of mappings are text, as written, or null.

    Raises yaml.YAMLError, also for a key that is there twice, for very deep nesting and for aliases without end.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `load_yaml` reads as the same ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def number_of(text: str) -> int | float | None:
    """The number that a plain word is; None when it is none."""
    if _INT.fullmatch(text):
        return WrittenInt(int(text, 0), text)
    if _FLOAT.fullmatch(text):
        return WrittenFloat(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")), text)
    return None


class _Loader(yaml.SafeLoader):
    """PyYAML's SafeLoader in Python, with the plain values of YAML 1.2 and without tags of objects."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way
    yaml_constructors = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_aliases(node)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {DEEPEST} deep", parent.start_mark if parent else None
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keys are text as written, and each is there once: YAML would forget the first, a cell or value with it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for number, (key, value) in enumerate(node.value):
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
            if key.tag == f"{_TAG}null":
                continue  # whose mapping it is says that this is no name
            text = yaml.ScalarNode(f"{_TAG}str", key.value, key.start_mark, key.end_mark)
            node.value[number] = (text, value)
        return node


def _null(loader: _Loader, node: yaml.ScalarNode) -> None:
    return None


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    if not _BOOL.fullmatch(node.value):
        raise yaml.constructor.ConstructorError(None, None, f"'{node.value}' is not true or false", node.start_mark)
    return str(node.value).lower() == "true"


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    number = number_of(node.value)
    if number is None:
        raise yaml.constructor.ConstructorError(None, None, f"'{node.value}' is not a number", node.start_mark)
    return number


def _check_aliases(root: yaml.Node) -> None:
    """Refuse aliases of what they stand in, and those that make a document much larger than it is written."""
    sizes: dict[int, tuple[int, int]] = {}  # of a node: how many nodes it stands for, how deep they are nested
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> tuple[int, int]:
        if id(node) in open_nodes:
            raise yaml.composer.ComposerError(None, None, "an alias stands for what it is in", node.start_mark)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            nodes = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
            inner = [size(part) for part in nodes]
            sizes[id(node)] = 1 + sum(count for count, _ in inner), 1 + max((deep for _, deep in inner), default=0)
            open_nodes.remove(id(node))
        return sizes[id(node)]

    count, depth = size(root)
    if count - len(sizes) > _MOST_REPEATED or depth > DEEPEST:
        raise yaml.composer.ComposerError(None, None, "its aliases stand for too much; write it out", root.start_mark)


for _kind, _words, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_words.pattern})$"), _first)
for _tag, _constructor in {"null": _null, "bool": _bool, "int": _number, "float": _number}.items():
    _Loader.add_constructor(f"{_TAG}{_tag}", _constructor)
for _full_tag in (f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map", None):
    _Loader.add_constructor(_full_tag, yaml.SafeLoader.yaml_constructors[_full_tag])


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text."""


_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
