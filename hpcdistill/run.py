"""A run, resolved once from its configuration and passed on: what it is, where it lies, who teaches it.

Nothing is computed before it is asked for, and nothing twice: a plan asks for keys only, which need no data; a
training asks for the identity, which reads the packed sets' indexes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hpcdistill.config import (
    OWN_KEYS,
    ConfigFiles,
    Layer,
    RunConfig,
    TeacherConfig,
    carried_out_by,
    is_override,
    origin_of,
    without,
)
from hpcdistill.data import held_out
from hpcdistill.data.fetch.location import digest_at, is_remote
from hpcdistill.data.places import data_root
from hpcdistill.data.test_sets import real_digests, statistics_digest, test_set_digest
from hpcdistill.errors import UserError, nearest
from hpcdistill.methods.settings import role_key
from hpcdistill.models.weights_file import refuse_other_kinds
from hpcdistill.settings import identity_values
from hpcdistill.storage import sha256_file, user_path
from hpcdistill.training.records import read_environment

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.methods.base import Method

KEY_DIGITS = 12
IDENTITY_DIGITS = 8


@dataclass(frozen=True)
class Run:
    """A checked configuration, what it was made of, and who fills the roles of its method."""

    config: RunConfig
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    teachers: Mapping[str, Teacher]

    @property
    def teacher(self) -> Run | None:
        """The run that fills the role `teacher`, where it is named by its configuration."""
        named = self.teachers.get("teacher")
        return named.run if named else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What goes into the hash that names the run: all that its result depends on, and nothing else.

        Reads the packed sets' indexes and hashes initial weights; UserError for what is not there.
        """
        config = self.config
        if config.eval.real_stats is not None and config.method.kind() == "lr-hr":
            raise UserError("eval.real_stats: is for image translation; leave it out")
        record: dict[str, Any] = {
            "method": config.method.name,
            "values": identity_values(config),
            "version": config.method.version,
            "data": [digest_at(place) for place in config.data.train],
        }
        if self.selected == held_out.NAME:
            record["selection"] = held_out.NAME  # which images these are follows from the data and their number
        elif self.selected:
            folder = Path(config.data.eval[self.selected])
            record["selection"] = test_set_digest(folder)
            if real := self._real_side(folder):
                record["real"] = real
        if config.init:
            record["init"] = {name: sha256_file(weights_file(Path(path), name)) for name, path in config.init.items()}
        return record | self._taught_by({role: teacher.identity for role, teacher in self.teachers.items()})

    @cached_property
    def short(self) -> str:
        """8 hex digits of the identity, which name the run's folder."""
        return _digest(self.identity)[:IDENTITY_DIGITS]

    @cached_property
    def folder(self) -> Path:
        """`runs/<name>-<8 hex>`; an existing run of the same identity under another name is found and used."""
        runs = Path(self.config.runs)
        wanted = runs / f"{self.config.name}-{self.short}"
        if wanted.is_dir():
            return wanted
        same = sorted(runs.glob(f"*-{self.short}"))
        return same[0] if same else wanted

    @cached_property
    def key(self) -> str:
        """12 hex digits of what the run will be, said before its data are there; runs of one key are one run.

        The identity hashes what the data contain; the key has where they lie instead, relative to the data root. So a
        plan is made on a login node, and a sweep that was moved with its data keeps its keys. Like the identity it
        leaves out what does not change a result: names, workers, test sets beside the selected one.
        """
        config = self.config
        record: dict[str, Any] = {
            "method": config.method.name,
            "version": config.method.version,
            "values": {**identity_values(config), "seed": config.seed},
            "data": [relative_place(place) for place in config.data.train],
        }
        if self.selected:
            place = config.data.eval.get(self.selected)
            record["selection"] = held_out.NAME if place is None else relative_place(place)
            if config.eval.real_stats:
                record["real"] = relative_place(config.eval.real_stats)
        if config.init:
            record["init"] = config.init
        record |= self._taught_by({role: teacher.key for role, teacher in self.teachers.items()})
        return _digest(record)[:KEY_DIGITS]

    @cached_property
    def selected(self) -> str | None:
        """The set whose metric chooses the best weights, of data.eval or the images held out; None without any."""
        data, select = self.config.data, self.config.eval.select
        names = list(data.eval)
        if data.held_out:
            held_out.check_kind(data.held_out, self.config.method.kind())
            if held_out.NAME in names:
                raise UserError(f"data.eval.{held_out.NAME}: data.held_out has this name; call the set otherwise")
            names.insert(0, held_out.NAME)
        if select is not None and select not in names:
            raise UserError(f"eval.select: '{select}' is not one of data.eval ({', '.join(names) or 'empty'})")
        return select or (names[0] if names else None)

    def untrained(self) -> Method:
        """The method with its networks as they are before training, its teachers' too where they are not there yet.

        Raises UserError for a configuration that no network can be built from.
        """
        wanted = self.config.method.roles()
        for role in self.config.roles:
            if role != "teacher" and role not in wanted:
                raise UserError(f"teachers.{role}: the method has no such role; {nearest(role, wanted)}")
        method: Method = self.config.method.build(
            {role: teacher.untrained() for role, teacher in self.teachers.items()}
        )
        networks = {**method.generators, **method.saved}
        for name in self.config.init:
            if name not in networks:
                raise UserError(f"init.{name}: the method has no such network; {nearest(name, networks)}")
        return method

    def self_contained(self) -> RunConfig:
        """The configuration with its teachers named by their run folders, so that it can be run from there alone."""
        config, roles = self.config, {}
        for role, teacher in self.teachers.items():
            if teacher.run is not None:
                # Relative to the folder it is saved in, so that runs/ can be moved as a whole.
                saved = os.path.relpath(teacher.run.folder / "config.yaml", self.folder)
                roles[role] = teacher.settings.model_copy(update={"config": saved, "overrides": {}})
            else:
                roles[role] = teacher.settings
        first = roles.pop("teacher", None)
        return config.model_copy(update={"teacher": first, "teachers": roles})

    def _real_side(self, folder: Path) -> list[str] | dict[str, str]:
        """What the identity has of the images that FID compares with besides those of the test set `folder`."""
        config = self.config
        if config.eval.real_stats is None:
            train = config.data.train if config.method.REAL_TARGETS else ()
            return real_digests(folder, config.eval.real, train)
        return {"statistics": statistics_digest(Path(config.eval.real_stats))}

    def _taught_by(self, records: Mapping[str, Any]) -> dict[str, Any]:
        """The teachers' part of the identity or the key: nothing without one, as it was before there were roles."""
        further = {role: record for role, record in records.items() if role != "teacher"}
        return {
            **({"teacher": records["teacher"]} if "teacher" in records else {}),
            **({"teachers": further} if further else {}),
        }


@dataclass(frozen=True)
class Teacher:
    """Who fills a role: a run that is trained first unless it has finished, a finished run's folder, or a file."""

    role: str
    settings: TeacherConfig
    run: Run | None = None  # where `settings` names a configuration

    @property
    def folder(self) -> Path | None:
        """The run's folder; None for a file of weights. UserError for one that is named and not there."""
        if self.run is not None:
            return self.run.folder
        if self.settings.run is None:
            return None
        if not os.path.isdir(self.settings.run):  # noqa: PTH112 - Path's raises for a name that is too long
            raise UserError(f"{self._key}.run: {self.settings.run}: no such run folder; name that of a finished run")
        return Path(self.settings.run)

    @property
    def identity(self) -> list[str]:
        """What the student's identity has of it: the run and which of its weights, or the digest of the file."""
        if self.settings.weights:
            refuse_other_kinds(self.file)
            return [sha256_file(self.file)]
        folder = self.folder
        assert folder is not None
        short = self.run.short if self.run else _short_of(folder, self._key)
        return [short, *self._which]

    @property
    def key(self) -> list[str]:
        """What the student's key has of it."""
        if self.run is not None:
            return [self.run.key, *self._which]
        return [relative_place(self.settings.weights or self.settings.run or ""), *self._which]

    @property
    def file(self) -> Path:
        """The trained weights; UserError when they are not there, or when it is not clear which network is meant."""
        if self.settings.weights:
            if not os.path.isfile(self.settings.weights):  # noqa: PTH113 - Path's raises for a name that is too long
                raise UserError(f"{self._key}.weights: {self.settings.weights}: no such file; give a .safetensors file")
            return Path(self.settings.weights)
        folder = self.folder
        assert folder is not None
        which = self.settings.checkpoint
        found = [*folder.glob(f"generators/{which}/*.safetensors"), *folder.glob(f"saved/{which}/*.safetensors")]
        files = {file.stem: file for file in found}
        if not files:
            remedy = f", or set {self._key}.checkpoint=last" if which == "best" else ""
            raise UserError(f"{self._key}: {folder} holds no {which} weights; name a finished run's folder{remedy}")
        return files[self._network(files)]

    def load(self) -> nn.Module:
        """The trained network, in eval mode on the CPU."""
        from hpcdistill.models.registry import load_generator

        return load_generator(self.file)[0]

    def untrained(self) -> nn.Module:
        """The network as it will be, before the run is there; the trained one where it is not trained by this run."""
        if self.run is None:
            return self.load()
        method = self.run.untrained()
        networks = {**method.generators, **method.saved}
        return networks[self._network(networks)]

    def _network(self, names: Mapping[str, Any]) -> str:
        """The name of the run's network that is meant, of `names`."""
        wanted = self.settings.network
        if wanted is None:
            wanted = self.role if self.role in names else next(iter(names)) if len(names) == 1 else None
        if wanted is None:
            raise UserError(
                f"{self._key}.network: the run has several networks; name one of {', '.join(sorted(names))}"
            )
        if wanted not in names:
            raise UserError(f"{self._key}.network: the run has no network '{wanted}'; {nearest(wanted, names)}")
        return wanted

    @property
    def _which(self) -> list[str]:
        return [self.settings.checkpoint, *([self.settings.network] if self.settings.network else [])]

    @property
    def _key(self) -> str:
        return role_key(self.role)


class Runs:
    """Loads runs from command lines; files are read once, and a command line that was loaded is not loaded again."""

    def __init__(self) -> None:
        self.files = ConfigFiles()
        self._loaded: dict[tuple[str, ...], Run] = {}

    def load(self, arguments: Sequence[str], origins: Mapping[str, str] = MappingProxyType({})) -> Run:
        """The run of the files and `key=value` overrides in `arguments`, and the runs that fill its method's roles.

        `origins`: where an override is from, for messages, when that is not the command line.
        Raises UserError for a missing or damaged file, a wrong key or an impossible value.
        """
        key = tuple(arguments)
        if key not in self._loaded:
            self._loaded[key] = self._load(key, origins)
        return self._loaded[key]

    def _load(self, arguments: Sequence[str], origins: Mapping[str, str]) -> Run:
        files = tuple(user_path(argument) for argument in arguments if not is_override(argument))
        overrides = tuple(argument for argument in arguments if is_override(argument))
        if not files:
            raise UserError("no configuration file given; e.g. configs/dssd/x4.yaml")
        data_root()  # the files have the same variable in them: what is wrong with it is said by its name
        laid_over = [layer for file in files[1:] for layer in self.files.layers(file)]
        laid_over += [(origin_of(override, origins), self.files.override(override)) for override in overrides]
        config = self.files.checked([*self.files.layers(files[0]), *laid_over])
        shared = [(origin, without(values, OWN_KEYS)) for origin, values in laid_over]
        return Run(config, files, overrides, self._teachers(config, files[0], shared, (files[0].resolve(),)))

    def _teachers(
        self, config: RunConfig, file: Path, shared: Sequence[Layer], seen: tuple[Path, ...]
    ) -> dict[str, Teacher]:
        """Who fills the roles of `config`; `shared` reaches every run behind it, `seen` are the files before it."""
        teachers = {}
        for role, settings in config.roles.items():
            run = None
            if settings.config is not None:
                path = Path(settings.config)
                carried_out: Layer = (str(file), {"train": carried_out_by(config)})
                special = (f"{role_key(role)}.overrides", settings.overrides)
                taught = self.files.checked([carried_out, *self.files.layers(path), *shared, special])
                if path.resolve() in seen:
                    raise UserError(f"{path}: is its own teacher, by way of {seen[-1]}; name another configuration")
                run = Run(taught, (path,), (), self._teachers(taught, path, shared, (*seen, path.resolve())))
            teachers[role] = Teacher(role, settings, run)
        return teachers


def load_run(arguments: Sequence[str], origins: Mapping[str, str] = MappingProxyType({})) -> Run:
    """One run from its command line; see `Runs.load`."""
    return Runs().load(arguments, origins)


def of_another_length(run: Run) -> list[Path]:
    """Folders of runs of this name that differ from the run in nothing but their length, the newest last.

    Their teachers may be of another length, too: what a command line says of steps, it says to all.
    """
    near = {role: _alike(teacher) for role, teacher in run.teachers.items()}
    wanted = _without_length(json.loads(json.dumps(run.identity)))
    found = []
    pattern = f"{run.config.name}-{'[0-9a-f]' * IDENTITY_DIGITS}/environment.json"
    for file in Path(run.config.runs).glob(pattern):
        try:
            record = read_environment(file.parent)["identity"]
            taught = {**({"teacher": record["teacher"]} if "teacher" in record else {}), **record.get("teachers", {})}
            alike = taught.keys() == near.keys() and all(taught[role] in near[role] for role in near)
            if alike and _without_length(record) == wanted:
                found.append((file.stat().st_mtime, file.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # whoever asks for that run is told what is wrong with it
    return [folder for _, folder in sorted(found)]


def _alike(teacher: Teacher) -> list[list[str]]:
    """The identities of a teacher that differ in nothing but its length."""
    own, *which = teacher.identity
    others = [folder.name[-IDENTITY_DIGITS:] for folder in of_another_length(teacher.run)] if teacher.run else []
    return [[short, *which] for short in (own, *others)]


def weights_file(path: Path, network: str) -> Path:
    """A network's weights: `path` itself, or the last ones of the run folder `path`, a discriminator's too."""
    places = [path / kind / "last" / f"{network}.safetensors" for kind in ("generators", "saved")]
    file = next((place for place in places if place.is_file()), places[0]) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"init.{network}: {file} does not exist; give a .safetensors file or a finished run's folder")
    refuse_other_kinds(file)
    return file


def relative_place(place: str) -> str:
    """A data set's place below the data root; as it is given where it is elsewhere (its path in full) or remote."""
    if is_remote(place):
        return place
    full, root = _absolute(Path(place)), _absolute(data_root())
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(full)


def _absolute(path: Path) -> Path:
    """`path` from the root of the file system, its links left as they are: a linked data set is in the data root."""
    return Path(os.path.normpath(path.absolute()))


def _short_of(folder: Path, key: str) -> str:
    """The identity's digits of the finished run in `folder`."""
    short = read_environment(folder)["identity"].get("short")
    if not isinstance(short, str):
        raise UserError(f"{key}.run: {folder} is no run's folder: its environment.json names no run")
    return short


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _without_length(record: dict[str, Any]) -> dict[str, Any]:
    """The identity's record without what says how long the run is, and without its teachers."""
    values = dict(record["values"])
    train = {key: value for key, value in values.pop("train", {}).items() if key not in ("steps", "epochs")}
    rest = {key: value for key, value in record.items() if key not in ("short", "teacher", "teachers", "values")}
    return rest | {"values": values | ({"train": train} if train else {})}
