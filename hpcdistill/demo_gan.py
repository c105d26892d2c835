"""`python -m hpcdistill.demo_gan`: from photographs to a distilled image translator and a page, in minutes on a CPU.

Draws the edges of the photographs inside scikit-image and trains FESD-Pix2Pix (a teacher, a student and their
discriminator, together) to turn the drawings back into photographs, by the very configuration and command that
everything else uses. The same command again goes on, or uses what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD

from hpcdistill.command import UserPath, positive, run_command
from hpcdistill.console import Table, out, say

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.config import RunConfig
    from hpcdistill.metrics.cost import Cost
    from hpcdistill.metrics.translation_evaluation import TranslationEvaluator
    from hpcdistill.sweep.demos.demo_gan_rows import Measured

CLONE = Path(__file__).resolve().parents[1]
CONFIG = "configs/fesd/edges2shoes.yaml"
VARIANT = "configs/variants/demo-gan.yaml"
DEFAULT_OUT = Path("runs/demo-gan")
TEST_SET = "tiles"  # its name under data.eval
VGG = "vgg16-untrained.safetensors"
ROLES = ("teacher", "student")
SHORTEST_CADENCE = 10  # steps between evaluations


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(argv)
    started = time.perf_counter()
    say(f"the GAN demo: from edges to photographs, minutes on two CPU cores; everything goes to {options.out}")
    # Imported only now: --help answers at once.
    from hpcdistill.data.outputs import check_page
    from hpcdistill.data.pack.recipes import load_recipe
    from hpcdistill.demo import read_stage
    from hpcdistill.models.registry import load_generator
    from hpcdistill.ranks.signals import EXIT_STOPPED, StopSignals
    from hpcdistill.run import load_run
    from hpcdistill.storage import write_json
    from hpcdistill.sweep.demos.demo_gan_pairs import PHOTOGRAPHS, pack_pairs, pairs_of, photographs
    from hpcdistill.sweep.demos.demo_gan_report import Story, gan_demo_page
    from hpcdistill.sweep.demos.demo_gan_rows import FlatColour, mean_colour, verdict
    from hpcdistill.sweep.demos.demo_gan_vgg import write_random_vgg16
    from hpcdistill.sweep.demos.demo_rows import clock
    from hpcdistill.sweep.report import write_page
    from hpcdistill.trainer import train

    say("[1/3] drawing edges and packing the pairs", style="bold")
    check_page(options.out / "report" / "index.html")
    packed = pack_pairs(options.out)
    write_random_vgg16(options.out / VGG)
    say("[2/3] training FESD-Pix2Pix: teacher, student and discriminator together", style="bold")
    arguments = training_arguments(options.out, options.steps)
    loaded = load_run(_from_the_clone(arguments))
    with StopSignals() as signals:
        result = train(loaded, signals)
    if result is None:
        return EXIT_STOPPED

    config, folder = loaded.config, loaded.folder
    evaluator = _evaluator(config)
    say(f"[3/3] measuring on {evaluator.count(TEST_SET)} tiles that were not trained on", style="bold")
    # The last weights: the best ones were chosen by these very tiles.
    generators = {role: load_generator(folder / "generators" / "last" / f"{role}.safetensors")[0] for role in ROLES}
    sources = photographs()
    test = [pair for source in sources["test"] for pair in pairs_of(source, "test")]
    trained = [pair for source in sources["train"] for pair in pairs_of(source, "train")]
    rows = [measure("flat", FlatColour(mean_colour([pair.photograph for pair in trained])), evaluator)]
    rows += [measure(role, generator, evaluator) for role, generator in generators.items()]
    write_json(
        options.out / "results.json",
        {
            "rows": [row.to_json() for row in rows],
            "steps": result["steps"],
            "batch_size": result["batch_size"],
            "seconds": result["seconds"],
            "seed": config.seed,
            "size": config.data.crop,
            "weights": "last",
            "tiles": {split: len(index.samples) for split, index in packed.items()},
            "photographs": {split: [source.name for source in found] for split, found in sources.items()},
        },
    )
    page = options.out / "report" / "index.html"
    story = Story(
        rows=rows,
        stage=read_stage(folder, arguments),
        pairs={"test": test, "train": trained},
        generators=generators,
        printed=printed_networks(),
        config=config,
        tiles={split: len(index.samples) for split, index in packed.items()},
        recipe=load_recipe(PHOTOGRAPHS),
        printed_pairs=load_recipe("edges2shoes").images["train"]["ab"],
        command=_command(options),
    )
    write_page(page, gan_demo_page(story))
    out.print(_table(rows))
    for line in verdict(rows, result["steps"], (len(sources["train"]), len(sources["test"]))):
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"Look at {page} (the numbers: {options.out / 'results.json'}).", markup=False, soft_wrap=True)
    say(f"the GAN demo took {clock(time.perf_counter() - started)}")
    return 0


def training_arguments(folder: Path, steps: int | None) -> tuple[str, ...]:
    """What `python -m hpcdistill.train` is called with."""
    packed = folder / "packed"
    arguments = [
        CONFIG,
        VARIANT,
        f"runs={_plain(folder)}",
        f"data.train={json.dumps(str(packed / 'train'))}",
        f"method.vgg={json.dumps(str(folder / VGG))}",
        f"data.eval={json.dumps({TEST_SET: str(packed / 'test')})}",
    ]
    if steps is not None:
        from hpcdistill.run import load_run

        full = load_run(_from_the_clone([CONFIG, VARIANT])).config
        assert full.train.steps is not None
        arguments += [
            f"train.steps={steps}",
            f"train.log_every={max(1, full.train.log_every * steps // full.train.steps)}",
            f"eval.every={max(SHORTEST_CADENCE, full.eval.every * steps // full.train.steps)}",
        ]
    return tuple(arguments)


def measure(name: str, generator: nn.Module, evaluator: TranslationEvaluator) -> Measured:
    """PSNR of one generator on the test tiles, and its cost (a flat colour costs nothing)."""
    from hpcdistill.metrics.cost import Cost, image_cost
    from hpcdistill.sweep.demos.demo_gan_rows import Measured

    found = evaluator.evaluate(generator, TEST_SET)
    cost = Cost(0, 0, 0) if name == "flat" else image_cost(generator)
    return Measured(name, found.metrics["psnr"], cost, tuple(found.per_image))


def printed_networks() -> dict[str, Cost]:
    """What the generators of the paper's own experiment cost, for scale: Pix2Pix's and the student."""
    import torch

    from hpcdistill.methods.distillation_settings import DistilledGANConfig
    from hpcdistill.methods.gan_settings import FAMILIES, GeneratorSettings
    from hpcdistill.metrics.cost import image_cost
    from hpcdistill.models.image_generator import build_generator
    from hpcdistill.run import load_run

    method = load_run(_from_the_clone([CONFIG])).config.method
    assert isinstance(method, DistilledGANConfig)
    costs = {}
    for title, settings in (
        ("original", GeneratorSettings(network=method.teacher.network)),
        ("printed", method.student),
    ):
        name, arguments = settings.arguments(FAMILIES[method.family])
        with torch.device("meta"):  # only counted
            costs[title] = image_cost(build_generator(name, **arguments))
    return costs


def _evaluator(config: RunConfig) -> TranslationEvaluator:
    """PSNR alone, as the run measures it."""
    from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol

    protocol = TranslationProtocol("paired", config.data.direction, config.data.crop, "test", kid=False)
    return TranslationEvaluator(config.data.eval, protocol, config.data.train, None, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpcdistill.demo_gan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", action=UserPath, default=DEFAULT_OUT, metavar="DIR", help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--steps", type=positive, metavar="N", help=f"default: as {VARIANT} says")
    return parser


def _command(options: argparse.Namespace) -> str:
    """The demo's own command, for the page."""
    given = {"--out": options.out if options.out != DEFAULT_OUT else None, "--steps": options.steps}
    parts = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return shlex.join(["python", "-m", "hpcdistill.demo_gan", *parts]) if parts else "make demo-gan"


def _from_the_clone(arguments: Sequence[str]) -> list[str]:
    """The configuration files as paths that hold from any folder."""
    files = (CONFIG, VARIANT)
    return [os.path.relpath(CLONE / argument) if argument in files else argument for argument in arguments]


def _plain(folder: Path) -> str:
    """The folder as YAML reads it back: anything else than a path with a slash may be a number, a word, a list."""
    return str(folder) if re.fullmatch(r"[\w.-]*/[\w./-]*", str(folder)) else json.dumps(str(folder))


def _table(rows: list[Measured]) -> Table:
    from hpcdistill.sweep.demos.demo_gan_rows import TITLES

    table = Table(
        title=f"edges to photographs, mean of {len(rows[0].per_tile)} tiles not trained on",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for number, column in enumerate(("Generator", "PSNR", "Parameters", "MACs at 256x256")):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        cost = (f"{row.cost.params:,}", f"{row.cost.macs / 1e9:.2f} G") if row.cost.params else ("-", "-")
        table.add_row(TITLES[row.name], f"{row.psnr:.2f}", *cost)
    return table


if __name__ == "__main__":
    # Before torch is loaded: OpenMP reads this once; see hpcdistill/demo.py.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(main)
