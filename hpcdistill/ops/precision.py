"""Full float32 where a result must not depend on the precision that the training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Neither autocast nor TensorFloat-32 on devices of the type `device`.

    Only what is on is switched off, so that no exporter or cost counter meets a context that it does not know.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if device == "cuda":
            kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            stack.enter_context(cudnn.flags(enabled=True, allow_tf32=False, **kept))
        yield
