"""The training loop, the same for every method. Read it from top to bottom: this is what a run does.

One iteration: each phase of the segment trains its group. Everything random is derived from (seed, step), so that a
run resumed from a checkpoint continues as if it had never stopped. Nothing is read back from the device between two
log points; a non-finite loss masks every later update and ends the run at the next one.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.counter import step_seed
from hpcdistill.data.images import encode_png
from hpcdistill.data.read.loader import ReadAhead, StopWaiting
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, Method, Phase, Segment
from hpcdistill.models.registry import load_generator
from hpcdistill.ranks import watch
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.storage import write_bytes
from hpcdistill.training.averaging import Averages, GoodBuffers
from hpcdistill.training.batch_norm import synchronise
from hpcdistill.training.checkpoint import Checkpoint, Checkpoints
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.determinism import deterministic
from hpcdistill.training.engines import Copies, cuts_weights, make_groups, replaced, requested_settings, whole
from hpcdistill.training.evaluation import EvaluationStopped, Evaluator
from hpcdistill.training.freezing import Freezer
from hpcdistill.training.group import TermGradients
from hpcdistill.training.metrics_log import MetricsLog, RunningMeans
from hpcdistill.training.position import Position, best_of, restore_checkpoint, save_checkpoint, save_generators
from hpcdistill.training.precision import precision_of
from hpcdistill.training.progress import TrainingProgress
from hpcdistill.training.run_folder import RunFolder
from hpcdistill.training.underflow import UnderflowWatch

LONGEST_SAVE = 10.0  # seconds that an error waits for a checkpoint that is being saved


class Reader(Protocol):
    """Batches by optimizer step."""

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterable[Batch]:
        """This rank's batches of the steps first_step .. last_step - 1."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How `train` ended."""

    finished: bool  # False: a signal stopped it, the checkpoint is saved
    position: Position
    images_per_second: float


def train(
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
    signals: StopSignals | None = None,  # when the caller listens already
) -> Outcome:
    """Train `method` for `steps` optimizer steps, resuming from the newest checkpoint in `folder`.

    Raises UserError when a loss term stops being finite; the weights are then the last good ones, saved as `last`.
    However it ends, no process that loads data is left.
    """
    segments = place(method.segments(), steps, evaluator is not None)
    takes_best = [(segment, start) for segment, start, _ in segments if _takes_best(segment)]
    judges = sorted({segment.judged for segment, _ in takes_best if segment.judged})
    if accelerator.is_main_process:
        for judged in judges:
            folder.generator(best_of(judged), "").parent.mkdir(exist_ok=True)
    device = accelerator.device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    method.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    if config.batch_norm == "sync" and accelerator.num_processes > 1:
        for untrained in method.groups.values():
            synchronise(untrained.module)
    averages = Averages(method.generators, config.ema) if config.ema else None
    deepspeed = requested_settings(config)
    copies = Copies(method.generators) if not averages and cuts_weights(deepspeed) else None
    groups = make_groups(method.groups, accelerator, config, deepspeed)
    for group in groups.values():
        method.bind(group.name, group.wrapped)
    freezer = Freezer({name: group.module for name, group in groups.items()})
    generator_parameters = {p for module in method.generators.values() for p in module.parameters()}
    generating = [group for group in groups.values() if not generator_parameters.isdisjoint(group.parameters)]

    def evaluated() -> dict[str, nn.Module]:
        """The generators as they are evaluated and saved; every rank must ask."""
        if copies:
            copies.refresh(generating)
            return copies.generators
        return averages.generators if averages else method.generators

    checkpoints = Checkpoints(folder.checkpoints, confirm=folder.confirm)
    log, means = MetricsLog(folder.metrics, accelerator, folder.confirm), RunningMeans(device)
    position = Position()
    if found := _newest(checkpoints, accelerator):
        position = restore_checkpoint(found, method, groups, averages, folder)
        means.load(position.means)
        found = None  # its tensors and bytes need no memory any more
        say(f"{name}: resuming at step {position.step} of {steps}")
    position.precision = precision_of(accelerator)
    log.rewind(position.log_bytes, position.step)
    log.start_trackers(position.step)
    halted = torch.zeros((), dtype=torch.bool, device=device)
    culprits: dict[str, Tensor] = {}  # term -> 0-dim bool: it was the first to be non-finite
    good_buffers = GoodBuffers(method.generators)
    underflow = UnderflowWatch(accelerator)

    share = config.batch_size // accelerator.num_processes
    loader = reader.loader(position.step, steps, workers, device.type == "cuda")
    listening = contextlib.nullcontext(signals) if signals else StopSignals()
    with (
        deterministic(config.deterministic, device),
        _closing(checkpoints, accelerator),
        listening as signals,
        TrainingProgress(name, position.step, steps, config.batch_size) as progress,
        contextlib.closing(_delivered(loader, config.timeout)) as batches,
    ):

        def told_to_stop() -> bool:
            watch.progress()
            return signals.told()

        def measure() -> None:
            """Evaluate; when a signal interrupts it, the position says that it is still due."""
            assert evaluator is not None
            freezer.release()
            position.due = True
            with contextlib.suppress(EvaluationStopped):
                _evaluate(evaluator, told_to_stop, judges, evaluated(), accelerator, folder, position, log, progress)
            method.train()

        def save(at_once: bool) -> None:
            position.means = means.state(accelerator)
            collective = any(group.collective for group in groups.values())
            if accelerator.is_main_process:
                position.log_bytes = log.position()
            if accelerator.is_main_process or collective:
                save_checkpoint(checkpoints, method, groups, averages, position, folder, background=not at_once)

        def stopped() -> Outcome:
            accelerator.wait_for_everyone()  # nobody leaves before the checkpoint is there
            say(f"{name}: stopped at step {position.step} of {steps}; the same command goes on from here")
            return Outcome(False, position, progress.images_per_second)

        if position.due and evaluator is not None:
            measure()
            if position.due:
                return stopped()
        earlier_seconds, first_step = position.seconds, position.step
        signals.restart()
        for step, batch in zip(range(first_step, steps), batches, strict=True):
            if batch is None:  # a signal came first; not with several ranks
                if step > first_step:
                    _raise_if_halted(halted, culprits, step, accelerator, folder, evaluated, good_buffers)
                    save(at_once=True)
                return stopped()
            segment, segment_start = next((s, start) for s, start, end in segments if step < end)
            if step == segment_start:
                now = evaluated()
                with replaced(groups.values()):
                    _enter(segment, method, now, folder, accelerator)
                signals.restart()
            torch.manual_seed(step_seed(seed, step, accelerator.process_index))
            first = step * config.batch_size + accelerator.process_index * share
            batch = {"number": torch.arange(first, first + share), **batch}  # which of the run's draws they are
            batch = {key: _moved(value, device, layout) for key, value in batch.items()}
            parts = _cut(batch, config.accumulation)
            carries = [Carry() for _ in parts]
            measure_gradients = config.gradient_norms_every and (step + 1) % config.gradient_norms_every == 0
            for group in groups.values():
                group.schedule(step, steps)
            for phase in segment.phases:
                group = groups[phase.group]
                freezer.only(phase.group)
                if phase.before:
                    with torch.no_grad():
                        phase.before(parts, carries)
                measured = None
                if measure_gradients and not group.collective:  # DeepSpeed reduces in any backward pass
                    parameters = [p for p in group.parameters if p in generator_parameters] or group.parameters
                    measured = TermGradients(parameters, len(parts), accelerator)
                if len(parts) > 1:
                    freezer.mark()
                for number, (part, carry) in enumerate(zip(parts, carries, strict=True)):
                    last_part = number == len(parts) - 1
                    if number > 0:
                        freezer.rewind()
                    with group.micro_batch(last_part):
                        with accelerator.autocast():
                            terms = phase.loss(part, carry)
                        if measured:
                            means.add(underflow.measure(phase.name, terms, parameters))
                            norms = measured.add(terms, underflow.scale)
                            means.add({f"gradient/{phase.name}/{term}": norm for term, norm in norms.items()})
                        group.backward(_total(phase, terms, halted, culprits, means) / len(parts))
                means.add({f"gradient_norm/{phase.group}": group.update(halted)})
            if averages:
                with whole(generating):
                    averages.update(halted)
            good_buffers.keep(halted)
            progress.advance()
            watch.progress()
            position.step = step + 1
            position.seconds = earlier_seconds + progress.seconds

            stop = signals.agreed_at_step(accelerator)
            end = position.step == steps
            before_best = any(position.step == start for _, start in takes_best)
            evaluate = evaluator is not None and (end or before_best or position.step % evaluate_every == 0)
            write_line = end or position.step % config.log_every == 0
            write_checkpoint = end or stop or position.step % config.checkpoint_every == 0
            if write_line or evaluate or write_checkpoint:
                _raise_if_halted(halted, culprits, position.step, accelerator, folder, evaluated, good_buffers)
            if write_line:
                values = means.read(accelerator)
                rates = {f"learning_rate/{group.name}": group.rate for group in groups.values()}
                images = position.step * config.batch_size
                seconds = round(position.seconds, 3)
                log.write({"step": position.step, "images": images, **values, **rates, "seconds": seconds})
                progress.show_losses({key: value for key, value in values.items() if not key.startswith("gradient")})
            if evaluate:
                measure()
                stop = stop or position.due
            if stop or write_checkpoint:
                save(at_once=stop or end)
            if stop and (position.due or not end):
                return stopped()
        freezer.release()
        save_generators(evaluated(), "last", folder, accelerator, position.step)
        for group in groups.values():
            group.close()
        return Outcome(True, position, progress.images_per_second)


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


def _total(
    phase: Phase, terms: dict[str, Tensor], halted: Tensor, culprits: dict[str, Tensor], means: RunningMeans
) -> Tensor:
    """The sum of the terms, NaN when one of them is not finite: so its gradient is too, on every rank."""
    assert terms, f"phase {phase.name} returned no loss term"
    finite = torch.isfinite(torch.stack([term.detach() for term in terms.values()]))
    for (term, value), good in zip(terms.items(), finite, strict=True):
        key = f"{phase.name}/{term}"
        means.add({key: value})
        first = ~good & ~halted
        culprits[key] = culprits[key] | first if key in culprits else first
    total = torch.stack(list(terms.values())).sum()
    return total * torch.where(finite.all(), 1.0, math.nan)


def _raise_if_halted(
    halted: Tensor,
    culprits: dict[str, Tensor],
    step: int,
    accelerator: Accelerator,
    folder: RunFolder,
    evaluated: Callable[[], dict[str, nn.Module]],
    good_buffers: GoodBuffers,
) -> None:
    """Stop the run when an update was masked; the one place where the flags are read."""
    flags = torch.stack([halted, *culprits.values()]).float()
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum")
    stopped, *found = flags.tolist()
    if not any((stopped, *found)):
        return
    good_buffers.restore()
    save_generators(evaluated(), "last", folder, accelerator, step)
    terms = [term for term, flag in zip(culprits, found, strict=True) if flag]
    what = f"the loss term {', '.join(terms)}" if terms else "a gradient (of finite loss terms)"
    raise UserError(
        f"{what} became NaN or infinite by step {step}; the last good weights are in {folder.path}/generators/last. "
        "Lower the learning rate, set clip_norm in the method's optimizer, or use train.precision=fp32"
    )


def _evaluate(
    evaluator: Evaluator,
    stop: Callable[[], bool],
    judges: list[str],
    generators: dict[str, nn.Module],
    accelerator: Accelerator,
    folder: RunFolder,
    position: Position,
    log: MetricsLog,
    progress: TrainingProgress,
) -> None:
    """Measure, log, draw the samples, and keep the weights when they are the best so far."""
    evaluation = evaluator(generators, accelerator, stop)
    position.due = False
    position.last = {"step": position.step, "metrics": evaluation.metrics}
    log.write({"step": position.step, **evaluation.metrics})
    selects = evaluator.selects
    progress.show_evaluation({selects: evaluation.metrics[selects]} if selects else evaluation.metrics)
    if accelerator.is_main_process:
        for name, picture in evaluation.pictures.items():
            write_bytes(folder.samples / f"{name}-{position.step:08d}.png", encode_png(picture))
    if _better(selects, position.last, position.best, evaluator):
        position.best = position.last
        save_generators(generators, best_of(None), folder, accelerator, position.step)
    for judged in judges:
        metric = f"{judged}/{selects.partition('/')[2]}" if selects else None
        if _better(metric, position.last, position.bests.get(judged), evaluator):
            position.bests[judged] = position.last
            save_generators(generators, best_of(judged), folder, accelerator, position.step)


def _better(metric: str | None, new: dict[str, Any], best: dict[str, Any] | None, evaluator: Evaluator) -> bool:
    """Whether the evaluation `new` is better than `best`; anything is better than none, or than NaN."""
    if metric is None or best is None:
        return True
    # A test set renamed since the last best: it is not known how good that was there.
    value, old = new["metrics"][metric], best["metrics"].get(metric, math.nan)
    return math.isnan(old) or (value > old if evaluator.larger_is_better else value < old)


def place(segments: tuple[Segment, ...], steps: int, evaluated: bool) -> list[tuple[Segment, int, int]]:
    """(segment, first step, end) of each segment; the one without a length takes what the others leave.

    UserError when they do not fill the run, or when one takes back the best weights and none is chosen before it
    (`evaluated`: whether the run has an evaluator).
    """
    fixed = sum(segment.steps or 0 for segment in segments)
    placed, start = [], 0
    for segment in segments:
        end = start + (segment.steps if segment.steps is not None else max(0, steps - fixed))
        placed.append((segment, start, end))
        start = end
    if start != steps:
        raise UserError(f"train.steps: the method's segments take {start} steps, the run has {steps}; make them equal")
    for segment, first, _ in placed:
        if _takes_best(segment) and not evaluated:
            raise UserError(
                f"data.eval: is empty, but the segment {segment.name} goes on from the best weights, which nothing "
                "chooses; name a test set"
            )
        assert first > 0 or not _takes_best(segment), f"{segment.name}: no weights are the best before the first step"
    return placed


def _takes_best(segment: Segment) -> bool:
    return any(which == "best" for _, which in segment.load)


def _enter(
    segment: Segment, method: Method, evaluated: dict[str, nn.Module], folder: RunFolder, accelerator: Accelerator
) -> None:
    """Begin a segment: take back the weights it asks for, then let the method prepare itself."""
    for name, which in segment.load:
        # The last weights are saved at the run's end only; here they are those that would be evaluated now.
        state = evaluated[name].state_dict()
        if which == "best":
            # From rank 0: a shared file system may still show the others an older file.
            state = {key: value.clone() for key, value in state.items()}
            if accelerator.is_main_process:
                best = load_generator(folder.generator(best_of(segment.judged), name))[0].state_dict()
                state = {key: best[key].to(value) for key, value in state.items()}
            state = broadcast(state)
        method.generators[name].load_state_dict(state)
        evaluated[name].load_state_dict(state)
    if segment.on_enter:
        segment.on_enter()


def _moved(value: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    value = value.to(device, non_blocking=True)
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """The micro-batches of one optimizer step."""
    if pieces == 1:
        return [batch]
    cut = {key: value.chunk(pieces) for key, value in batch.items()}
    return [{key: values[i] for key, values in cut.items()} for i in range(pieces)]
