"""What two steps are compared by: operations, numbers, and which memory they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpcdistill.training.trace import StepTrace

CPU = torch.device("cpu")
KEPT = torch.arange(6.0)


def traced(step: Callable[[], Any], device: torch.device = CPU) -> StepTrace:
    trace = StepTrace(device)
    with trace:
        step()
    return trace


def difference(one: Callable[[], Any], other: Callable[[], Any]) -> str | None:
    first = traced(one)
    return first.difference(traced(other))


def test_what_is_made_within_may_lie_anywhere() -> None:
    held = []

    def step() -> None:
        held.append((KEPT * 2 + 1).view(2, 3).sum(0))

    assert difference(step, step) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: KEPT * 2, lambda: KEPT * 3),
        (lambda: KEPT * 2, lambda: KEPT.clone() * 2),
        (lambda: KEPT[:3] * 2, lambda: KEPT[3:] * 2),
        (lambda: KEPT.view(2, 3).sum(0), lambda: KEPT.view(2, 3).sum(1)),
        (lambda: torch.where(KEPT > 0, 1.0, 2.0), lambda: torch.where(KEPT > 0, 1.0, 3.0)),
        (lambda: (KEPT * 2).sum(), lambda: KEPT * 2),
    ],
)
def test_a_difference_is_found(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert difference(one, other) is not None
    assert difference(one, one) is None
    assert difference(other, other) is None


def test_not_a_number_is_a_number() -> None:
    assert difference(lambda: KEPT + float("nan"), lambda: KEPT + float("nan")) is None


def test_tensors_of_the_host_are_told_apart_although_their_memory_is_used_again() -> None:
    trace = StepTrace(CPU)
    with trace:
        for _ in range(50):
            torch.tensor(0.5)
    assert len({operation.values[0] for operation in trace.operations}) == 50


def test_the_backward_pass_is_seen() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(factor: float) -> Callable[[], Any]:
        return lambda: torch.autograd.grad((weight * factor).sum(), weight)

    assert [operation.name for operation in traced(step(2.0)).operations].count("mul") == 2
    assert difference(step(2.0), step(2.0)) is None
    assert difference(step(2.0), step(3.0)) is not None


@pytest.mark.parametrize(
    "read",
    [
        lambda: KEPT.sum().item(),
        lambda: bool(KEPT[0] == 0),
        lambda: KEPT.nonzero(),
        lambda: torch.equal(KEPT, KEPT),
        lambda: KEPT[KEPT > 1],
        lambda: KEPT.clone().index_put_((KEPT > 1,), torch.zeros(())),
        lambda: KEPT.masked_select(KEPT > 1),
        lambda: KEPT.unique(),
    ],
)
def test_reading_is_refused(read: Callable[[], Any]) -> None:
    reason = traced(read).reason
    assert reason is not None
    assert "training/test_trace.py:" in reason
    assert "reads from the device" in reason


@pytest.mark.parametrize("fine", [lambda: KEPT[torch.tensor([1, 2])], lambda: KEPT[1:], lambda: KEPT.argsort()])
def test_indexing_with_numbers_reads_nothing(fine: Callable[[], Any]) -> None:
    assert traced(fine).reason is None


def test_a_number_on_the_cpu_is_handed_over_with_the_launch() -> None:
    """And counts as a number; the device `meta` stands for a GPU."""
    meta = torch.device("meta")

    def step(value: float) -> Callable[[], Any]:
        return lambda: torch.ones(2, device=meta) * torch.tensor(value)

    one, same, other = (traced(step(value), meta) for value in (0.5, 0.5, 0.75))
    assert one.reason is None
    assert one.difference(same) is None
    assert one.difference(other) is not None


@pytest.mark.parametrize("elsewhere", [lambda: torch.ones(2), lambda: torch.tensor(0.5).to("meta")])
def test_work_on_the_cpu_is_refused(elsewhere: Callable[[], Any]) -> None:
    reason = traced(elsewhere, torch.device("meta")).reason
    assert reason is not None
    assert "computes on cpu" in reason
