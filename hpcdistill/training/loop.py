"""The training loop, the same for every method. Read `Training.run` first: it is what a run does, from top to bottom.

One iteration: each phase of the segment trains its group. Everything random is derived from (seed, step), so that a
run resumed from a checkpoint continues as if it had never stopped. Nothing is read back from the device between two
log points; a non-finite loss masks every later update and ends the run at the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from hpcdistill.console import say
from hpcdistill.data.images import encode_png
from hpcdistill.default_generator import drawing, drawless_step
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Method
from hpcdistill.ranks import watchdog
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.storage import write_bytes, write_json
from hpcdistill.training.accelerator import precision_of
from hpcdistill.training.batches import BatchReader, ahead, delivered
from hpcdistill.training.checkpoint import Checkpoint, Checkpoints
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.determinism import deterministic
from hpcdistill.training.evaluation import Evaluation, EvaluationStopped, Evaluator, is_better
from hpcdistill.training.layout import take_layout
from hpcdistill.training.metrics_log import MetricsLog, RunningMeans
from hpcdistill.training.networks import Networks
from hpcdistill.training.nonfinite import NonFiniteGuard
from hpcdistill.training.position import (
    Position,
    best_of,
    newest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    started_layout,
)
from hpcdistill.training.progress import TrainingProgress
from hpcdistill.training.run_folder import RunFolder
from hpcdistill.training.segments import Courses, PutBack, batches_a_step, enter, leave, place_segments
from hpcdistill.training.update import Updates


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
        reader: BatchReader,
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
        self.steps, self.evaluate_every, self.workers, self.name = steps, evaluate_every, workers, name
        segments = method.segments()
        self.stretches = place_segments(segments, steps, evaluator is not None)
        self.batches = batches_a_step(segments)
        # Segments may begin with what was best for a generator of their own, not for the run's selected metric.
        self.judged = sorted({s.segment.judged for s in self.stretches if s.takes_best and s.segment.judged})
        self.checkpoints = Checkpoints(folder.checkpoints, confirm=folder.confirm)
        found = newest_checkpoint(self.checkpoints, accelerator)
        layout = take_layout(config, method, accelerator.device, started_layout(found))
        self.networks = Networks(method, accelerator, config, layout)
        self.put_back = PutBack()
        self.log = MetricsLog(folder.metrics, accelerator, folder.confirm)
        self.means = RunningMeans(accelerator.device)
        self.position = Position()
        self._resume(found)
        self.guard = NonFiniteGuard(method.generators, accelerator.device)
        courses = Courses(self.stretches, method.groups)
        self.updates = Updates(self.networks, self.guard, self.means, config, courses, seed=seed, steps=steps)

    def run(self, signals: StopSignals | None = None) -> Outcome:
        """Train to the end or to a signal; `signals` when the caller listens already.

        Raises UserError when a loss term stops being finite; the weights are then the last good ones, saved as `last`.
        However it ends, no process that loads data is left.
        """
        first = self.position.step
        with self._session(signals) as batches:
            if self.position.due and self.evaluator:  # a signal interrupted the last session's evaluation
                self.evaluate()
                if self.position.due:
                    return self.stopped()
            self.signals.restart()
            for step, taken in zip(range(first, self.steps), batches, strict=True):
                if taken is None:  # a signal came while it was waited for; not with several ranks
                    if step > first:
                        self.raise_if_not_finite()
                        self.save(background=False)
                    return self.stopped()
                self.take_step(step, taken)
                if self.stops_after_step():
                    return self.stopped()
            return self.finished()

    # --- before the first step -------------------------------------------------------------------------------------

    def _resume(self, found: Checkpoint | None) -> None:
        """Go on from the newest checkpoint in the run's folder, where there is one."""
        if found:
            self.position = restore_checkpoint(found, self.networks, self.folder)
            self.put_back.states = found.part("put_back")
            self.means.load(self.position.means)
            say(f"{self.name}: resuming at step {self.position.step} of {self.steps}")
        self.position.precision = precision_of(self.accelerator)
        self.position.layout = self.networks.layout
        self.log.rewind(self.position.log_bytes, self.position.step)
        self.log.start_trackers(self.position.step)

    @contextlib.contextmanager
    def _session(self, signals: StopSignals | None) -> Iterator[Iterator[list[Batch] | None]]:
        """What lasts from this session's first step to its last: yields the batches of each; see `delivered`."""
        first, pinned = self.position.step, self.accelerator.device.type == "cuda"
        loader = self.reader.loader(first * self.batches, self.steps * self.batches, self.workers, pinned)
        self._first, self._earlier_seconds = first, self.position.seconds
        with (
            deterministic(self.config.deterministic, self.accelerator.device),
            self.checkpoints.closing(self.accelerator.num_processes),
            contextlib.nullcontext(signals) if signals else StopSignals() as self.signals,
            TrainingProgress(self.name, first, self.steps, self.images) as self.progress,
            contextlib.closing(
                ahead(delivered(loader, self.batches, self.config.timeout), self.accelerator.device)
            ) as batches,
        ):
            yield batches

    @property
    def images(self) -> int:
        """The samples that an iteration takes, over all ranks."""
        return self.batches * self.config.batch_size

    # --- one step --------------------------------------------------------------------------------------------------

    def take_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Update the networks once; a segment that begins or ends here may replace their weights before or after."""
        stretch = next(stretch for stretch in self.stretches if step < stretch.end)
        if step == stretch.start:
            with drawing():
                enter(stretch.segment, self.networks, self.put_back, self.folder)
            self.updates.begin_segment()
            self.signals.restart()
        with drawless_step(first=step in (stretch.start, self._first)):
            self.updates.make(stretch.segment.phases, step, batches)
        self.progress.advance()
        watchdog.progress()
        self.position.step = step + 1
        self.position.seconds = self._earlier_seconds + self.progress.seconds
        if self.position.step == stretch.end:
            leave(self.networks, self.put_back)

    def stops_after_step(self) -> bool:
        """Log, evaluate and save what is due; whether a signal ends the session here."""
        stop = self.signals.agreed_at_step(self.accelerator)
        due = self.due(stop)
        if due.line or due.evaluation or due.checkpoint:
            self.raise_if_not_finite()
        if due.line:
            self.write_line()
        if due.evaluation:
            self.evaluate()
            stop = stop or self.position.due
        ends = self.position.step == self.steps
        if stop or due.checkpoint:
            self.save(background=not (stop or ends))
        return stop and (self.position.due or not ends)

    def due(self, stop: bool) -> Due:
        """What follows the step that was just made; `stop`: a signal has come."""
        step, end = self.position.step, self.position.step == self.steps
        before_best = any(step == stretch.start for stretch in self.stretches if stretch.takes_best)
        evaluation = self.evaluator is not None and (end or before_best or step % self.evaluate_every == 0)
        line = end or step % self.config.log_every == 0
        return Due(line, evaluation, end or stop or step % self.config.checkpoint_every == 0)

    # --- after a step ----------------------------------------------------------------------------------------------

    def raise_if_not_finite(self) -> None:
        """Stop the run when an update was masked, with the last good weights saved."""
        what = self.guard.found(self.accelerator)
        if what is None:
            return
        self.guard.restore()
        self.networks.save("last", self.folder, self.position.step)
        raise UserError(
            f"{what} became NaN or infinite by step {self.position.step}; the last good weights are in "
            f"{self.folder.path}/generators/last. "
            "Lower the learning rate, set clip_norm in the method's optimizer, or use train.precision=fp32"
        )

    def write_line(self) -> None:
        """The means since the last line, to metrics.jsonl, the trackers and the display."""
        step = self.position.step
        values = self.means.read(self.accelerator)
        rates = {f"learning_rate/{group.name}": group.rate for group in self.networks.groups.values()}
        images, seconds = step * self.images, round(self.position.seconds, 3)
        self.log.write({"step": step, "images": images, **values, **rates, "seconds": seconds})
        others = ("gradient/", "gradient_norm/", "underflow/")  # what is shown is summed: loss terms alone
        self.progress.show_losses({key: value for key, value in values.items() if not key.startswith(others)})

    def evaluate(self) -> None:
        """Evaluate, where there is an evaluator; when a signal interrupts it, the position says that it is due."""
        if self.evaluator is None:
            return
        self.networks.freezer.release()
        self.position.due = True
        with contextlib.suppress(EvaluationStopped):
            evaluation = self.evaluator(self.networks.evaluated(), self.accelerator, self._told_to_stop)
            self.position.due = False
            self.take_in(evaluation, self.evaluator)
        self.method.train()

    def take_in(self, evaluation: Evaluation, evaluator: Evaluator) -> None:
        """Log an evaluation, draw the samples, and keep the weights when they are the best so far."""
        position, metrics, selects = self.position, evaluation.metrics, evaluator.selects
        position.last = {"step": position.step, "metrics": metrics}
        self.log.write({"step": position.step, **metrics})
        self.progress.show_evaluation({selects: metrics[selects]} if selects else metrics)
        if self.accelerator.is_main_process:
            for name, picture in evaluation.pictures.items():
                write_bytes(self.folder.samples / f"{name}-{position.step:08d}.png", encode_png(picture))
            for name, curves in evaluation.curves.items():
                write_json(self.folder.samples / f"{name}-{position.step:08d}.json", curves)
        if is_better(evaluator, selects, position.last, position.best):
            position.best = position.last
            self.networks.save(best_of(None), self.folder, position.step)
        for judged in self.judged:
            metric = f"{judged}/{selects.partition('/')[2]}" if selects else None
            if is_better(evaluator, metric, position.last, position.bests.get(judged)):
                position.bests[judged] = position.last
                self.networks.save(best_of(judged), self.folder, position.step)

    def save(self, background: bool) -> None:
        """A checkpoint; with `background` it is copied now and written while training goes on."""
        self.position.means = self.means.state(self.accelerator)
        if self.accelerator.is_main_process:
            self.position.log_bytes = self.log.position()
        save_checkpoint(
            self.checkpoints, self.networks, self.position, self.folder, self.put_back.states, background=background
        )

    def stopped(self) -> Outcome:
        """A signal ended the session."""
        self.accelerator.wait_for_everyone()  # nobody leaves before the checkpoint is there
        step = self.position.step
        say(f"{self.name}: stopped at step {step} of {self.steps}; the same command goes on from here")
        return Outcome(False, self.position, self.progress.images_per_second)

    def finished(self) -> Outcome:
        """All steps are made: the last weights as files."""
        self.networks.freezer.release()
        self.networks.save("last", self.folder, self.position.step)
        self.networks.close()
        return Outcome(True, self.position, self.progress.images_per_second)

    def _told_to_stop(self) -> bool:
        watchdog.progress()
        return self.signals.requested()
