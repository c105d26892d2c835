"""A NaN in any loss term of any method: the run stops with that term's name, and the last good weights are saved."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from processes import launch
from small_methods import METHODS, Ramp, build, samples_of
from torch import Tensor
from toy import Killed, ToyReader, kill_at, run, saved

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, Method, Part, Phase, Progress, Terms

BATCH, STEPS = 2, 14
ONCE = [name for name in METHODS if not name.endswith("gaussian")]
Weights = dict[str, dict[str, Tensor]]


class Injection:
    """Wraps the phases of a method: at the second call of one phase, one term is NaN.

    `seen` are the terms by name, `step` how many calls of the wrapped phase there were; `good` is what the generators
    were when the NaN came, `buffers` their buffers at the end of the step before.
    """

    def __init__(self, method: Method, phase: str = "", term: str = "", on_this_rank: bool = True) -> None:
        self.method, self.target, self.on_this_rank = method, (phase, term), on_this_rank
        self.seen: dict[str, None] = {}
        self.calls = 0
        self.good: Weights = {}
        segments = method.segments()
        wrapped = tuple(
            dataclasses.replace(segment, phases=tuple(self._wrapped(phase) for phase in segment.phases))
            for segment in segments
        )
        method.segments = lambda: wrapped  # type: ignore[method-assign]

    def before_step(self, step: int) -> None:
        """The reader's `before`: what the step starts with."""
        if not self.good:
            self.buffers = {
                name: {key: value.clone() for key, value in module.named_buffers()}
                for name, module in self.method.generators.items()
            }

    def _wrapped(self, phase: Phase) -> Phase:
        def loss(batch: Batch, carry: Carry, progress: Progress) -> Terms | Sequence[Part]:
            found = phase.loss(batch, carry, progress)
            spoil = False
            if phase.name == self.target[0]:
                self.calls += 1
                if self.calls == 2:
                    self.good = {
                        name: {key: value.clone() for key, value in module.state_dict().items()} | self.buffers[name]
                        for name, module in self.method.generators.items()
                    }
                    spoil = self.on_this_rank

            def seen(terms: Terms) -> Terms:
                self.seen |= dict.fromkeys(f"{phase.name}/{term}" for term in terms)
                spoilt = {term: value * torch.nan for term, value in terms.items() if spoil and term == self.target[1]}
                return terms | spoilt

            return seen(found) if isinstance(found, dict) else [lambda part=part: seen(part()) for part in found]

        return dataclasses.replace(phase, loss=loss)

    def check(self, folder: Path) -> None:
        for name, good in self.good.items():
            found = saved(folder, name=name)
            for key, value in found.items():
                torch.testing.assert_close(
                    value, good[key], rtol=0, atol=0, msg=lambda m, k=f"{name} {key}": f"{k}: {m}"
                )


def train(
    method: Method, name: str, before: Callable[[int], None], folder: Path, rank: int = 0, ranks: int = 1
) -> None:
    evaluator = Ramp() if name.startswith("dcd") else None
    run(method, ToyReader(BATCH, samples_of(name), rank, ranks, before), folder, STEPS, evaluator, log_every=3)


def stopped(error: pytest.ExceptionInfo[UserError], phase: str, term: str) -> None:
    message = str(error.value)
    assert message.startswith(f"the loss term {phase}/{term} became NaN or infinite by step "), message
    assert "\n" not in message


@pytest.mark.parametrize("name", ONCE)
def test_every_term_of_every_method(name: str, vgg: Path, tmp_path: Path) -> None:
    built = build(name, vgg)  # once: it reads VGG16
    first = Injection(copy.deepcopy(built))
    with pytest.raises(Killed):
        train(first.method, name, kill_at(3), tmp_path / "terms")
    assert len(first.seen) >= 1
    for key in first.seen:
        phase, term = key.split("/")
        injection = Injection(copy.deepcopy(built), phase, term)
        folder = tmp_path / term
        with pytest.raises(UserError) as error:
            train(injection.method, name, injection.before_step, folder)
        stopped(error, phase, term)
        assert injection.calls > 2 or name.startswith("dcd")  # it went on, masked, until the next line or evaluation
        injection.check(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "phase", "term"),
    [
        ("privileged_student", "student", "vid"),
        ("fesd_unpaired", "discriminator", "spectral_real"),
    ],
)
def test_on_one_of_two_ranks(name: str, phase: str, term: str, vgg: Path, tmp_path: Path) -> None:
    """The NaN is rank 1's alone: both stop with its name, and rank 0 has not stepped either."""

    def work(rank: int, of: int) -> None:
        injection = Injection(build(name, vgg), phase, term, on_this_rank=rank == 1)
        with pytest.raises(UserError) as error:
            train(injection.method, name, injection.before_step, tmp_path, rank, of)
        stopped(error, phase, term)
        injection.check(tmp_path)

    assert launch(2, work) == [0, 0]
