"""One step of a run: each phase of the segment updates its group, from all micro-batches of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import torch

from hpcdistill.data.counter import step_seed
from hpcdistill.default_generator import seed_step
from hpcdistill.methods.base import Batch, Carry, Part, Phase, Progress, whole
from hpcdistill.training.batches import Cut, MicroBatches
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.deepspeed import replaced
from hpcdistill.training.graph import step_graph
from hpcdistill.training.metrics_log import RunningMeans
from hpcdistill.training.networks import Networks
from hpcdistill.training.nonfinite import NonFiniteGuard
from hpcdistill.training.optimization import TermGradients, TrainedGroup
from hpcdistill.training.segments import Courses
from hpcdistill.training.underflow import UnderflowWatch


class Updates:
    """Makes the updates of a run of `steps` steps, and adds what it measures to `means`."""

    def __init__(
        self,
        networks: Networks,
        guard: NonFiniteGuard,
        means: RunningMeans,
        config: TrainConfig,
        courses: Courses,
        *,
        seed: int,
        steps: int,
    ) -> None:
        self.networks, self.guard, self.means, self.config, self.courses = networks, guard, means, config, courses
        self.accelerator, self.seed, self.steps = networks.accelerator, seed, steps
        self.micro_batches = MicroBatches(self.accelerator, config, networks.layout)
        self.underflow = UnderflowWatch(self.accelerator)
        trained = [parameter for group in networks.groups.values() for parameter in group.parameters]
        self.graph = step_graph(config, self.accelerator, means, trained)

    def begin_segment(self) -> None:
        """Forget what was captured: the next step may have other phases, and a method may have changed itself."""
        if self.graph:
            self.graph.forget()

    def make(self, phases: Sequence[Phase], step: int, batches: Sequence[Batch]) -> None:
        """The updates of 0-based `step`, one a phase. Everything random in it follows from (seed, step, rank)."""
        seed = step_seed(self.seed, step, self.micro_batches.rank)
        cut = self.micro_batches.of(batches, step)
        progress = Progress.at(step, self.steps, self.seed, self.micro_batches.device)
        for group in self.networks.groups.values():
            group.schedule(*self.courses.at(group.name, step))
        every = self.config.gradient_norms_every
        measured = bool(every) and (step + 1) % every == 0
        if self.graph and not measured:
            self.graph.run(partial(self._compute, phases), cut, progress, seed)
        else:
            seed_step(seed)
            self._compute(phases, cut, progress, measured)

    def _compute(self, phases: Sequence[Phase], cut: Cut, progress: Progress, measured: bool = False) -> None:
        """The device's part of a step, which may be captured: no number of the host is in it but those of a segment.

        `measured`: with the norms of single terms' gradients.
        """
        carries = [[Carry() for _ in pieces] for pieces in cut]
        for number, phase in enumerate(phases):
            self._train(phase, cut[phase.batch], carries[phase.batch], progress, measured)
            if all(later.batch != phase.batch for later in phases[number + 1 :]):
                carries[phase.batch].clear()  # what was passed on is not needed any more
        self.networks.update_averages(self.guard.halted)
        self.guard.keep()

    def _train(
        self, phase: Phase, batches: Sequence[Batch], carries: Sequence[Carry], progress: Progress, measured: bool
    ) -> None:
        """One update of the phase's group."""
        group, freezer = self.networks.groups[phase.group], self.networks.freezer
        freezer.only(phase.group)
        if phase.before:
            with torch.no_grad():
                phase.before(batches, carries)
        gradients = self._term_gradients(group, len(batches)) if measured else None
        if len(batches) > 1:
            freezer.mark()
        for number, (batch, carry) in enumerate(zip(batches, carries, strict=True)):
            if number > 0:
                freezer.rewind()
            with group.micro_batch(last=number == len(batches) - 1):
                with self.accelerator.autocast():
                    loss = phase.loss(batch, carry, progress)
                    if isinstance(loss, dict) or group.collective:  # DeepSpeed reduces in any backward pass
                        loss = [partial(dict, whole(loss))]
                *others, last = loss
                with group.micro_batch(last=False) if others else contextlib.nullcontext():
                    for part in others:
                        self._backward(phase, group, part, gradients, len(batches))
                self._backward(phase, group, last, gradients, len(batches))
            if gradients:
                gradients.next_piece()
        self.means.add({f"gradient_norm/{phase.group}": group.update(self.guard.halted)})
        if phase.after:
            with torch.no_grad(), replaced([group]):
                phase.after(progress)

    def _backward(
        self, phase: Phase, group: TrainedGroup, part: Part, gradients: TermGradients | None, pieces: int
    ) -> None:
        """Compute one part of a phase's loss, and add its gradient."""
        with self.accelerator.autocast():
            terms = part()
        assert terms, f"phase {phase.name} returned no loss term"
        if gradients:
            self.means.add(self.underflow.measure(phase.name, terms, gradients.parameters))
            norms = gradients.add(terms, self.underflow.scale)
            self.means.add({f"gradient/{phase.name}/{term}": norm for term, norm in norms.items()})
        named = {f"{phase.name}/{term}": value for term, value in terms.items()}
        self.means.add(named)
        group.backward(self.guard.total(named) / pieces)

    def _term_gradients(self, group: TrainedGroup, pieces: int) -> TermGradients | None:
        """Measures the gradients of single terms; not under DeepSpeed, which reduces in any backward pass."""
        if group.collective:
            return None
        return TermGradients(self.networks.generator_parameters(group), pieces, self.accelerator)
