"""Configurations of many cells, fast: what `config.load_config` gives, its files parsed once.

A thousand cells share a few files. Their layers are merged here as plain dicts; whatever is out of the ordinary (an
error above all) is left to `load_config`, which is the reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from hpcdistill.config import (
    OWN_KEYS,
    Loaded,
    RunConfig,
    Values,
    carried_out_by,
    file_layers,
    is_override,
    load_config,
    merge,
    parse_override,
    run_config_of,
)
from hpcdistill.methods import METHODS
from hpcdistill.storage import user_path

_OF_A_KEY = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")  # `${data.crop}` and nothing else
_OF_THE_ENVIRONMENT = re.compile(r"[^$]*\$\{oc\.env:[^${}]*\}[^$]*")


class _UnusualError(Exception):
    """Something that only the reference can load, or say what is wrong with."""


class CellConfigs:
    """`load(arguments)` as often as you like; files and environment are taken as they are at the first look."""

    def __init__(self) -> None:
        self._files: dict[str, list[Values]] = {}
        self._overrides: dict[str, Values] = {}
        self._texts: dict[str, Any] = {}
        self._loaded: dict[tuple[str, ...], Loaded] = {}

    def load(self, arguments: Sequence[str], origins: Mapping[str, str] = MappingProxyType({})) -> Loaded:
        """Equal to `load_config(arguments, origins)`, errors included."""
        key = tuple(arguments)
        if key not in self._loaded:
            try:
                self._loaded[key] = self._load(key)
            except _UnusualError:
                self._loaded[key] = load_config(arguments, origins)
        return self._loaded[key]

    def _load(self, arguments: tuple[str, ...]) -> Loaded:
        files = tuple(argument for argument in arguments if not is_override(argument))
        overrides = tuple(argument for argument in arguments if is_override(argument))
        if not files:
            raise _UnusualError
        layers = [(False, layer) for file in files for layer in self._file(file)]
        layers += [(_adds(override), self._override(override)) for override in overrides]
        config = self._checked(layers)
        paths = tuple(user_path(file) for file in files)
        if config.teacher is None:
            return Loaded(config, paths, overrides)
        shared = [(False, _shared(layer)) for file in files[1:] for layer in self._file(file)]
        shared += [(_adds(override), _shared(self._override(override))) for override in overrides]
        carried_out: Values = {"train": carried_out_by(config)}
        own = [(False, layer) for layer in (carried_out, *self._file(config.teacher.config))]
        teacher = self._checked([*own, *shared, (False, config.teacher.overrides)])
        if teacher.teacher is not None:
            raise _UnusualError
        return Loaded(config, paths, overrides, Loaded(teacher, (Path(config.teacher.config),), ()))

    def _file(self, file: str) -> list[Values]:
        if file not in self._files:
            self._files[file] = [layer for _, layer in file_layers(user_path(file))]
        return self._files[file]

    def _override(self, text: str) -> Values:
        if text not in self._overrides:
            self._overrides[text] = parse_override(text)
        return self._overrides[text]

    def _checked(self, layers: Sequence[tuple[bool, Values]]) -> RunConfig:
        merged: Values = {}
        for adds, layer in layers:
            if not adds and _has_test_sets(layer) and _has_test_sets(merged):
                del merged["data"]["eval"]
            merge(merged, layer)
        values = cast(Values, self._resolved(merged, merged))
        if isinstance(values.get("teacher"), dict) and set(values["teacher"]) == {"overrides"}:
            del values["teacher"]
        method = values.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            raise _UnusualError
        try:
            return run_config_of(METHODS[name].Config).model_validate(values)
        except ValidationError:
            raise _UnusualError from None

    def _resolved(self, value: Any, root: Values) -> Any:
        """`value` with its interpolations replaced."""
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
                text = OmegaConf.create({"text": value})
                self._texts[value] = cast(Values, OmegaConf.to_container(text, resolve=True))["text"]
            except OmegaConfBaseException:
                raise _UnusualError from None
        return self._texts[value]


def _adds(override: str) -> bool:
    """Whether `override` adds a test set where others would name them all."""
    return override.startswith("data.eval.")


def _shared(layer: Values) -> Values:
    return {key: value for key, value in layer.items() if key not in OWN_KEYS}


def _has_test_sets(values: Mapping[str, Any]) -> bool:
    data = values.get("data")
    return isinstance(data, dict) and "eval" in data
