"""torchvision beside a CPU build of PyTorch, for packages that need its networks (pytorch-fid).

torchvision's published wheel is linked against CUDA. Beside a CPU build its library does not load, and importing it
ends in "operator torchvision::nms does not exist": it describes two operators that only the library defines. They are
defined here in the library's place; nothing that this project computes calls them. Call `ready` before any import of
torchvision or of what imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# What torchvision describes without asking whether its library is there.
_OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # libraries: an operator lives as long as the object that defined it


@lru_cache(maxsize=1)
def ready() -> None:
    """Make `import torchvision` work: does nothing beside a CUDA build, or where torchvision's own library loads."""
    if torch.version.cuda is not None or "torchvision" in sys.modules or _library_loads():
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _library_loads() -> bool:
    """Whether torchvision's compiled library can be loaded, without importing torchvision. True where it has none."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True  # the import says in its own words that it is not installed
    [folder] = package.submodule_search_locations
    libraries = [file for file in Path(folder).glob("_C.*") if file.suffix in (".so", ".pyd", ".dylib")]
    try:
        for file in libraries:
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return bool(libraries)
