"""Names to classes. A class is imported when it is asked for, so that a configuration is read without torch."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from hpcdistill.errors import UserError, nearest

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Registry(MutableMapping[str, Any]):
    """The `kind`s of thing (networks, methods) by name; an entry is a class or its import path `package.module:Class`.

    With `open` a name that is itself an import path needs no entry: so a configuration names a class of one's own.
    What names from foreign files are looked up in is never open.
    """

    def __init__(self, kind: str, entries: dict[str, str], open: bool = False) -> None:
        self.kind = kind
        self.open = open
        self._entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> Any:
        """The class; UserError, with the nearest name, for one that is not known."""
        self.check(name)
        entry = self._entries.get(name, name)
        return imported(entry, self.kind) if isinstance(entry, str) else entry

    def get(self, name: str, default: Any = None) -> Any:
        """The class of an entry, `default` where there is none."""
        return self[name] if name in self else default  # noqa: SIM401 - it is what `get` is

    def check(self, name: str) -> None:
        """UserError unless `name` has an entry or is an import path; imports nothing."""
        if name not in self._entries and not (self.open and _PATH.fullmatch(name)):
            raise UserError(f"unknown {self.kind} '{name}'; {nearest(name, self)}")

    def known(self, name: str) -> str:
        """`check` for a field of a configuration: ValueError instead."""
        try:
            self.check(name)
        except UserError as error:
            raise ValueError(str(error)) from None
        return name

    def paths(self) -> list[str]:
        """The import paths of the entries that are no classes."""
        return [entry for entry in self._entries.values() if isinstance(entry, str)]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __setitem__(self, name: str, entry: Any) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """The names that have an entry."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def imported(path: str, kind: str) -> Any:
    """What `package.module:Class` names; UserError when it cannot be imported."""
    module, _, name = path.partition(":")
    if not module.startswith("hpcdistill.") and (here := str(Path.cwd())) not in sys.path:
        # `python -m` has this folder there, `python slurm/submit_ablations.py` has not.
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"no {kind} '{path}': {error}; write package.module:Class of a module that Python finds "
            "(in this folder, installed, or on PYTHONPATH)"
        ) from None
    return found
