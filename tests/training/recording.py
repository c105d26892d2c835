"""A stand-in for CUDA graphs on a CPU: operations are recorded, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recording(TorchDispatchMode):
    """As a capture, it leaves no trace: what the step has changed in memory that was there before is put back.

    And as a graph it knows nothing of Python: `replay` repeats the operations with the numbers and tensors of then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.replays = 0
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: its bytes, and what they were
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "profiler":
            return function(*arguments, **(options or {}))
        arguments, options = tree_map(_alias, (arguments, options or {}))
        for x in _tensors((arguments, options)):
            if x.untyped_storage()._cdata not in self._made:
                self._keep(x)
        result = function(*arguments, **options)
        made = [_alias(x) for x in tree_leaves(result)]
        for x in _tensors(made):
            if x.untyped_storage()._cdata not in self._before:
                self._made[x.untyped_storage()._cdata] = x.untyped_storage()
        self.operations.append((function, arguments, options, made))
        return result

    def undo(self) -> None:
        for now, before in self._before.values():
            now.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, arguments, options, made in self.operations:
            for old, new in zip(made, tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)

    def _keep(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._before:
            content = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage._cdata] = (content, content.clone())


def record(step: Callable[[], None]) -> Callable[[], None]:
    """To be put into `graph.CAPTURES` for "cpu"."""
    recording = Recording()
    try:
        with recording:
            step()
    finally:
        recording.undo()
    return recording.replay


def _alias(x: Any) -> Any:
    """The same memory as it is seen now: an operation may change the shape of a tensor object in place."""
    return x.detach() if isinstance(x, Tensor) else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
