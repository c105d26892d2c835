"""PyTorch's default generators where several runs share a process: one thread at a time draws from them.

A run alone seeds them before every step, so that what a step draws follows from (seed, step, rank). They belong to the
process, not to a thread: side by side a step of one run would take, or begin anew, the numbers of another. No method
of ours draws from them in a step (pools and augmentation have generators of their own), and that is checked: the first
step of each segment is made alone, seeded, and must leave the generators as it found them; later steps are not seeded,
and must not move them either. A run whose method draws is Crowded: it is trained alone, after the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from hpcdistill.errors import Crowded

_States = list[bytes]


class _Turns:
    """Who may draw: one thread, while no other makes a step, whose check it would spoil."""

    def __init__(self) -> None:
        self.sharing = False
        self.changed = threading.Condition()  # of what is below
        self.owner: int | None = None  # the thread that draws
        self.waiting = 0  # threads that want to: they go before new steps, or they would wait for ever
        self.stepping: set[int] = set()
        self.seeded: _States | None = None  # by the owner, in this step


_turns: Final = _Turns()


def is_shared() -> bool:
    """Whether several runs are trained in this process now."""
    return _turns.sharing


@contextmanager
def sharing() -> Iterator[None]:
    """While it lasts the process has several runs."""
    _turns.sharing = True
    try:
        yield
    finally:
        _turns.sharing = False


@contextmanager
def drawing() -> Iterator[None]:
    """While it lasts this thread alone draws: where networks are built, say. Nothing for a run alone."""
    if not _turns.sharing:
        yield
        return
    me = threading.get_ident()
    with _turns.changed:
        _turns.waiting += 1
        _turns.changed.notify_all()
        try:
            _turns.changed.wait_for(lambda: _turns.owner in (None, me) and not _turns.stepping - {me})
        finally:
            _turns.waiting -= 1
            _turns.changed.notify_all()  # an interrupted one lets the others go on
        before, _turns.owner = _turns.owner, me
    try:
        yield
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # what was made here and is kept for all may be used in other streams
    finally:
        with _turns.changed:
            _turns.owner = before
            _turns.changed.notify_all()


def seed_step(seed: int) -> None:
    """Seed the generators for a step, unless that would take them from another run's."""
    if not _turns.sharing:
        torch.manual_seed(seed)
    elif _turns.owner == threading.get_ident():
        torch.manual_seed(seed)
        _turns.seeded = _states()


@contextmanager
def drawless_step(first: bool) -> Iterator[None]:
    """Around a step. Beside other runs: Crowded, when it has drawn; `first` of its segment in this session."""
    if not _turns.sharing:
        yield
    elif first:
        with drawing():
            _turns.seeded = _states()
            yield
            if _states() != _turns.seeded:
                raise Crowded(_MESSAGE)
    else:
        with _stepping():
            before = _states()
            yield
            if _states() != before:
                raise Crowded(_MESSAGE)


@contextmanager
def _stepping() -> Iterator[None]:
    """While it lasts nobody else begins to draw."""
    me = threading.get_ident()
    with _turns.changed:
        _turns.changed.wait_for(lambda: _turns.owner is None and not _turns.waiting)
        _turns.stepping.add(me)
    try:
        yield
    finally:
        with _turns.changed:
            _turns.stepping.discard(me)
            _turns.changed.notify_all()


_MESSAGE = "a step of a run draws from PyTorch's default generator, which runs side by side would share"


def _states() -> _States:
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators += torch.cuda.default_generators
    return [generator.get_state().numpy().tobytes() for generator in generators]
