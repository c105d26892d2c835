"""Full float32 where a result must not depend on the precision that the training uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Neither autocast nor TensorFloat-32 on devices of the type `device`.

    Only what is on is switched off, so that no exporter or cost counter meets a context that it does not know.
    """
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if device == "cuda":
            stack.enter_context(_no_tensor_float32())
        yield


class _Users:
    """The switch belongs to the process, whose threads may train a run each: the last one puts it back."""

    lock = threading.Lock()
    count = 0
    undo = ExitStack()


@contextmanager
def _no_tensor_float32() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    with _Users.lock:
        if not _Users.count:
            kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            _Users.undo.enter_context(cudnn.flags(enabled=True, allow_tf32=False, **kept))
        _Users.count += 1
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if not _Users.count:
                _Users.undo.close()
