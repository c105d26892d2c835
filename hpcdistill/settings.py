"""The base class of every configuration section, what is said of a wrong value, and which values name a run."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import user_place
from hpcdistill.yaml_values import WrittenFloat, WrittenInt, load_yaml, number_of

UserPlace = Annotated[str, AfterValidator(user_place)]  # a file or folder, `~` expanded, or an address as it is

# Bounds of what is counted: far above any run, and far below what an integer, a float or a date can hold.
MOST_STEPS = 10**12
MOST_PIXELS = 1 << 16  # of a side
LARGEST_WEIGHT = 1e12  # of a loss term, which is float32
LONGEST_NAME = 200  # letters: with what is put before and after it, a folder's name has at most 255 bytes
_LIKE_A_NUMBER = re.compile(r"[-+]?\.?[0-9][0-9_:.,eE+-]*")


class Section(BaseModel):
    """A typed part of a run's configuration. Unknown keys are errors; values do not change after loading.

    Numbers are finite. A number where text is meant is the text as it was written; text, true or false where a number
    is meant are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        return as_meant(value, _kind(cls, str(info.field_name)))


S = TypeVar("S", bound=Section)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that says how a run is carried out (paths, workers, logging) and is not part of its identity."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def identity_values(section: Section) -> dict[str, Any]:
    """The values of `section`, nested, that differ from their defaults and are part of the run's identity."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            nested = identity_values(value)
            if nested:
                values[name] = nested
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            values[name] = value
    return values


def load_section(path: Path, section: type[S], example: str) -> S:
    """The YAML file `path` as a `section`; an empty file is all defaults. `example`: where to see how one is written.

    Raises UserError, in one line, for what cannot be read or is wrong in it.
    """
    values = load_keys(path, f"; see {example}")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {': '.join(filter(None, first_fault(error, section)))}") from None


def load_keys(path: Path, remedy: str = "") -> dict[str, Any]:
    """The keys and values of the YAML file `path`, none for an empty one; UserError for what is no such file."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected `key: value` lines at the top level{remedy}")
    return values or {}


def first_fault(error: ValidationError, section: type[Section], remedy: str = "") -> tuple[str, str]:
    """The first fault: its key, and what was expected there; `remedy` says how to mend a missing value."""
    faults = error.errors()
    fault, location = faults[0], faults[0]["loc"]
    if fault["type"] == "extra_forbidden":
        what = f"unknown key; {nearest(str(location[-1]), _keys_at(section, location[:-1]))}"
    elif fault["type"] == "missing":
        what = f"missing{remedy}"
    else:
        what = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        # A check of a whole section or list says which of its values is meant; all of them would bury that.
        if not (fault["type"] == "value_error" and isinstance(fault["input"], Mapping | list | tuple)):
            what += f", got {json.dumps(fault['input'], default=str)}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return ".".join(map(str, location)), what + more


def _keys_at(section: type[Section], location: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at `location`, through lists and mappings of sections."""
    annotation: Any = section
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = annotation.model_fields[str(part)].annotation
        else:  # a key of a mapping, or a number in a list
            annotation = next(argument for argument in reversed(get_args(annotation)) if argument is not ...)
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(choice for choice in get_args(annotation) if choice is not types.NoneType)
    return list(annotation.model_fields)


class FieldKind(NamedTuple):
    """What a field takes: the types of its single values, and what its lists or mappings are made of."""

    single: frozenset[type]
    items: FieldKind | None = None


def as_meant(value: Any, kind: FieldKind) -> Any:
    """`value` of a YAML file as a field of this kind means it; pydantic checks the rest.

    Raises PydanticCustomError for what pydantic would take without a word: 010 for 10, true for 1.
    """
    if kind.items is not None and isinstance(value, Mapping):
        return {key: as_meant(item, kind.items) for key, item in value.items()}
    if kind.items is not None and isinstance(value, list | tuple):
        return [as_meant(item, kind.items) for item in value]
    numeric = int in kind.single or float in kind.single
    if isinstance(value, str):
        return _text(value) if str in kind.single else _number(value) if numeric else value
    if isinstance(value, bool):
        if bool not in kind.single and numeric:
            raise PydanticCustomError("number", "expected a number")
        if bool not in kind.single and str in kind.single:
            raise PydanticCustomError("text", "expected text; put it in quotes")
    elif isinstance(value, WrittenInt | WrittenFloat) and kind.single:
        whole = isinstance(value, WrittenInt)
        if str in kind.single and float not in kind.single and not (whole and int in kind.single):
            return value.written
        return int(value) if whole else float(value)
    return value


def _text(text: str) -> str:
    if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise PydanticCustomError("text", "expected text without NUL and lone surrogates, which no file can hold")
    return text


def _number(text: str) -> Any:
    """The number that `text` (quoted, or of the environment) stands for; other text is left to pydantic to refuse."""
    number = number_of(text)
    if number is None and _LIKE_A_NUMBER.fullmatch(text):
        raise PydanticCustomError(
            "number", "expected a number in plain digits, like 1.5 or 10: no ':', '_' or ',', no 0 in front"
        )
    if isinstance(number, WrittenInt):
        return int(number)
    return text if number is None else float(number)


@cache
def _kind(section: type[Section], name: str) -> FieldKind:
    return _kind_of(section.model_fields[name].annotation)


def _kind_of(annotation: Any) -> FieldKind:
    """Empty for a section, and for a field that takes anything."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind_of(arguments[0])
    if origin is Literal:
        return FieldKind(frozenset(type(value) for value in arguments))
    if origin in (tuple, list):
        return FieldKind(frozenset(), _union([_kind_of(argument) for argument in arguments if argument is not ...]))
    if origin is dict:
        return FieldKind(frozenset(), _kind_of(arguments[1]))
    if origin in (Union, types.UnionType):
        return _union([_kind_of(argument) for argument in arguments])
    return FieldKind(frozenset({annotation} & {str, int, float, bool}))


def _union(kinds: list[FieldKind]) -> FieldKind:
    single = frozenset(one for kind in kinds for one in kind.single)
    return FieldKind(single, next((kind.items for kind in kinds if kind.items is not None), None))
