"""What every exporter has in common: it writes a network, and opens what it has written with another runtime."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hpcdistill.deploy.description import Description
from hpcdistill.errors import UserError


@dataclass(frozen=True)
class Options:
    """What the command line asks of an exporter; one that knows no such thing refuses it."""

    graph: str = "luma"  # or "rgb": colour, chroma and clamp inside
    half: bool = False  # weights of 16 bits
    opset: int | None = None


@dataclass(frozen=True)
class Opened:
    """A file that was exported, ready to run, and what it says of itself."""

    about: Description
    session: Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Format(ABC):
    """One way out of the lab."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of the file that is named to whatever opens it
    extra: ClassVar[str | None] = None  # of pyproject.toml, that brings what it needs
    modules: ClassVar[tuple[str, ...]] = ()  # that extra's, as they are imported
    tolerance: ClassVar[float] = 1e-4  # the largest difference from PyTorch, of values in [0, 1], in float32
    options: ClassVar[frozenset[str]] = frozenset()  # fields of `Options` that it knows

    def check(self, network: nn.Module, about: Description, options: Options) -> None:
        """UserError when a package is missing, an option is unknown here, or the network cannot be written so."""
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
                f"make install, or pip install -e '.[{self.extra}]' in the clone"
            )
        default = Options()
        for option in ("graph", "half", "opset"):
            if getattr(options, option) != getattr(default, option) and option not in self.options:
                raise UserError(f"--{option} is not for {self.name}; leave it out")

    @abstractmethod
    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        """Write `network` (in its inference form, in eval mode, on the CPU) to `path` and whatever must lie beside it.

        Returns all files, `path` first. Files are whole or absent.
        """

    @abstractmethod
    def open(self, path: Path) -> Opened:
        """What `write` has written, in the runtime that its users have. UserError for a file that is not ours."""


def beside(path: Path, suffix: str) -> Path:
    """The file of the same name with another suffix."""
    return path.with_suffix(suffix)
