"""Loading, merging, checking and printing a run's configuration.

A command line `a.yaml b.yaml train.batch_size=4` is merged from left to right; a file may `extends:` others. Every
value is checked against the typed sections that the packages own; what is wrong is one line: file, key, remedy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from hpcdistill.data.config import DataConfig
from hpcdistill.errors import UserError, nearest
from hpcdistill.methods.settings import MethodConfig, config_class
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.settings import LONGEST_NAME, Section, UserPlace, first_fault, load_keys, operational
from hpcdistill.storage import user_path
from hpcdistill.training.config import TrainConfig
from hpcdistill.yaml_values import DEEPEST, dump_yaml, load_yaml

Values = dict[str, Any]
Layer = tuple[str, Values]  # its origin, for messages, and its values

COMMAND_LINE = "command line"
# A teacher shares its student's overlays and overrides, but not these: they say what the student itself is.
OWN_KEYS = ("name", "method", "teacher", "teachers", "init")
# How a student is carried out holds for a teacher that is trained on its way, where the teacher's file says nothing.
_CARRIED_OUT = ("device", "deepspeed", "threads", "timeout")
SOURCES = ("config", "run", "weights")  # of a teacher; what is named last replaces the others
# A file that names its own test sets means these, not these as well.
_REPLACED = ("data", "eval")
_ONE_MORE = " (one more test set)"
_OF_A_KEY = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")  # `${data.crop}` and nothing else
_OF_THE_ENVIRONMENT = re.compile(r"[^$]*\$\{oc\.env:[^${}]*\}[^$]*")
_WRITTEN = {"allow_objects": True}  # OmegaConf's leave for numbers that remember how they were written


class TeacherConfig(Section):
    """Who fills a role: a run by its configuration (trained first unless it has finished), by its folder, or a file."""

    config: UserPlace | None = Field(None, description="a run's configuration file, relative to the file that names it")
    run: UserPlace | None = operational(None, "or the folder of a finished run")
    weights: UserPlace | None = operational(None, "or a .safetensors file that hpcdistill saved")
    network: str | None = Field(
        None, description="which of the run's networks; unset = the one called as the role, or the only one"
    )
    checkpoint: Literal["best", "last"] = Field("last", description="which of its weights are used")
    overrides: dict[str, Any] = Field({}, description="values merged over the teacher's configuration")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"name one of {', '.join(SOURCES)}; {' and '.join(given) or 'none'} is given")
        return self


class RunConfig(Section):
    """Everything a run needs. `method` is checked by the method's own `Config`."""

    name: str = operational(
        "run", "the run folder's name, before the identity", pattern=r"^[A-Za-z0-9_.-]+$", max_length=LONGEST_NAME
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, sample order and augmentation")
    method: MethodConfig
    teacher: TeacherConfig | None = operational(None, "who fills the role `teacher`")
    teachers: dict[str, TeacherConfig] = operational({}, "who fills further roles of the method, by role")
    init: dict[str, UserPlace] = operational({}, "network -> .safetensors file or run folder that it starts from")
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    runs: UserPlace = operational("runs", "folder of the run folders")

    @field_validator("teachers", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`teachers.<role>=null` leaves out who a file below has put there."""
        return {role: who for role, who in value.items() if who is not None} if isinstance(value, dict) else value

    @property
    def roles(self) -> dict[str, TeacherConfig]:
        """Who fills which role."""
        return {**({"teacher": self.teacher} if self.teacher else {}), **self.teachers}

    def dump(self) -> dict[str, Any]:
        """Plain values, ready for YAML; the method's own fields included."""
        return self.model_dump(mode="json", serialize_as_any=True)


def carried_out_by(config: RunConfig) -> dict[str, Any]:
    """What a student's configuration says about how it is carried out: its teacher's, unless that says otherwise."""
    return {key: getattr(config.train, key) for key in _CARRIED_OUT if key in config.train.model_fields_set}


def split_runs(arguments: Sequence[str]) -> list[list[str]]:
    """`arguments` cut into the command lines of single runs: each file that names a method begins one.

    Overlays and overrides belong to the run before them.
    """
    runs: list[list[str]] = []
    for argument in arguments:
        begins = not is_override(argument) and any(
            _has(layer, ("method", "name")) for _, layer in ConfigFiles().layers(user_path(argument))
        )
        if begins or not runs:
            runs.append([])
        runs[-1].append(argument)
    return runs


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return dump_yaml(config.dump())


def config_files(folder: Path) -> list[Path]:
    """The runnable configurations under `folder`: those that name a method."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue  # whoever names it is told what is wrong with it
        if isinstance(values, dict) and isinstance(values.get("method"), dict) and "name" in values["method"]:
            found.append(path)
    return found


def is_override(argument: str) -> bool:
    """Whether an argument of a command line is `key=value` and not a file."""
    return "=" in argument and not _is_file(argument)


def _is_file(path: Path | str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a name is too long for the system


class ConfigFiles:
    """Reads and merges configuration files, each read once: a sweep's thousand cells share a few."""

    def __init__(self) -> None:
        self._files: dict[Path, list[Layer]] = {}
        self._overrides: dict[str, Values] = {}
        self._texts: dict[str, Any] = {}  # interpolations of the environment, resolved

    def layers(self, path: Path) -> list[Layer]:
        """The layers of the file `path`: first those it extends, then its own, each with its origin for messages.

        Raises UserError for what is missing, damaged or extends itself.
        """
        if path not in self._files:
            self._files[path] = list(self._read(path, ()))
        return self._files[path]

    def override(self, text: str) -> Values:
        """The layer that `key=value` is; UserError when it is none, or its value is not valid YAML."""
        if text not in self._overrides:
            self._overrides[text] = parse_override(text)
        return self._overrides[text]

    def checked(self, layers: Sequence[Layer]) -> RunConfig:
        """Merge `layers` from left to right, resolve interpolations and validate."""
        merged: Values = {}
        for origin, layer in layers:
            # `data.eval.x=...` adds one on the command line; `data.eval={x: ...}` names them all, as a file does.
            if not origin.endswith(_ONE_MORE) and _has(layer, _REPLACED) and _has(merged, _REPLACED):
                del merged[_REPLACED[0]][_REPLACED[1]]
            _forget_sources(merged, layer)
            merge(merged, layer)
        try:
            values = cast(Values, self._resolved(merged, merged))
        except _UnusualError:
            values = _resolved_by_omegaconf(merged, layers)
        if isinstance(values.get("teacher"), dict) and set(values["teacher"]) == {"overrides"}:
            del values["teacher"]  # a variant's words to a teacher, over a configuration that has none
        model = _model_of(values.get("method"), layers)
        try:
            return model.model_validate(values)
        except ValidationError as error:
            key, what = first_fault(error, model, "; set it in the file or on the command line")
            raise UserError(f"{_origin(layers, key)}: {key}: {what}") from None

    def _read(self, path: Path, seen: tuple[Path, ...]) -> Iterator[Layer]:
        """`seen` are the files on the way to it."""
        if os.path.isdir(path):  # noqa: PTH112 - as in _is_file
            if (path / "config.yaml").is_file():
                raise UserError(f"{path}: is a run folder; its configuration is {path / 'config.yaml'}")
            raise UserError(f"{path}: is a folder; name a configuration file, e.g. configs/dssd/x4.yaml")
        if not _is_file(path):
            near = nearest(path.name, known) if (known := [entry.name for entry in path.parent.glob("*.yaml")]) else ""
            raise UserError(f"{path}: no such configuration file; {near or 'see configs/'}")
        if path.resolve() in seen:
            raise UserError(f"{path}: extends itself by way of {seen[-1]}")
        values = load_keys(path)
        try:
            parents = _by_omegaconf({"extends": values.pop("extends", [])})["extends"]
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: extends: {str(error).splitlines()[0]}") from None
        parents = [parents] if isinstance(parents, str) else parents
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            raise UserError(f"{path}: extends: expected a file name or a list of file names, got {json.dumps(parents)}")
        for parent in parents:
            yield from self._read(path.parent / user_path(parent, f"{path}: extends:"), (*seen, path.resolve()))
        for key, teacher in _teachers(values).items():
            if isinstance(named := teacher.get("config"), str):
                teacher["config"] = str(path.parent / user_path(named, f"{path}: {key}.config:"))
        yield str(path), values

    def _resolved(self, value: Any, root: Values) -> Any:
        """`value` with the usual interpolations replaced; _UnusualError for what is left to OmegaConf.

        OmegaConf takes 30 ms for what this does in one, and is the reference.
        """
        if isinstance(value, dict):
            return {key: self._resolved(item, root) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolved(item, root) for item in value]
        if not isinstance(value, str) or ("${" not in value and value != "???" and "\\" not in value):
            return value
        if match := _OF_A_KEY.fullmatch(value):
            found: Any = root
            for part in match[1].split("."):
                if not isinstance(found, dict) or part not in found:
                    raise _UnusualError
                found = found[part]
            if isinstance(found, str | dict | list):
                raise _UnusualError
            return found
        if not _OF_THE_ENVIRONMENT.fullmatch(value):
            raise _UnusualError
        if value not in self._texts:
            try:
                self._texts[value] = _by_omegaconf({"text": value})["text"]
            except OmegaConfBaseException:
                raise _UnusualError from None
        return self._texts[value]


def parse_override(text: str) -> Values:
    """The layer that `key=value` is; UserError when it is none, or its value is not valid YAML."""
    key, _, value = text.partition("=")
    if not key or key[0] == "[" or not all(key.split(".")) or key.count(".") > DEEPEST:
        raise UserError(f"{text}: not an override; write key=value, e.g. train.batch_size=4")
    try:
        layer = OmegaConf.create({}, flags=_WRITTEN)
        OmegaConf.update(layer, key, load_yaml(value))
        return cast(Values, OmegaConf.to_container(layer))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{text}: the value is not valid YAML: {error}") from None


def origin_of(override: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(override, COMMAND_LINE)
    return origin + _ONE_MORE if override.startswith(".".join(_REPLACED) + ".") else origin


def merge(into: Values, layer: Mapping[str, Any]) -> None:
    """Lay `layer` over `into`: mappings are merged, anything else replaces."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = _copied(value)


@cache
def run_config_of(method: type[MethodConfig]) -> type[RunConfig]:
    """RunConfig with the fields of this method."""
    return create_model("RunConfig", __base__=RunConfig, method=(method, ...))


def _copied(value: Any) -> Any:
    """Each mapping and list of `value` anew: what YAML's aliases share must not change together."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def without(values: Values, keys: Sequence[str]) -> Values:
    return {key: value for key, value in values.items() if key not in keys}


class _UnusualError(Exception):
    """An interpolation that only OmegaConf can resolve, or say what is wrong with."""


def _resolved_by_omegaconf(merged: Values, layers: Sequence[Layer]) -> Values:
    """`merged` with all interpolations replaced; UserError, with the key, for one that cannot be."""
    try:
        return _by_omegaconf(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        first = str(error).splitlines()[0]
        raise UserError(f"{_origin(layers, str(key or ''))}: {key}: {first}") from None
    except RecursionError:
        raise UserError(f"{layers[0][0]}: its interpolations (${{...}}) lead on and on; write the values out") from None


def _by_omegaconf(values: Values) -> Values:
    return cast(Values, OmegaConf.to_container(OmegaConf.create(values, flags=_WRITTEN), resolve=True))


def _model_of(method: Any, layers: Sequence[Layer]) -> type[RunConfig]:
    """RunConfig with the fields of the method that `method` names; UserError when it names none."""
    if method is not None and not isinstance(method, dict):
        raise UserError(
            f"{_origin(layers, 'method')}: method: expected keys, such as name, got {json.dumps(method, default=str)}"
        )
    name = (method or {}).get("name")
    try:
        if name is None:
            raise UserError("missing; name a method")
        return run_config_of(config_class(str(name)))
    except UserError as error:
        raise UserError(f"{_origin(layers, 'method.name')}: method.name: {error}") from None


def _teachers(values: Mapping[str, Any]) -> dict[str, Values]:
    """The sections of a layer that say who fills a role, by their key."""
    further = values.get("teachers")
    sections = {f"teachers.{role}": section for role, section in further.items()} if isinstance(further, dict) else {}
    sections["teacher"] = values.get("teacher")
    return {key: section for key, section in sections.items() if isinstance(section, dict)}


def _forget_sources(merged: Values, layer: Values) -> None:
    """Where `layer` names another source of a teacher than `merged` has, the older one goes."""
    older = _teachers(merged)
    for key, new in _teachers(layer).items():
        if key in older and any(source in new for source in SOURCES):
            for source in SOURCES:
                older[key].pop(source, None)


def _origin(layers: Sequence[Layer], key: str) -> str:
    """The last layer that sets `key`, or the closest key above it."""
    parts = key.split(".")
    while parts and parts != [""]:
        for origin, values in reversed(layers):
            if _has(values, parts):
                return origin
        parts = parts[:-1]
    return layers[0][0]


def _has(values: Values, parts: Sequence[str]) -> bool:
    current: Any = values
    for part in parts:
        if not isinstance(current, Mapping) or part not in current:
            return False
        current = current[part]
    return True
