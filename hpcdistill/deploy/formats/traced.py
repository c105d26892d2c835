"""A network as TorchScript, which pnnx and OpenVINO's frontend read: one pass of an example, recorded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def traced(network: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """`network` (in eval mode, on the CPU), recorded: it takes any size, and what it asks of one is not inside."""
    with _quiet(), torch.no_grad(), _usual_operations(), _Sliced():
        recorded = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        return cast(torch.jit.ScriptModule, recorded)


def save(recorded: torch.jit.ScriptModule, path: Path) -> None:
    """Write what `traced` gave, for pnnx."""
    with _quiet():
        torch.jit.save(recorded, str(path))


class _Sliced(TorchFunctionMode):
    """Slices in place of `narrow`, the same pixels: pnnx knows no `narrow`, and ends well all the same."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is Tensor.narrow and not named:
            image, axis, start, length = arguments
            return image[(slice(None),) * (axis % image.ndim) + (slice(start, start + length),)]
        return function(*arguments, **(named or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch has deprecated TorchScript, and warns of every size that the network looks at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _usual_operations() -> Iterator[None]:
    """Without the longer forms that `ops.repeatable` takes for the sake of backward passes, which there is none of."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
