"""The training loop, the same for every method. Read `Training.run` first: it is what a run does, from top to bottom.

One iteration: each phase of the segment trains its group. Everything random is derived from (seed, step), so that a
run resumed from a checkpoint continues as if it had never stopped. Nothing is read back from the device between two
log points; a non-finite loss masks every later update and ends the run at the next one.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.counter import step_seed
from hpcdistill.data.images import encode_png
from hpcdistill.data.read.loader import ReadAhead, StopWaiting
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, Method, Phase, Progress
from hpcdistill.ranks import watchdog
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.storage import write_bytes
from hpcdistill.training.accelerator import precision_of
from hpcdistill.training.batch_norm import synchronise
from hpcdistill.training.checkpoint import Checkpoint, Checkpoints
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.deepspeed import Copies, cuts_weights, gathered, make_groups, replaced, requested_settings
from hpcdistill.training.determinism import deterministic
from hpcdistill.training.evaluation import Evaluation, EvaluationStopped, Evaluator
from hpcdistill.training.metrics_log import MetricsLog, RunningMeans
from hpcdistill.training.nonfinite import NonFiniteGuard
from hpcdistill.training.optimization import Averages, Freezer, TermGradients, TrainedGroup
from hpcdistill.training.position import Position, best_of, restore_checkpoint, save_checkpoint, save_networks
from hpcdistill.training.progress import TrainingProgress
from hpcdistill.training.run_folder import RunFolder
from hpcdistill.training.segments import PutBack, Stretch, lay_out, load_weights_of
from hpcdistill.training.underflow import UnderflowWatch

LONGEST_SAVE = 10.0  # seconds that an error waits for a checkpoint that is being saved


class Reader(Protocol):
    """Batches by optimizer step."""

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        """This rank's batches of the steps first_step .. last_step - 1."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    finished: bool  # False: a signal stopped it, the checkpoint is saved
    position: Position
    images_per_second: float


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    line: bool
    evaluation: bool
    checkpoint: bool


class Training:
    """The training of a method: its networks, optimizers, averages and files, and where the run is."""

    def __init__(
        self,
        method: Method,
        reader: Reader,
        evaluator: Evaluator | None,
        folder: RunFolder,
        accelerator: Accelerator,
        config: TrainConfig,
        *,
        steps: int,  # of the whole run
        evaluate_every: int,
        seed: int,
        workers: int = 0,  # processes that load data
        name: str = "run",  # for the display
    ) -> None:
        self.method, self.reader, self.evaluator = method, reader, evaluator
        self.folder, self.accelerator, self.config = folder, accelerator, config
        self.steps, self.evaluate_every, self.seed, self.workers, self.name = steps, evaluate_every, seed, workers, name
        self.device = accelerator.device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.stretches = lay_out(method.segments(), steps, evaluator is not None)
        # Segments may begin with what was best for a generator of their own, not for the run's selected metric.
        self.judged = sorted({s.segment.judged for s in self.stretches if s.takes_best and s.segment.judged})
        self._build_groups()
        self.put_back = PutBack()
        self.checkpoints = Checkpoints(folder.checkpoints, confirm=folder.confirm)
        self.log, self.means = MetricsLog(folder.metrics, accelerator, folder.confirm), RunningMeans(self.device)
        self.position = Position()
        self._resume()
        self.guard = NonFiniteGuard(method.generators, self.device)
        self.underflow = UnderflowWatch(accelerator)

    def run(self, signals: StopSignals | None = None) -> Outcome:
        """Train to the end or to a signal; `signals` when the caller listens already.

        Raises UserError when a loss term stops being finite; the weights are then the last good ones, saved as `last`.
        However it ends, no process that loads data is left.
        """
        first = self.position.step
        pinned = self.device.type == "cuda"
        loader = self.reader.loader(first, self.steps, self.workers, pinned)
        listening = contextlib.nullcontext(signals) if signals else StopSignals()
        with (
            deterministic(self.config.deterministic, self.device),
            _closing(self.checkpoints, self.accelerator),
            listening as self.signals,
            TrainingProgress(self.name, first, self.steps, self.config.batch_size) as self.progress,
            contextlib.closing(_delivered(loader, self.config.timeout)) as batches,
        ):
            if self.position.due and self.evaluator is not None:
                self.evaluate()
                if self.position.due:
                    return self.stopped()
            earlier_seconds = self.position.seconds
            self.signals.restart()
            for step, batch in zip(range(first, self.steps), batches, strict=True):
                if batch is None:  # a signal came first; not with several ranks
                    if step > first:
                        self.raise_if_not_finite()
                        self.save(background=False)
                    return self.stopped()
                stretch = next(stretch for stretch in self.stretches if step < stretch.end)
                if step == stretch.start:
                    self.enter(stretch)
                self.take_step(stretch, step, batch)
                self.position.step = step + 1
                self.position.seconds = earlier_seconds + self.progress.seconds
                if self.position.step == stretch.end:
                    self.leave()
                stop = self.signals.agreed_at_step(self.accelerator)
                due = self.due(stop)
                if due.line or due.evaluation or due.checkpoint:
                    self.raise_if_not_finite()
                if due.line:
                    self.write_line()
                if due.evaluation:
                    self.evaluate()
                    stop = stop or self.position.due
                if stop or due.checkpoint:
                    self.save(background=not (stop or self.position.step == self.steps))
                if stop and (self.position.due or self.position.step < self.steps):
                    return self.stopped()
            return self.finished()

    # --- before the first step -------------------------------------------------------------------------------------

    def _build_groups(self) -> None:
        """Place the networks on the device and wrap each group with its optimizer (DDP, DeepSpeed)."""
        method, accelerator, config = self.method, self.accelerator, self.config
        if accelerator.is_main_process:
            for judged in self.judged:
                self.folder.generator(best_of(judged), "").parent.mkdir(exist_ok=True)
        method.to(self.device, memory_format=self.layout).train()  # type: ignore[call-overload]
        if config.batch_norm == "sync" and accelerator.num_processes > 1:
            for untrained in method.groups.values():
                synchronise(untrained.module)
        self.averages = Averages(method.generators, config.ema) if config.ema else None
        deepspeed = requested_settings(config)
        self.copies = Copies(method.generators) if not self.averages and cuts_weights(deepspeed) else None
        self.groups = make_groups(method.groups, accelerator, config, deepspeed)
        for group in self.groups.values():
            method.bind(group.name, group.wrapped)
        self.freezer = Freezer({name: group.module for name, group in self.groups.items()})
        self.generator_parameters = {p for module in method.generators.values() for p in module.parameters()}
        self.generating = [
            group for group in self.groups.values() if not self.generator_parameters.isdisjoint(group.parameters)
        ]

    def _resume(self) -> None:
        """Go on from the newest checkpoint in the run's folder, where there is one."""
        if found := _newest(self.checkpoints, self.accelerator):
            self.position = restore_checkpoint(found, self.method, self.groups, self.averages, self.folder)
            self.put_back.states = found.part("put_back")
            self.means.load(self.position.means)
            say(f"{self.name}: resuming at step {self.position.step} of {self.steps}")
        self.position.precision = precision_of(self.accelerator)
        self.log.rewind(self.position.log_bytes, self.position.step)
        self.log.start_trackers(self.position.step)

    # --- one step --------------------------------------------------------------------------------------------------

    def enter(self, stretch: Stretch) -> None:
        """Begin a segment: keep what it puts back, take the weights it asks for, let the method prepare itself."""
        segment, evaluated = stretch.segment, self.evaluated()
        with replaced(self.groups.values()):
            self.put_back.take(segment.put_back, self.method.generators, self._averaged())
            load_weights_of(segment, self.method, evaluated, self.folder, self.accelerator)
            if segment.on_enter:
                segment.on_enter()
        self.signals.restart()

    def leave(self) -> None:
        """End a segment: the weights that it promised to put back, before they are evaluated or saved."""
        if self.put_back.states:
            with replaced(self.groups.values()):
                self.put_back.give(self.method.generators, self._averaged())

    def take_step(self, stretch: Stretch, step: int, batch: Batch) -> None:
        """One update of each group of the segment's phases."""
        rank, size = self.accelerator.process_index, self.config.batch_size
        share = size // self.accelerator.num_processes
        torch.manual_seed(step_seed(self.seed, step, rank))
        first = step * size + rank * share
        batch = {"number": torch.arange(first, first + share), **batch}  # which of the run's draws they are
        batch = {key: _moved(value, self.device, self.layout) for key, value in batch.items()}
        parts = _cut(batch, self.config.accumulation)
        carries = [Carry() for _ in parts]
        progress = Progress.at(step, self.steps, self.seed, self.device)
        for group in self.groups.values():
            group.schedule(step, self.steps)
        for phase in stretch.segment.phases:
            self.train_phase(phase, parts, carries, progress)
        if self.averages:
            with gathered(self.generating):
                self.averages.update(self.guard.halted)
        self.guard.keep()
        self.progress.advance()
        watchdog.progress()

    def train_phase(self, phase: Phase, parts: Sequence[Batch], carries: Sequence[Carry], progress: Progress) -> None:
        """One update of the phase's group, from all micro-batches."""
        group = self.groups[phase.group]
        self.freezer.only(phase.group)
        if phase.before:
            with torch.no_grad():
                phase.before(parts, carries)
        measured = self._term_gradients(group, progress, len(parts))
        if len(parts) > 1:
            self.freezer.mark()
        for number, (part, carry) in enumerate(zip(parts, carries, strict=True)):
            if number > 0:
                self.freezer.rewind()
            with group.micro_batch(last=number == len(parts) - 1):
                with self.accelerator.autocast():
                    terms = phase.loss(part, carry, progress)
                assert terms, f"phase {phase.name} returned no loss term"
                if measured:
                    self.means.add(self.underflow.measure(phase.name, terms, measured.parameters))
                    norms = measured.add(terms, self.underflow.scale)
                    self.means.add({f"gradient/{phase.name}/{term}": norm for term, norm in norms.items()})
                named = {f"{phase.name}/{term}": value for term, value in terms.items()}
                self.means.add(named)
                group.backward(self.guard.total(named) / len(parts))
        self.means.add({f"gradient_norm/{phase.group}": group.update(self.guard.halted)})
        if phase.after:
            with torch.no_grad(), replaced([group]):
                phase.after(progress)

    def _term_gradients(self, group: TrainedGroup, progress: Progress, pieces: int) -> TermGradients | None:
        """Measures the gradients of single terms in the steps that `gradient_norms_every` names."""
        every = self.config.gradient_norms_every
        # DeepSpeed reduces in any backward pass.
        if not every or (progress.number + 1) % every or group.collective:
            return None
        of_generators = [p for p in group.parameters if p in self.generator_parameters]
        return TermGradients(of_generators or group.parameters, pieces, self.accelerator)

    # --- after a step ----------------------------------------------------------------------------------------------

    def due(self, stop: bool) -> Due:
        """What follows the step that was just made; `stop`: a signal has come."""
        step, end = self.position.step, self.position.step == self.steps
        before_best = any(step == stretch.start for stretch in self.stretches if stretch.takes_best)
        evaluation = self.evaluator is not None and (end or before_best or step % self.evaluate_every == 0)
        line = end or step % self.config.log_every == 0
        return Due(line, evaluation, end or stop or step % self.config.checkpoint_every == 0)

    def raise_if_not_finite(self) -> None:
        """Stop the run when an update was masked, with the last good weights saved."""
        what = self.guard.found(self.accelerator)
        if what is None:
            return
        self.guard.restore()
        self.save_networks("last")
        raise UserError(
            f"{what} became NaN or infinite by step {self.position.step}; the last good weights are in "
            f"{self.folder.path}/generators/last. "
            "Lower the learning rate, set clip_norm in the method's optimizer, or use train.precision=fp32"
        )

    def write_line(self) -> None:
        """The means since the last line, to metrics.jsonl, the trackers and the display."""
        step = self.position.step
        values = self.means.read(self.accelerator)
        rates = {f"learning_rate/{group.name}": group.rate for group in self.groups.values()}
        images, seconds = step * self.config.batch_size, round(self.position.seconds, 3)
        self.log.write({"step": step, "images": images, **values, **rates, "seconds": seconds})
        others = ("gradient/", "gradient_norm/", "underflow/")  # what is shown is summed: loss terms alone
        self.progress.show_losses({key: value for key, value in values.items() if not key.startswith(others)})

    def evaluate(self) -> None:
        """Evaluate; when a signal interrupts it, the position says that it is still due."""
        assert self.evaluator is not None
        self.freezer.release()
        self.position.due = True
        with contextlib.suppress(EvaluationStopped):
            evaluation = self.evaluator(self.evaluated(), self.accelerator, self._told_to_stop)
            self.position.due = False
            self.take_in(evaluation)
        self.method.train()

    def take_in(self, evaluation: Evaluation) -> None:
        """Log an evaluation, draw the samples, and keep the weights when they are the best so far."""
        assert self.evaluator is not None
        position, metrics, selects = self.position, evaluation.metrics, self.evaluator.selects
        position.last = {"step": position.step, "metrics": metrics}
        self.log.write({"step": position.step, **metrics})
        self.progress.show_evaluation({selects: metrics[selects]} if selects else metrics)
        if self.accelerator.is_main_process:
            for name, picture in evaluation.pictures.items():
                write_bytes(self.folder.samples / f"{name}-{position.step:08d}.png", encode_png(picture))
        if _better(selects, position.last, position.best, self.evaluator):
            position.best = position.last
            self.save_networks(best_of(None))
        for judged in self.judged:
            metric = f"{judged}/{selects.partition('/')[2]}" if selects else None
            if _better(metric, position.last, position.bests.get(judged), self.evaluator):
                position.bests[judged] = position.last
                self.save_networks(best_of(judged))

    def evaluated(self) -> Mapping[str, nn.Module]:
        """The generators as they are evaluated and saved; every rank must ask."""
        if self.copies:
            self.copies.refresh(self.generating)
            return self.copies.generators
        return self.averages.generators if self.averages else self.method.generators

    def save_networks(self, which: str) -> None:
        """The generators as they are evaluated, and what is saved beside them; every rank must call it."""
        generators, saved = self.evaluated(), self.method.saved
        with gathered(self.groups.values() if saved else ()):
            save_networks(generators, saved, which, self.folder, self.accelerator, self.position.step)

    def save(self, background: bool) -> None:
        """A checkpoint; with `background` it is copied now and written while training goes on."""
        self.position.means = self.means.state(self.accelerator)
        if self.accelerator.is_main_process:
            self.position.log_bytes = self.log.position()
        if self.accelerator.is_main_process or any(group.collective for group in self.groups.values()):
            save_checkpoint(
                self.checkpoints,
                self.method,
                self.groups,
                self.averages,
                self.position,
                self.folder,
                self.put_back.states,
                background,
            )

    def stopped(self) -> Outcome:
        """A signal ended the session."""
        self.accelerator.wait_for_everyone()  # nobody leaves before the checkpoint is there
        step = self.position.step
        say(f"{self.name}: stopped at step {step} of {self.steps}; the same command goes on from here")
        return Outcome(False, self.position, self.progress.images_per_second)

    def finished(self) -> Outcome:
        """All steps are made: the last weights as files."""
        self.freezer.release()
        self.save_networks("last")
        for group in self.groups.values():
            group.close()
        return Outcome(True, self.position, self.progress.images_per_second)

    def _averaged(self) -> Mapping[str, nn.Module]:
        return self.averages.generators if self.averages else {}

    def _told_to_stop(self) -> bool:
        watchdog.progress()
        return self.signals.requested()


def _delivered(loader: Iterable[Batch], timeout: float) -> Generator[Batch | None]:
    """The batches; None when a signal to stop comes while one is waited for. Closing it ends the loader's processes."""
    if isinstance(loader, ReadAhead):
        loader.patience = timeout
    try:
        yield from loader
    except StopWaiting:
        yield None


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints, accelerator: Accelerator) -> Iterator[None]:
    """Wait for the background save at the end; after an error not for long, as the other ranks wait for its words."""
    try:
        yield
    except BaseException:
        closing = threading.Thread(target=_close_quietly, args=(checkpoints,), daemon=True)
        closing.start()
        closing.join(LONGEST_SAVE if accelerator.num_processes > 1 else None)
        raise
    checkpoints.close()


def _close_quietly(checkpoints: Checkpoints) -> None:
    with contextlib.suppress(UserError, OSError):  # an error that came before it counts
        checkpoints.close()


def _newest(checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 chooses: a file system may show the others an older folder."""
    found = checkpoints.newest() if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        [step] = broadcast_object_list([found.step if found else None])
        if step is not None and not accelerator.is_main_process:
            found = checkpoints.read(step)
    return found


def _better(metric: str | None, new: dict[str, Any], best: dict[str, Any] | None, evaluator: Evaluator) -> bool:
    """Whether the evaluation `new` is better than `best`; anything is better than none, or than NaN."""
    if metric is None or best is None:
        return True
    # A test set renamed since the last best: it is not known how good that was there.
    value, old = new["metrics"][metric], best["metrics"].get(metric, math.nan)
    return math.isnan(old) or (value > old if evaluator.larger_is_better else value < old)


def _moved(value: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    value = value.to(device, non_blocking=True)
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """The micro-batches of one optimizer step."""
    if pieces == 1:
        return [batch]
    cut = {key: value.chunk(pieces) for key, value in batch.items()}
    return [{key: values[i] for key, values in cut.items()} for i in range(pieces)]
