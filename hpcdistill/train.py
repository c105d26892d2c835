"""Train a run: `python -m hpcdistill.train CONFIG [CONFIG ...] [key=value ...]`.

Files and overrides are merged from left to right. A student's teacher is found by its identity, or trained first.
The same command again resumes; a finished run prints its result.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.text import Text
from torch import nn

from hpcdistill.command import run_command
from hpcdistill.config import Loaded, RunConfig, config_files, configured_generators, load_config, to_yaml
from hpcdistill.console import Table, is_main_process, out, say, warn
from hpcdistill.data.counter import step_seed
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.pack.builtin import pack_missing
from hpcdistill.data.read.readers import open_reader
from hpcdistill.data.read.staging import StagingStopped
from hpcdistill.errors import plural
from hpcdistill.methods import METHODS
from hpcdistill.methods.base import Method
from hpcdistill.metrics.reference import BICUBIC, below_bicubic, bicubic_value
from hpcdistill.metrics.run_evaluators import bicubic_reference, open_evaluator
from hpcdistill.models.registry import load_generator, load_weights
from hpcdistill.ranks import watch
from hpcdistill.ranks.launcher import check_launcher
from hpcdistill.ranks.process_group import leave
from hpcdistill.ranks.signals import EXIT_STOPPED, StopSignals, on_any_rank
from hpcdistill.sweep.identity import Identity, identify, of_another_length, run_folder, selected_set, weights_file
from hpcdistill.sweep.plan_key import plan_key
from hpcdistill.sweep.requirements import check_present, check_runs_apart, needed_sets
from hpcdistill.training.distribution import make_accelerator
from hpcdistill.training.loop import place, train
from hpcdistill.training.progress import NOTHING_MEASURED
from hpcdistill.training.run_folder import RunFolder, code_revision

GUIDE = """\
hpcdistill trains small image generators from large ones.

  python -m hpcdistill.train CONFIG [VARIANT ...] [key=value ...]

  a first run on a CPU:  python -m hpcdistill.train configs/dssd/x4.yaml configs/variants/cpu.yaml
  one GPU:               python -m hpcdistill.train configs/dssd/x4.yaml
  several GPUs:          accelerate launch --num_processes 4 -m hpcdistill.train configs/dssd/x4.yaml
  what would be run:     python -m hpcdistill.train configs/dssd/x4.yaml --print-config
"""


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    if not arguments:
        _guide()
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m hpcdistill.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="configuration files and overrides")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    options = parser.parse_intermixed_args(arguments)
    loaded = load_config(options.config)
    if options.print_config:
        sys.stdout.write(to_yaml(loaded.config))
        if loaded.teacher:
            sys.stdout.write("# the teacher's configuration\n---\n" + to_yaml(loaded.teacher.config))
        return 0
    with StopSignals() as signals:
        result = run(loaded, signals)
        leave()  # a launcher ends who is late by a signal
    if result is None:
        return EXIT_STOPPED
    _show(result)
    return 0


def run(loaded: Loaded, signals: StopSignals | None = None) -> dict[str, Any] | None:
    """Train (or resume, or find finished) the run and the teacher it needs; result.json, None when stopped."""
    check_launcher("hpcdistill.train")
    config = loaded.config
    accelerator = make_accelerator(config.train)
    with watch.main_first():  # a built-in set is packed once, by rank 0
        pack_missing(place for place in needed_sets(loaded) if not is_remote(place))
    check_present(loaded)
    check_runs_apart(config)
    # What is wrong with the student is said before its teacher is trained for hours.
    configured_generators(loaded)
    identity = identify(loaded)
    selected_set(config)
    frozen: dict[str, nn.Module] = {}
    if loaded.teacher and config.teacher and METHODS[config.method.name].uses_teacher(config.method):
        teacher_folder = RunFolder(run_folder(loaded.teacher))
        if _finished(teacher_folder, accelerator) is None:
            say(f"{config.name}: its teacher {teacher_folder.path.name} has not been trained yet; training it first")
            if run(loaded.teacher, signals) is None:
                return None
            if signals and signals.agreed(accelerator):
                say(f"{config.name}: stopped after its teacher; the same command goes on with the student")
                return None
        else:
            say(f"{config.name}: using the finished teacher {teacher_folder.path.name}")
        frozen["teacher"] = _load_teacher(teacher_folder, config.teacher.checkpoint)
    folder = RunFolder(run_folder(loaded))
    result = _finished(folder, accelerator)
    if result is not None:
        say(f"{config.name}: {folder.path} has finished already")
        for name in config.data.eval.keys() - ((result.get("protocol") or {}).get("test_sets") or {}).keys():
            command = ["python", "-m", "hpcdistill.evaluate", str(folder.path), "--data", config.data.eval[name]]
            say(f"{name} was not measured; `{shlex.join(command)}`")
        return result
    if not folder.path.exists() and accelerator.is_main_process:
        _say_what_is_near(loaded, identity)
    return _train(loaded, folder, {"short": identity.short, **identity.record}, frozen, signals)


def _train(
    loaded: Loaded,
    folder: RunFolder,
    identity: dict[str, Any],
    frozen: dict[str, nn.Module],
    signals: StopSignals | None,
) -> dict[str, Any] | None:
    """One stage: build everything from the configuration, call the loop, write result.json."""
    config = loaded.config
    accelerator = make_accelerator(config.train, folder.path)
    torch.manual_seed(step_seed(config.seed, 0, 0))  # initial weights: the same on every rank
    method = METHODS[config.method.name](config.method, frozen)  # type: ignore[call-arg]
    _initialise(method, config)
    needs = method.needs
    reader = None
    with watch.patient(), contextlib.suppress(StagingStopped):  # staging may take long
        reader = open_reader(
            config.data.train,
            needs,
            config.data,
            config.seed,
            config.train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            lambda: signals is not None and signals.told(),
        )
    # Together: a rank that had staged already would wait for the one that was stopped.
    if on_any_rank(accelerator, reader is None) or reader is None:
        say(f"{config.name}: stopped while staging; the same command goes on from here")
        return None
    per_epoch = config.data.samples_per_epoch or reader.samples
    steps = config.train.steps or max(1, round(config.train.epochs * per_epoch / config.train.batch_size))
    selected = selected_set(config)
    if selected is None:
        warn(f"{config.name}: data.eval is empty; nothing will be evaluated")
    evaluator = None
    if selected is not None:
        evaluator = open_evaluator(config.data, config.eval, selected, needs, method.generators, accelerator)
    method.prepare(config.data.crop)  # after what is cheaper to check: it may load a large network
    place(method.segments(), steps, evaluator is not None)
    # Everything that can be wrong with the configuration has been said; only now is something written.
    if accelerator.is_main_process:
        folder.create(to_yaml(_self_contained(loaded)), identity)
        watch.before_exit(folder.release)
    accelerator.wait_for_everyone()
    outcome = train(
        method,
        reader,
        evaluator,
        folder,
        accelerator,
        config.train,
        steps=steps,
        evaluate_every=config.eval.every,
        seed=config.seed,
        workers=config.data.workers,
        name=config.name,
        signals=signals,
    )
    for tracker in accelerator.trackers:
        tracker.finish()  # not Accelerate's end_training, which would take the process group from the next stage
    if not outcome.finished:
        folder.release()
        return None
    images = steps * config.train.batch_size
    # Of a session that only wrote the result, whose steps had all been made before: the mean over those.
    rate = outcome.images_per_second or images / max(outcome.position.seconds, 1e-9)
    result = {
        "name": config.name,
        "identity": identity["short"],
        "key": plan_key(loaded),
        "method": config.method.name,
        "steps": steps,
        "batch_size": config.train.batch_size,
        "images": images,
        "seed": config.seed,
        "precision": outcome.position.precision,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "seconds": round(outcome.position.seconds, 1),
        "images_per_second": round(rate, 1),
        "best": outcome.position.best,
        "last": outcome.position.last,
        "protocol": evaluator.protocol() if evaluator else None,
        BICUBIC: bicubic_reference(evaluator, accelerator),
        "teacher": run_name(loaded.teacher) if loaded.teacher else None,
        "weights": method.origins,
        "revision": code_revision(),
    }
    if accelerator.is_main_process:
        folder.save_result(result)
        folder.release()
    accelerator.wait_for_everyone()
    return result


def _say_what_is_near(loaded: Loaded, identity: Identity) -> None:
    """Name the run that whoever asks for more steps, or fewer, may mean to go on from."""
    near = of_another_length(loaded, identity)
    if not near:
        return
    folder, name = near[-1], loaded.config.name
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


def run_name(loaded: Loaded) -> str:
    """The name of the run's folder."""
    return run_folder(loaded).name


def _load_teacher(folder: RunFolder, which: str) -> nn.Module:
    return load_generator(folder.generator(which, "teacher"))[0]


def _initialise(method: Method, config: RunConfig) -> None:
    """Load the weights that `init` names into the method's generators."""
    for name, path in config.init.items():
        file = weights_file(Path(path), name)
        load_weights(method.generators[name], load_generator(file)[0].state_dict(), str(file))


def _self_contained(loaded: Loaded) -> RunConfig:
    """The configuration with its teacher named by the teacher's run folder, so that it can be run from there alone."""
    if not (loaded.teacher and loaded.config.teacher):
        return loaded.config
    # Relative to the folder it is saved in, so that runs/ can be moved as a whole.
    saved = os.path.relpath(run_folder(loaded.teacher) / "config.yaml", run_folder(loaded))
    teacher = loaded.config.teacher.model_copy(update={"config": saved, "overrides": {}})
    return loaded.config.model_copy(update={"teacher": teacher})


def _guide() -> None:
    """What to type, and the configurations there are."""
    out.print(GUIDE, markup=False)
    configs = config_files(Path("configs")) if Path("configs").is_dir() else []
    if configs:
        out.print("Configurations:")
        for path in configs:
            out.print(f"  {path}", markup=False)
        variants = sorted(Path("configs/variants").glob("*.yaml"))
        out.print("\nVariants, merged over a configuration:")
        for path in variants:
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            out.print(f"  {path}  {first if first.startswith('#') else ''}", markup=False)
    else:
        out.print("Run it from the clone's folder, where configs/ is.")


def _show(result: dict[str, Any]) -> None:
    """The result as a table, on rank 0."""
    if not is_main_process():
        return
    steps = plural(result["steps"], "step") if isinstance(result.get("steps"), int) else "None steps"
    title = f"{result['name']}-{result.get('identity')}: {steps}, {result.get('seconds') or 0:.0f} s"
    measured = {which: result.get(which) or {"step": None, "metrics": {}} for which in ("best", "last")}
    metrics = measured["last"]["metrics"]
    if not metrics:
        out.print(f"{title}; {NOTHING_MEASURED}", markup=False, soft_wrap=True)
        return
    table = Table(title=title)
    table.caption = (result.get("protocol") or {}).get("note")
    table.add_column("metric")
    for which, part in measured.items():
        table.add_column(f"{which} (step {part.get('step')})" if result.get(which) else which, justify="right")
    for metric in metrics:
        values = (part["metrics"].get(metric) for part in measured.values())
        table.add_row(Text(metric), *(f"{math.nan if value is None else value:.4f}" for value in values))
    for metric in dict.fromkeys(f"{BICUBIC}/{metric.partition('/')[2]}" for metric in metrics):
        if (value := bicubic_value(result, metric)) is not None:  # the same whatever the weights
            table.add_row(Text(metric), f"{value:.4f}", f"{value:.4f}", style="dim")
    out.print(table)
    for line in below_bicubic(result):
        warn(f"{result['name']}: {line}")


if __name__ == "__main__":
    run_command(main)
