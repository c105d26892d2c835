"""What a step does, operation by operation: two steps are compared to find whether a graph of one would be the other.

A CUDA graph repeats kernels on the same memory with the same numbers. So a step can be captured when the next one is
the same but for what its input tensors hold: nothing is read back, no tensor is made on the host, no number changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import accelerate
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that give Python a number, or a tensor whose shape depends on one.
_READS: Final = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING: Final = ("index", "index_put", "index_put_", "_index_put_impl_")  # only with a mask of booleans
_COPYING: Final = ("_to_copy", "copy_", "copy")


@dataclass(frozen=True)
class Operation:
    """One operation; two are equal when they do the same with the same memory."""

    name: str
    values: tuple[Any, ...]  # numbers as text; of a tensor its memory, shape, strides, offset, dtype
    where: str  # FILE:LINE that asked for it


class StepTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is done on `device` while it lasts; `reason` says why it could not be captured at all.

    It keeps no memory of the step alive, only the names of it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.operations: list[Operation] = []
        self.reason: str | None = None
        # A weak reference keeps a storage's address from being given to another one.
        self._storages: dict[int, tuple[StorageWeakRef, str]] = {}
        self._made = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function.namespace == "profiler":  # marks of the optimizer's step, not work
            return function(*arguments, **options)
        name, where = function.overloadpacket.__name__, _caller()
        given = tree_leaves((arguments, options))
        self._judge(function, name, given, where)
        values = [self._value(x, made=False) for x in given]
        result = function(*arguments, **options)
        made = tree_leaves(result)
        values += [self._value(x, made=True) for x in made]
        self._check_devices(name, [*given, *made], where)
        self.operations.append(Operation(name, tuple(values), where))
        return result

    def refuse(self, reason: str) -> None:
        """Note why the step cannot be captured; the first reason counts."""
        self.reason = self.reason or reason

    def difference(self, other: StepTrace) -> str | None:
        """What the step `other`, recorded while this one was there, does differently, in words; None: nothing."""
        for one, two in zip(self.operations, other.operations, strict=False):
            if one.name != two.name:
                return f"{two.where} runs {two.name} in one step where the step before ran {one.name} ({one.where})"
            if one.values != two.values:
                return (
                    f"{two.where} gives {two.name} another number, shape or tensor in each step; "
                    "let it follow from the batch, progress.step and progress.share"
                )
        if len(self.operations) != len(other.operations):
            return f"a step of {len(self.operations)} operations is followed by one of {len(other.operations)}"
        return None

    def _judge(self, function: Any, name: str, given: list[Any], where: str) -> None:
        tensors = [x for x in given if isinstance(x, Tensor)]
        reads = any(tag in _READS for tag in function.tags)
        if name in _INDEXING:
            reads = any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        if reads:
            self.refuse(f"{where} reads from the device ({name})")
        if any(isinstance(x, torch.Generator) for x in given):
            self.refuse(f"{where} draws from a generator of its own ({name})")

    def _check_devices(self, name: str, values: list[Any], where: str) -> None:
        """A graph has what one device does; a number may lie on the CPU, which hands it over with the launch."""
        others = [x for x in values if isinstance(x, Tensor) and x.device.type != self.device.type]
        if any(x.ndim for x in others) or (others and name in _COPYING):
            self.refuse(f"{where} computes on {others[0].device.type} ({name})")

    def _value(self, x: Any, *, made: bool) -> Any:
        if not isinstance(x, Tensor):
            return repr(x)
        if x.device.type != self.device.type and x.device.type == "cpu" and x.ndim == 0:
            return repr(x.item())
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            self._made += made
            name = f"made {self._made}" if made else f"at {storage._cdata}"
            self._storages[storage._cdata] = (StorageWeakRef(storage), name)  # type: ignore[no-untyped-call]
        return (self._storages[storage._cdata][1], tuple(x.shape), x.stride(), x.storage_offset(), x.dtype)


def _caller() -> str:
    """FILE:LINE of the innermost line that is no part of torch, accelerate or this file."""
    outside = (frame for frame in _frames() if not _is_inside(frame.f_code.co_filename))
    frame = next(outside, None)
    if frame is None:
        return "the backward pass"
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back


_LIBRARIES: Final = (*torch.__path__, *accelerate.__path__)


def _is_inside(file: str) -> bool:
    return file == __file__ or file.startswith((*_LIBRARIES, "<"))
