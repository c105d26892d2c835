"""What a run does, from its configuration to result.json. Read `train` and `_train`, then `training/loop.py`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from hpcdistill.config import RunConfig, to_yaml
from hpcdistill.console import say, warn
from hpcdistill.data.check.overlap import find_overlap
from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import step_seed
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.fetching import pack_missing
from hpcdistill.data.read.reader import Reader, open_reader
from hpcdistill.data.read.staging import StagingStopped
from hpcdistill.default_generator import drawing, is_shared
from hpcdistill.errors import Crowded, UserError, is_out_of_memory
from hpcdistill.methods.base import Method
from hpcdistill.methods.settings import role_key
from hpcdistill.metrics.reference import BICUBIC
from hpcdistill.metrics.run_evaluators import bicubic_reference, open_evaluator
from hpcdistill.metrics.selection import describe_choice
from hpcdistill.models.image_generator import ImageGenerator
from hpcdistill.models.registry import load_generator, load_weights
from hpcdistill.ranks import watchdog
from hpcdistill.ranks.environment import check_launcher
from hpcdistill.ranks.signals import StopSignals, on_any_rank
from hpcdistill.requirements import check_present, check_runs_apart, needed_sets
from hpcdistill.run import Run, Teacher, of_another_length, weights_file
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.evaluation import Evaluator
from hpcdistill.training.loop import Outcome, Training
from hpcdistill.training.records import count_evaluations
from hpcdistill.training.run_folder import RunFolder, code_revision
from hpcdistill.training.segments import batches_a_step, place_segments


def train(run: Run, signals: StopSignals | None = None) -> dict[str, Any] | None:
    """Train (or resume, or find finished) the run and the teachers it needs; result.json, None when stopped."""
    check_launcher("hpcdistill.train")
    config = run.config
    with drawing():
        accelerator = make_accelerator(config.train)
    with watchdog.main_first():  # a built-in set is packed once, by rank 0
        pack_missing(place for place in needed_sets(run) if not is_remote(place))
    check_present(run)
    check_runs_apart(config)
    with drawing():
        run.untrained()  # what is wrong with the student is said before its teacher is trained for hours
    identity = {"short": run.short, **run.identity}
    teachers: dict[str, nn.Module] = {}
    for role, wanted in config.method.roles().items():
        if not wanted.needed or role not in run.teachers:
            continue
        if not _is_trained(run.teachers[role], config.name, accelerator, signals):
            return None
        with drawing():
            teachers[role] = run.teachers[role].load()
    folder = RunFolder(run.folder)
    result = _finished(folder, accelerator)
    if result is not None:
        say(f"{config.name}: {folder.path} has finished already")
        for name in config.data.eval.keys() - ((result.get("protocol") or {}).get("test_sets") or {}).keys():
            command = ["hpcdistill", "evaluate", str(folder.path), "--data", config.data.eval[name]]
            say(f"{name} was not measured; `{shlex.join(command)}`")
        return result
    if not folder.path.exists():  # a run that has begun goes on, whatever it was begun with
        _check_selection(run)
        if accelerator.is_main_process:
            _say_what_is_near(run)
    return _train(run, folder, identity, teachers, signals)


def _is_trained(teacher: Teacher, name: str, accelerator: Accelerator, signals: StopSignals | None) -> bool:
    """Train the run that teaches `name` unless it has finished, or is named by folder or file; False when stopped."""
    who = "teacher" if teacher.role == "teacher" else f"teacher {teacher.role}"
    if teacher.run is None:
        # Its identity is there from its first step on: the same student would learn from other weights another day.
        if teacher.folder is not None and _finished(RunFolder(teacher.folder), accelerator) is None:
            raise UserError(
                f"{role_key(teacher.role)}.run: {teacher.folder} has not finished; train it to its end, or name the "
                f"file of weights under {role_key(teacher.role)}.weights"
            )
        say(f"{name}: its {who} is {teacher.file}")
        return True
    folder = RunFolder(teacher.run.folder)
    if _finished(folder, accelerator) is not None:
        say(f"{name}: using the finished {who} {folder.path.name}")
        return True
    say(f"{name}: its {who} {folder.path.name} has not been trained yet; training it first")
    if train(teacher.run, signals) is None:
        return False
    if signals and signals.agreed(accelerator):
        say(f"{name}: stopped after its {who}; the same command goes on with the student")
        return False
    return True


def _train(
    run: Run,
    folder: RunFolder,
    identity: dict[str, Any],
    teachers: dict[str, nn.Module],
    signals: StopSignals | None,
) -> dict[str, Any] | None:
    """One stage: build everything from the configuration, call the loop, write result.json."""
    config = run.config
    with drawing():
        accelerator = make_accelerator(config.train, folder.path)
        torch.manual_seed(step_seed(config.seed, 0, 0))  # initial weights: the same on every rank
        method: Method = config.method.build(teachers)
        _initialise(method, config)
    reader = _open_reader(config, method.needs, accelerator, signals)
    # Together: a rank that had staged already would wait for the one that was stopped.
    if on_any_rank(accelerator, reader is None) or reader is None:
        say(f"{config.name}: stopped while staging; the same command goes on from here")
        return None
    per_epoch = config.data.samples_per_epoch or reader.samples
    steps = config.train.steps or max(1, round(config.train.epochs * per_epoch / config.train.batch_size))
    if run.selected is None:
        warn(f"{config.name}: data.eval is empty; nothing will be evaluated")
    with drawing():
        evaluator = _open_evaluator(run, method, accelerator)
        method.prepare(config.data.crop)  # after what is cheaper to check: it may load a large network
    place_segments(method.segments(), steps, evaluator is not None)
    # Everything that can be wrong with the configuration has been said; only now is something written.
    if accelerator.is_main_process:
        folder.create(to_yaml(run.self_contained()), identity)
        watchdog.before_exit(folder.release)
    accelerator.wait_for_everyone()
    with _enough_memory(config.name, accelerator):
        training = Training(
            method,
            reader,
            evaluator,
            folder,
            accelerator,
            config.train,
            steps=steps,
            evaluate_every=config.eval.every,
            seed=config.seed,
            workers=0 if is_shared() else config.data.workers,  # a process must not fork while its threads compute
            name=config.name,
        )
        outcome = training.run(signals)
    for tracker in accelerator.trackers:
        tracker.finish()  # not Accelerate's end_training, which would take the process group from the next stage
    if not outcome.finished:
        folder.release()
        return None
    result = _result(run, method, outcome, steps, evaluator, accelerator)
    if evaluator is not None and evaluator.selects is not None:
        result["evaluations"] = count_evaluations(folder.metrics, evaluator.selects)
    if accelerator.is_main_process:
        folder.save_result(result)
        folder.release()
    accelerator.wait_for_everyone()
    return result


def _open_reader(
    config: RunConfig, needs: Needs, accelerator: Accelerator, signals: StopSignals | None
) -> Reader | None:
    """The training data, staged where the configuration asks for it; None when a signal came meanwhile."""
    with (
        watchdog.patient(),  # staging and decoding may take long
        contextlib.suppress(StagingStopped),
        _enough_memory(config.name, accelerator),  # data.cache
    ):
        return open_reader(
            config.data.train,
            needs,
            config.data,
            config.seed,
            config.train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            lambda: signals is not None and signals.requested(),
            accelerator.device,
        )
    return None


def _open_evaluator(run: Run, method: Method, accelerator: Accelerator) -> Evaluator | None:
    """What measures the run's networks; None where there is nothing to measure with."""
    if run.selected is None:
        return None
    config = run.config
    return open_evaluator(config.data, config.eval, run.selected, method.needs, method.generators, accelerator)


def _result(
    run: Run, method: Method, outcome: Outcome, steps: int, evaluator: Evaluator | None, accelerator: Accelerator
) -> dict[str, Any]:
    """What result.json says; a collective call."""
    config, position = run.config, outcome.position
    images = steps * config.train.batch_size * batches_a_step(method.segments())
    # Of a session that only wrote the result, whose steps had all been made before: the mean over those.
    rate = outcome.images_per_second or images / max(position.seconds, 1e-9)
    further = {role: _name(teacher) for role, teacher in run.teachers.items() if role != "teacher"}
    return {
        "name": config.name,
        "identity": run.short,
        "key": run.key,
        "method": config.method.name,
        "steps": steps,
        "batch_size": config.train.batch_size,
        "images": images,
        "seed": config.seed,
        "precision": position.precision,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "seconds": round(position.seconds, 1),
        "images_per_second": round(rate, 1),
        "best": position.best,
        "last": position.last,
        "protocol": _protocol(evaluator, config.data) if evaluator else None,
        BICUBIC: bicubic_reference(evaluator, accelerator),
        "teacher": _name(run.teachers.get("teacher")),
        **({"teachers": further} if further else {}),
        "weights": method.origins,
        "revision": code_revision(),
    }


@contextlib.contextmanager
def _enough_memory(name: str, accelerator: Accelerator) -> Iterator[None]:
    """A UserError where the data, the networks or a step of the run `name` need more memory than the device has."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        kept = ", keep the images off it with data.cache=ram," if accelerator.device.type == "cuda" else ""
        raise Crowded(
            f"{name}: no memory is left on {accelerator.device} ({error or 'of Python'}); free the device{kept} or cut "
            "the batch with train.accumulation=2 or more, and the run goes on from its last checkpoint; a lower "
            "train.batch_size or train.precision=bf16 is another run"
        ) from error


def _protocol(evaluator: Evaluator, data: DataConfig) -> dict[str, Any]:
    """What result.json says of how the numbers were made, and of which set chose the best weights."""
    chosen_by = describe_choice(evaluator.selects, data)
    return evaluator.protocol() | ({"chosen_by": chosen_by} if chosen_by else {})


def _check_selection(run: Run) -> None:
    """UserError when images that were named to choose the best weights are trained on as well (super-resolution).

    A set that chooses because it is the first of data.eval is a warning: that is how one sees whether a network learns.
    """
    data, selected = run.config.data, run.selected
    if selected is None or run.config.method.kind() != "lr-hr":
        return
    found = find_overlap(data.train, data.held_out, selected, data.eval.get(selected))
    if found and (run.config.eval.select is not None or data.held_out):
        raise UserError(found)
    if found:
        warn(f"{run.config.name}: {found}")


def _say_what_is_near(run: Run) -> None:
    """Name the run that whoever asks for more steps, or fewer, may mean to go on from."""
    near = of_another_length(run)
    if not near:
        return
    folder, name = near[-1], run.config.name
    say(
        f"{name}: {folder} differs from this run only in its length (train.steps, train.epochs). Over another length "
        "the learning rate takes another course: this is a run of its own and starts from nothing"
    )
    weights = sorted((folder / "generators" / "last").glob("*.safetensors"))
    if weights:
        start = " ".join(f"init.{file.stem}={folder}" for file in weights)
        say(f"{name}: to start from the weights of that one, add {start}")


def _finished(folder: RunFolder, accelerator: Accelerator) -> dict[str, Any] | None:
    """result.json as rank 0 sees it: a file system may show it to the other ranks later."""
    result = folder.result() if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        [result] = broadcast_object_list([result])
    return result


def _name(teacher: Teacher | None) -> str | None:
    """What result.json calls the teacher: its run folder's name, or the file of weights."""
    if teacher is None:
        return None
    return teacher.folder.name if teacher.folder else teacher.file.name


def _initialise(method: Method, config: RunConfig) -> None:
    """Load the weights that `init` names into the method's generators, and into what is saved beside them."""
    networks = {**method.generators, **method.saved}
    for name, path in config.init.items():
        file = weights_file(Path(path), name)
        network, generator = load_generator(file)[0], networks[name]
        its, own = (getattr(one, "global_skip", None) for one in (network, generator))
        if its != own:
            raise UserError(
                f"init.{name}: {file} has the residual {its}, this run has {own}; set method.residual={its}"
            )
        try:
            load_weights(generator, network.state_dict(), str(file))
        except UserError:
            if differ := _differences(network, generator):
                raise UserError(
                    f"init.{name}: {file} is a generator of {differ}; set that alike in the section of the "
                    "generator, e.g. method.student.ngf"
                ) from None
            raise


def _differences(network: nn.Module, own: nn.Module) -> str:
    """What a translating generator in a file has otherwise than the run's own; nothing of other networks."""
    if not isinstance(network, ImageGenerator) or not isinstance(own, ImageGenerator):
        return ""
    if type(network) is not type(own):
        return f"the class {type(network).__name__}, here {type(own).__name__}"
    its, ours = network.arguments, own.arguments
    keys = [key for key in dict.fromkeys((*its, *ours)) if its.get(key) != ours.get(key)]
    return "; ".join(f"{key} {its.get(key)}, here {ours.get(key)}" for key in keys)
