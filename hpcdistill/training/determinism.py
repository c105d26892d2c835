"""`train.deterministic`: the same run on the same device, bit for bit.

What is random in a run comes from its seed anyway. What is left is the order in which GPU kernels add: it is fixed
here for the time of a run. The operations of our networks and losses that have no such kernel take another form
(`ops.repeatable`). The number of threads and of processes stays part of what must be the same.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, Final

import torch

from hpcdistill.console import say
from hpcdistill.errors import UserError

# docs/training.md has the measurement.
COST_ON_CPU: Final = "costs 4 % of a GAN's step on a CPU, nothing of a super-resolution network's"
_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")  # the values with which cuBLAS repeats itself
_REFUSAL = re.compile(r"(\w+) does not have a deterministic implementation")


def prepare_determinism() -> None:
    """Set what must be set before CUDA starts; UserError when that is too late. It stays set and harms nobody."""
    value = os.environ.get(_VARIABLE)
    if value is not None and value not in _REPEATABLE:
        raise UserError(
            f"train.deterministic: {_VARIABLE} is {value}, with which cuBLAS does not repeat itself; "
            f"unset it, or use {_REPEATABLE[0]}"
        )
    if value is None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UserError(
                f"train.deterministic: CUDA has started already in this process, without {_VARIABLE}; "
                f"`export {_VARIABLE}={_REPEATABLE[0]}` before the program starts"
            )
        os.environ[_VARIABLE] = _REPEATABLE[0]


@contextlib.contextmanager
def deterministic(enabled: bool, device: torch.device) -> Iterator[None]:
    """While it lasts PyTorch repeats itself bit for bit on `device`; afterwards everything is as it was.

    UserError for an operation that has no deterministic form there. Does nothing unless `enabled`.
    """
    if not enabled:
        yield
        return
    cost = COST_ON_CPU if device.type == "cpu" else "its cost on a GPU is not measured"
    say(f"train.deterministic: bit-equal repeats on this device, with as many threads and processes; {cost}")
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # a check for reading what was never written; it costs a pass over memory
    try:
        yield
    except RuntimeError as error:
        if refusal := _REFUSAL.search(str(error)):
            raise UserError(
                f"train.deterministic: {refusal[1]} cannot be repeated bit for bit on {device.type}; "
                "use train.deterministic=false"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before[2:]
