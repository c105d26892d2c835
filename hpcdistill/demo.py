"""`python -m hpcdistill.demo`: from photographs to a distilled student, a table and a page, in a few minutes on a CPU.

Trains plain FSRCNN, a DSSD teacher and a DSSD student at x4 by the very configurations and commands that everything
else uses, and measures them on photographs that were not trained on. The same command again uses what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape

from hpcdistill.command import UserPath, run_command
from hpcdistill.console import Table, out, say, warn
from hpcdistill.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.metrics.sr_evaluation import SRImages
    from hpcdistill.run import Run
    from hpcdistill.sweep.demos.demo_report import Stage
    from hpcdistill.sweep.demos.demo_rows import Measured

CLONE = Path(__file__).resolve().parents[1]
# The student trained longer that the rows of the demo stand beside; a card of the same name lies beside it.
PRETRAINED = Path(__file__).with_name("pretrained") / "dssd-x4-bsd-t91.safetensors"
VARIANT = "configs/variants/demo.yaml"
CONFIGS = {"fsrcnn": "configs/fsrcnn/x4.yaml", "dssd": "configs/dssd/x4.yaml"}
SCALE = 4
SHORTEST_CADENCE = 10  # steps between evaluations; each takes as long as many steps
RULE: Literal["pisr"] = "pisr"


@dataclass(frozen=True)
class Trained:
    """A finished run of the demo."""

    loaded: Run
    folder: Path
    result: dict[str, Any]
    arguments: tuple[str, ...]  # of `python -m hpcdistill.train`


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(argv)
    started = time.perf_counter()
    say(f"the demo: x{SCALE} super-resolution, a few minutes on two CPU cores; everything goes to {options.out}")
    # Imported only now: --help answers at once.
    from hpcdistill.data.index import load_index
    from hpcdistill.data.outputs import check_page
    from hpcdistill.metrics.sr_evaluation import bicubic_upsampler, load_test_set
    from hpcdistill.models.registry import load_generator
    from hpcdistill.ranks.signals import EXIT_STOPPED
    from hpcdistill.storage import write_json
    from hpcdistill.sweep.demos.demo_report import Story, demo_page
    from hpcdistill.sweep.demos.demo_rows import clock, verdict
    from hpcdistill.sweep.report import write_page

    check_page(options.out / "report" / "index.html")
    runs: dict[str, Trained] = {}
    for number, name in enumerate(CONFIGS, 1):
        what = {"fsrcnn": "plain FSRCNN", "dssd": "DSSD: the teacher, then its student"}[name]
        say(f"[{number}/3] training {what}", style="bold")
        trained = train(name, options.out, options.steps, options.data)
        if trained is None:
            return EXIT_STOPPED
        runs[name] = trained

    config = runs["fsrcnn"].loaded.config
    photos = config.data.eval["photos"]
    images = load_test_set(photos, SCALE)
    say(f"[3/3] measuring on {len(images)} photographs that were not trained on", style="bold")
    rows = [measure("bicubic", bicubic_upsampler(SCALE), images, 0, 0.0)]
    for name, run in runs.items():
        # The last weights: the best ones were chosen by these very photographs.
        generator, _ = load_generator(run.folder / "generators" / "last" / "student.safetensors")
        rows.append(measure(name, generator, images, run.result["steps"], run.result["seconds"]))
    notes: dict[str, Any] = {}
    if PRETRAINED.is_file():
        generator, notes = load_generator(PRETRAINED)
        rows.append(measure("dssd-trained", generator, images, trained_steps(notes), notes.get("seconds")))
    else:
        warn(f"{_in_the_clone(PRETRAINED)} is not in this clone; the row of the student trained longer is left out")

    stages = {name: read_stage(run.folder, run.arguments) for name, run in runs.items()}
    teacher = runs["dssd"].loaded.teacher
    assert teacher is not None
    stages["teacher"] = read_stage(teacher.folder, ())
    result = stages["teacher"].result
    write_json(
        options.out / "results.json",
        {
            "rows": [row.to_json() for row in rows],
            "scale": SCALE,
            "rule": RULE,
            "seed": config.seed,
            "data": {"train": list(config.data.train), "test": photos},
            "teacher": {"steps": result["steps"], "seconds": result["seconds"], **result["last"]["metrics"]},
        },
    )
    page = options.out / "report" / "index.html"
    story = Story(
        rows=rows,
        stages=stages,
        images=images,
        train_set=load_index(Path(config.data.train[0])),
        test_set=load_index(Path(photos)),
        trained_notes=notes,
        trained_file=_in_the_clone(PRETRAINED),
        paper_steps=paper_steps(),
        batch_size=config.train.batch_size,
        patch=config.data.patch,
        command=_command(options),
    )
    write_page(page, demo_page(story))
    out.print(_table(rows))
    for line in verdict(rows):
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"Look at {page} (the numbers: {options.out / 'results.json'}).", markup=False, soft_wrap=True)
    say(f"the demo took {clock(time.perf_counter() - started)}")
    return 0


def train(name: str, folder: Path, steps: int | None, data: Path | None) -> Trained | None:
    """Train the student `name` (a key of CONFIGS) below `folder`, or find it finished; None when it was stopped."""
    from hpcdistill.run import load_run
    from hpcdistill.trainer import train

    arguments = training_arguments(name, folder, steps, data)
    loaded = load_run(_from_the_clone(arguments))
    result = train(loaded)
    return None if result is None else Trained(loaded, loaded.folder, result, arguments)


def training_arguments(name: str, folder: Path, steps: int | None, data: Path | None) -> tuple[str, ...]:
    """What `python -m hpcdistill.train` is called with. With `steps` the teacher is shortened in proportion."""
    plain = re.fullmatch(r"[\w.-]*/[\w./-]*", str(folder))  # YAML reads anything else as a number, a word, a list, ...
    arguments = [CONFIGS[name], VARIANT, f"runs={folder if plain else json.dumps(str(folder))}"]
    if data is not None:
        places = {split: json.dumps(str(data / "photos" / split)) for split in ("train", "test")}
        arguments += [f"data.train={places['train']}", f"data.eval.photos={places['test']}"]
    if steps is not None:
        from hpcdistill.run import load_run

        loaded = load_run(_from_the_clone([CONFIGS["dssd"], VARIANT]))
        assert loaded.teacher is not None
        student, teacher = loaded.config, loaded.teacher.config
        assert student.train.steps is not None
        assert teacher.train.steps is not None
        shorter = max(1, round(teacher.train.steps * steps / student.train.steps))
        arguments += [
            f"train.steps={steps}",
            f"train.log_every={max(1, student.train.log_every * steps // student.train.steps)}",
            f"eval.every={max(SHORTEST_CADENCE, student.eval.every * steps // student.train.steps)}",
        ]
        if name == "dssd":
            arguments += [f"teacher.overrides.train.steps={shorter}", f"teacher.overrides.eval.every={shorter}"]
    return tuple(arguments)


def measure(name: str, generator: nn.Module, images: SRImages, steps: int, seconds: float | None) -> Measured:
    """PSNR, SSIM, cost and pictures of one generator on the photographs, on the CPU."""
    from hpcdistill.metrics.cost import Cost, super_resolution_cost
    from hpcdistill.metrics.sample_grid import bicubic_image, colourise
    from hpcdistill.metrics.sr_evaluation import evaluate_image, evaluating, summarise
    from hpcdistill.sweep.demos.demo_rows import Measured

    say(f"{name}: measuring on {len(images)} photographs")
    counted = Cost(0, 0, 0) if name == "bicubic" else super_resolution_cost(generator)
    measured, pictures = [], []
    with evaluating(generator) as network:
        for image, hr, lr in images:
            row, output = evaluate_image(network, image, hr, lr, SCALE, RULE)
            measured.append(row)
            pictures.append(bicubic_image(lr, SCALE) if name == "bicubic" else colourise(output[0], lr, SCALE))
    result = summarise(measured, SCALE, RULE)
    return Measured(
        name=name,
        psnr=result.psnr,
        ssim=result.ssim,
        params=counted.params,
        macs=counted.macs,
        true_macs=counted.true_macs,
        steps=steps,
        seconds=seconds,
        per_image=tuple(result.per_image),
        pictures=tuple(pictures),
    )


def read_stage(folder: Path, arguments: Sequence[str]) -> Stage:
    """What a finished run's folder says of it; `arguments` are those it can be trained with again."""
    from hpcdistill.sweep.demos.demo_report import Stage
    from hpcdistill.training.records import read_environment, read_row
    from hpcdistill.training.run_folder import RunFolder, describe_session

    run = RunFolder(folder)
    result = run.result()
    assert result is not None
    log = [row for line in run.metrics.read_bytes().splitlines() if (row := read_row(line)) is not None]
    session = (read_environment(folder)["sessions"] or [describe_session()])[-1]
    return Stage(result, log, session, shlex.join(["python", "-m", "hpcdistill.train", *arguments]))


def trained_steps(notes: dict[str, Any]) -> int:
    """The steps that the file of the longer training says it took."""
    steps = notes.get("steps", notes.get("step"))
    if not isinstance(steps, int):
        raise UserError(
            f"{PRETRAINED}: its notes do not say how many steps it was trained; copy it from the repository"
        )
    return steps


def paper_steps() -> int:
    """A stage's steps by the paper's recipe, as the configurations without any variant have it."""
    from hpcdistill.run import load_run

    config = load_run(_from_the_clone([CONFIGS["dssd"]])).config
    assert config.data.samples_per_epoch is not None
    return round(config.train.epochs * config.data.samples_per_epoch / config.train.batch_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpcdistill.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", action=UserPath, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help=f"steps of each student; default: as {VARIANT} says (1600)"
    )
    parser.add_argument(
        "--data",
        action=UserPath,
        metavar="DIR",
        help="folder of packed sets, where photos/ lies or will be packed; default: $HPCDISTILL_DATA or data/packed",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of steps; give 1 or more")
    return value


def _command(options: argparse.Namespace) -> str:
    """The demo's own command, for the page."""
    given = {name: value for name, value in vars(options).items() if value not in (None, Path("runs/demo"))}
    parts = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "hpcdistill.demo", *parts]) if parts else "make demo"


def _from_the_clone(arguments: Sequence[str]) -> list[str]:
    """The configuration files as paths that hold from any folder."""
    return [os.path.relpath(CLONE / argument) if argument.endswith(".yaml") else argument for argument in arguments]


def _in_the_clone(path: Path) -> str:
    return str(path.relative_to(CLONE)) if path.is_relative_to(CLONE) else path.name


def _table(rows: list[Measured]) -> Table:
    from hpcdistill.sweep.demos.demo_rows import COLUMNS, TITLES, cells

    shown = [place for place, column in enumerate(COLUMNS) if column != "Training"]  # to fit 80 columns
    table = Table(
        title=f"x{SCALE}, mean of {len(rows[0].per_image)} photographs not trained on",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("Method")
    for place in shown:
        table.add_column(escape(COLUMNS[place].removesuffix(" [dB]")), justify="right")
    for row in rows:
        row_cells = cells(row, rows[0])
        table.add_row(TITLES[row.name], *(row_cells[place] for place in shown))
    return table


if __name__ == "__main__":
    # Before torch is loaded: OpenMP reads this once. Networks this small gain nothing from more threads, and threads
    # that spin while they wait make a training beside other work three times as slow.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(main)
