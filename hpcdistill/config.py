"""Loading, merging, checking and printing a run's configuration.

A command line `a.yaml b.yaml train.batch_size=4` is merged from left to right; a file may `extends:` others. Every
value is checked against the typed sections that the packages own; what is wrong is one line: file, key, remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, create_model
from torch import nn

from hpcdistill.data.config import DataConfig
from hpcdistill.data.places import data_root
from hpcdistill.errors import UserError, nearest
from hpcdistill.methods import METHODS
from hpcdistill.methods.base import MethodConfig
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.settings import LONGEST_NAME, Section, UserPlace, operational
from hpcdistill.storage import user_path
from hpcdistill.training.config import TrainConfig
from hpcdistill.yaml_values import DEEPEST, dump_yaml, load_yaml

Values = dict[str, Any]

COMMAND_LINE = "command line"
# A teacher shares its student's overlays and overrides, but not these: they say what the student itself is.
OWN_KEYS = ("name", "method", "teacher", "init")
# How a student is carried out holds for a teacher that is trained on its way, where the teacher's file says nothing.
_CARRIED_OUT = ("device", "deepspeed", "threads", "timeout")
# A file that names its own test sets means these, not these as well.
_REPLACED = ("data", "eval")
_ONE_MORE = " (one more test set)"
_WRITTEN = {"allow_objects": True}  # OmegaConf's leave for numbers that remember how they were written


class TeacherConfig(Section):
    """The run that a student learns from; it is found by its identity, or trained first."""

    config: UserPlace = Field(description="the teacher's configuration file, relative to the file that names it")
    checkpoint: Literal["best", "last"] = Field("last", description="which of its weights are used")
    overrides: dict[str, Any] = Field({}, description="values merged over the teacher's configuration")


class RunConfig(Section):
    """Everything a run needs. `method` is checked by the method's own `Config`."""

    name: str = operational(
        "run", "the run folder's name, before the identity", pattern=r"^[A-Za-z0-9_.-]+$", max_length=LONGEST_NAME
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, sample order and augmentation")
    method: MethodConfig
    teacher: TeacherConfig | None = operational(None, "the run this one learns from")
    init: dict[str, UserPlace] = operational({}, "generator -> .safetensors file or run folder that it starts from")
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    runs: UserPlace = operational("runs", "folder of the run folders")

    def dump(self) -> dict[str, Any]:
        """Plain values, ready for YAML; the method's own fields included."""
        return self.model_dump(mode="json", serialize_as_any=True)


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and what it was made of."""

    config: RunConfig
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    teacher: Loaded | None = field(default=None)


def carried_out_by(config: RunConfig) -> dict[str, Any]:
    """What a student's configuration says about how it is carried out: its teacher's, unless that says otherwise."""
    return {key: getattr(config.train, key) for key in _CARRIED_OUT if key in config.train.model_fields_set}


def load_config(arguments: Sequence[str], origins: Mapping[str, str] = MappingProxyType({})) -> Loaded:
    """Load the files and `key=value` overrides in `arguments`, and the teacher's configuration where one is named.

    `origins`: where an override is from, for messages, when that is not the command line.
    Raises UserError for a missing or damaged file, a wrong key or an impossible value.
    """
    files = tuple(user_path(argument) for argument in arguments if not is_override(argument))
    overrides = tuple(argument for argument in arguments if is_override(argument))
    if not files:
        raise UserError("no configuration file given; e.g. configs/dssd/x4.yaml")
    data_root()  # the files have the same variable in them: what is wrong with it is said by its name
    layers = [layer for file in files for layer in file_layers(file)]
    layers += [(_origin_of(override, origins), parse_override(override)) for override in overrides]
    config = _checked(layers)
    if config.teacher is None:
        return Loaded(config, files, overrides)
    shared = [(origin, _without(values, OWN_KEYS)) for file in files[1:] for origin, values in file_layers(file)]
    shared += [(_origin_of(override, origins), _without(parse_override(override), OWN_KEYS)) for override in overrides]
    special = ("teacher.overrides", config.teacher.overrides)
    carried_out: tuple[str, Values] = (str(files[0]), {"train": carried_out_by(config)})
    teacher = _checked([carried_out, *file_layers(Path(config.teacher.config)), *shared, special])
    if teacher.teacher is not None:
        raise UserError(f"{config.teacher.config}: a teacher cannot have a teacher of its own; give it an init instead")
    return Loaded(config, files, overrides, Loaded(teacher, (Path(config.teacher.config),), ()))


def split_runs(arguments: Sequence[str]) -> list[list[str]]:
    """`arguments` cut into the command lines of single runs: each file that names a method begins one.

    Overlays and overrides belong to the run before them.
    """
    runs: list[list[str]] = []
    for argument in arguments:
        begins = not is_override(argument) and any(
            _has(layer, ("method", "name")) for _, layer in file_layers(user_path(argument))
        )
        if begins or not runs:
            runs.append([])
        runs[-1].append(argument)
    return runs


def configured_generators(loaded: Loaded) -> dict[str, nn.Module]:
    """The generators of the run that `loaded` describes and, as "teacher", that of the teacher it names; untrained.

    Raises UserError for a configuration that no network can be built from.
    """
    frozen: dict[str, nn.Module] = {}
    if loaded.teacher:
        teachers = configured_generators(loaded.teacher)
        if "teacher" not in teachers:
            raise UserError(
                f"{loaded.teacher.files[0]}: method {loaded.teacher.config.method.name} trains no teacher; "
                "name a teacher's configuration under teacher.config"
            )
        frozen["teacher"] = teachers["teacher"]
    config = loaded.config.method
    method = METHODS[config.name](config, frozen)  # type: ignore[call-arg]
    for name in loaded.config.init:
        if name not in method.generators:
            raise UserError(f"init.{name}: the method has no such generator; {nearest(name, method.generators)}")
    return {**method.generators, **frozen}


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


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, Values]]:
    """The layers of the file `path`: first those it extends, then its own, each with its origin for messages.

    `seen` are the files on the way to it. Raises UserError for what is missing, damaged or extends itself.
    """
    if os.path.isdir(path):  # noqa: PTH112 - as in _is_file
        if (path / "config.yaml").is_file():
            raise UserError(f"{path}: is a run folder; its configuration is {path / 'config.yaml'}")
        raise UserError(f"{path}: is a folder; name a configuration file, e.g. configs/dssd/x4.yaml")
    if not _is_file(path):
        near = nearest(path.name, known) if (known := [entry.name for entry in path.parent.glob("*.yaml")]) else ""
        raise UserError(f"{path}: no such configuration file; {near or 'see configs/'}")
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself by way of {seen[-1]}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level")
    try:
        parents = _resolved({"extends": values.pop("extends", [])})["extends"]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: extends: {str(error).splitlines()[0]}") from None
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: expected a file name or a list of file names, got {json.dumps(parents)}")
    for parent in parents:
        yield from file_layers(path.parent / user_path(parent, f"{path}: extends:"), (*seen, path.resolve()))
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("config"), str):
        teacher["config"] = str(path.parent / user_path(teacher["config"], f"{path}: teacher.config:"))
    yield str(path), values


def _origin_of(override: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(override, COMMAND_LINE)
    return origin + _ONE_MORE if override.startswith(".".join(_REPLACED) + ".") else origin


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


def _without(values: Values, keys: Sequence[str]) -> Values:
    return {key: value for key, value in values.items() if key not in keys}


def _resolved(values: Values) -> Values:
    """`values` with their interpolations replaced; raises OmegaConf's errors."""
    return cast(Values, OmegaConf.to_container(OmegaConf.create(values, flags=_WRITTEN), resolve=True))


def _checked(layers: Sequence[tuple[str, Values]]) -> RunConfig:
    """Merge `layers` from left to right, resolve interpolations and validate."""
    merged: Values = {}
    for origin, layer in layers:
        # `data.eval.x=...` adds one on the command line; `data.eval={x: ...}` names them all, as a file does.
        if not origin.endswith(_ONE_MORE) and _has(layer, _REPLACED) and _has(merged, _REPLACED):
            del merged[_REPLACED[0]][_REPLACED[1]]
        merge(merged, layer)
    try:
        values = _resolved(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        first = str(error).splitlines()[0]
        raise UserError(f"{_origin(layers, str(key or ''))}: {key}: {first}") from None
    except RecursionError:
        raise UserError(f"{layers[0][0]}: its interpolations (${{...}}) lead on and on; write the values out") from None
    if isinstance(values.get("teacher"), dict) and set(values["teacher"]) == {"overrides"}:
        del values["teacher"]  # a variant's words to a teacher, over a configuration that has none
    method = values.get("method")
    if method is not None and not isinstance(method, dict):
        raise UserError(
            f"{_origin(layers, 'method')}: method: expected keys, such as name, got {json.dumps(method, default=str)}"
        )
    name = (method or {}).get("name")
    if not isinstance(name, str) or name not in METHODS:
        wrong = f"unknown method '{name}'; {nearest(str(name), METHODS)}" if name else "missing; name a method"
        raise UserError(f"{_origin(layers, 'method.name')}: method.name: {wrong}")
    model = run_config_of(METHODS[name].Config)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, layers, model)) from None


def _explain(error: ValidationError, layers: Sequence[tuple[str, Values]], model: type[Section]) -> str:
    """The first fault as `file: key: what was expected; remedy`."""
    faults = error.errors()
    fault = faults[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        what = f"unknown key; {nearest(str(fault['loc'][-1]), _fields(model, fault['loc'][:-1]))}"
    elif fault["type"] == "missing":
        what = "missing; set it in the file or on the command line"
    else:
        what = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        # A section's own check says which of its keys is meant; the whole section would bury that.
        if not (fault["type"] == "value_error" and isinstance(fault["input"], Mapping)):
            what += f", got {json.dumps(fault['input'], default=str)}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{_origin(layers, key)}: {key}: {what}{more}"


def _fields(model: type[Any], location: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at `location`."""
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, Section))
    return list(model.model_fields)


def _origin(layers: Sequence[tuple[str, Values]], key: str) -> str:
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
