"""What every exporter has in common: it writes a network, and opens what it has written with another runtime."""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpcdistill.deploy.description import Description
from hpcdistill.deploy.session import Session
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
    session: Session


@dataclass(frozen=True)
class Verified:
    """What came out when an export was compared with PyTorch; see `deploy.verification`."""

    runtime: str  # with its version
    sizes: tuple[tuple[int, int], ...]  # (height, width) of the images that were compared
    difference: float  # the largest, of values in [0, 1]
    allowed: float
    psnr: float | None = None  # dB, of what PyTorch makes of a photograph; None for translation
    psnr_change: float | None = None  # dB, of what the export makes of it, less that


@dataclass(frozen=True)
class NotVerified:
    """Why an export was compared with nothing: what runs it is not here."""

    reason: str


class Format(ABC):
    """One way out of the lab."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of the file that is named to whatever opens it
    extra: ClassVar[str | None] = None  # of pyproject.toml, that brings what it needs
    modules: ClassVar[tuple[str, ...]] = ()  # that extra's, as they are imported
    tolerance: ClassVar[float] = 1e-4  # the largest difference from PyTorch, of values in [0, 1], in float32
    half_tolerance: ClassVar[float] = 1 / 255  # the same with 16-bit weights: one level of 8 bits
    options: ClassVar[frozenset[str]] = frozenset()  # fields of `Options` that it knows

    def check(self, network: nn.Module, about: Description, options: Options) -> None:
        """UserError when a package is missing, an option is unknown here, or the network cannot be written so."""
        self.check_packages()
        default = Options()
        for option in ("graph", "half", "opset"):
            if getattr(options, option) != getattr(default, option) and option not in self.options:
                raise UserError(f"--{option} is not for {self.name}; leave it out")

    def check_packages(self) -> None:
        """UserError, naming the extra, when a package is missing."""
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
                f"make install, or pip install -e '.[{self.extra}]' in the clone"
            )

    def remarks(self, path: Path, about: Description, options: Options) -> tuple[str, ...]:
        """What whoever uses the file would not guess, a line each, for the command to print."""
        return ()

    @abstractmethod
    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        """Write `network` (in its inference form, on the CPU) to `path` and whatever must lie beside it.

        Returns all files, `path` first. Files are whole or absent. What a training mode would change is written as in
        eval mode (`in_eval_mode`), whatever mode `network` is in.
        """

    @abstractmethod
    def open(self, path: Path) -> Opened:
        """What `write` has written, in the runtime that its users have. UserError for a file that is not ours."""

    def verify(
        self, network: nn.Module, about: Description, path: Path, options: Options, allowed: float
    ) -> Verified | NotVerified:
        """Compare what was written to `path` with `network`, which is in eval mode, in PyTorch.

        UserError for a difference beyond `allowed`. NotVerified when there is nothing here to run it.
        """
        from hpcdistill.deploy.verification import compare

        return compare(network, about, self.open(path).session, self.runtime(), allowed)

    def runtime(self) -> str:
        """What `verify` runs the export in, for messages."""
        return self.name

    def is_ours(self, path: Path) -> bool:
        """Whether hpcdistill wrote the file, so that it may be replaced."""
        try:
            self.open(path)
        except UserError:
            return False
        return True


def beside(path: Path, suffix: str) -> Path:
    """The file of the same name with another suffix."""
    return path.with_suffix(suffix)


def in_eval_mode(network: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode.

    Exporters write Dropout alive, and InstanceNorm with the image's statistics in place of the tracked ones, from a
    network in training mode, without a word.
    """
    return copy.deepcopy(network).cpu().eval()


def example(about: Description) -> Tensor:
    """`[2, channels, H, W]` to trace with: no axis has a size that a tracer takes for a constant.

    A U-Net's innermost map is not 1x1, which would fix it; H is not W.
    """
    if about.task == "translation":
        unit = _unit(about)
        return torch.zeros(2, about.channels, 2 * unit, 3 * unit)
    return torch.zeros(2, about.channels, max(24, about.smallest), max(40, about.smallest))


def dynamic_axes(about: Description) -> dict[int, Any]:
    """The axes that may have any size, by number, as `torch.export` takes them: named, in multiples that fit."""
    dimension = torch.export.Dim
    sides: list[Any] = []
    for name in ("height", "width"):
        if about.multiple == 1:
            sides.append(dimension(name, min=about.smallest))
        else:
            sides.append(about.multiple * dimension(name[0], min=_unit(about) // about.multiple))
    return {0: dimension("batch", min=1), 2: sides[0], 3: sides[1]}


def other_sizes(about: Description) -> tuple[tuple[int, int], ...]:
    """(height, width) of the smallest image, an odd one, and one that is larger than `example`."""
    if about.task == "translation":
        unit = _unit(about)
        odd = 4 * unit // about.multiple - 1
        sides = odd * about.multiple, max(odd - 2, 1) * about.multiple
        return (unit, unit), sides, (3 * unit, 4 * unit)
    least = about.smallest
    return (least, least), (max(37, least), max(53, least)), (max(61, least), max(90, least))


def _unit(about: Description) -> int:
    """The smallest side that is large enough and fits."""
    return -(-about.smallest // about.multiple) * about.multiple
