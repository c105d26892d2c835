"""The demo of image translation: FESD-Pix2Pix paints outline drawings, in miniature."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.errors import EXIT_STOPPED
from hpcdistill.metrics.base import L1_OF_PAIRS, PSNR_OF_PAIRS
from hpcdistill.metrics.cost import Cost, image_cost
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.models.registry import load_generator
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.sweep.demos import base
from hpcdistill.sweep.demos.base import Measured, Stage
from hpcdistill.sweep.demos.shape_pairs import FlatColour, mean_colour, pack_pairs, pairs_of, write_random_vgg16
from hpcdistill.sweep.demos.translation_page import demo_page, places, results_table, verdict
from hpcdistill.sweep.demos.translation_story import CONFIG, ROWS, TEST_SET, TRAINED, GANStory, Pictures, solved

VARIANT = "configs/variants/demo-gan.yaml"
VGG = "vgg16-untrained.safetensors"


def run_demo(options: argparse.Namespace) -> int:
    """Draw, train, measure, and write the page; returns the exit code."""
    say("[1/3] drawing shapes and packing the pairs", style="bold")
    pack_pairs(options.out)
    write_random_vgg16(options.out / VGG)
    say("[2/3] training FESD-Pix2Pix: teacher, student and discriminator together", style="bold")
    with StopSignals(last=True) as signals:
        trained = base.train_stage(training_arguments(options.out, options.steps, options.seed), signals)
    if trained is None:
        return EXIT_STOPPED
    _, stage = trained

    data = stage.config.data
    sets = {"test": data.eval[TEST_SET], "train": data.train[0]}
    protocol = TranslationProtocol("paired", data.direction, data.crop, "test", kid=False)  # as the run measures it
    evaluator = TranslationEvaluator(sets, protocol, data.train, None, None)
    say(f"[3/3] measuring on {evaluator.count('test')} drawings that were not trained on", style="bold")
    story = measured_story(stage, evaluator, options)
    base.publish(options.out, numbers(story), demo_page(story), results_table(story), verdict(story))
    return 0


def measured_story(stage: Stage, evaluator: TranslationEvaluator, options: argparse.Namespace) -> GANStory:
    """All rows on the sets "test" and "train" of the evaluator."""
    # The last weights: the best ones were chosen by these very pictures.
    last = stage.folder / "generators" / "last"
    flat = FlatColour(mean_colour([pair.painting for pair in pairs_of("train")]))
    generators: dict[str, nn.Module] = {"flat": flat, "drawing": nn.Identity()}
    generators |= {role: load_generator(last / f"{role}.safetensors")[0] for role in TRAINED}
    made = {name: translations(generator, evaluator, "test") for name, generator in generators.items()}
    seen = {role: translations(generators[role], evaluator, "train", places("train")) for role in TRAINED}
    return GANStory(
        [measure(name, generator, evaluator) for name, generator in generators.items()],
        {name: distance(made[name], made["teacher"]) for name in made if name != "teacher"},
        stage,
        {"test": {role: made[role] for role in TRAINED}, "train": seen},
        {split: evaluator.count(split) for split in evaluator.test_sets},
        base.own_command("demo-gan", options, Path("runs/demo-gan")),
    )


def numbers(story: GANStory) -> dict[str, Any]:
    """What results.json holds."""
    stage = story.stage
    rows = [
        {
            **row.to_json(),
            "to_teacher": story.to_teacher.get(row.name),
            "pictures": len(row.per_image),
            "per_picture": list(row.per_image),
        }
        for row in story.rows
    ]
    return {
        "rows": rows,
        "solved": solved(story),
        "steps": stage.steps,
        "batch_size": stage.result["batch_size"],
        "seconds": stage.result["seconds"],
        "seed": stage.config.seed,
        "size": stage.config.data.crop,
        "weights": "last",
        "pictures": story.counts,
    }


def training_arguments(folder: Path, steps: int | None, seed: int | None = None) -> tuple[str, ...]:
    """What `hpcdistill train` is called with."""
    packed = folder / "packed"
    arguments = [
        CONFIG,
        VARIANT,
        f"runs={base.yaml_path(folder)}",
        f"data.train={base.yaml_path(packed / 'train')}",
        f"method.vgg={base.yaml_path(folder / VGG)}",
        f"data.eval={json.dumps({TEST_SET: str(packed / 'test')})}",
    ]
    if steps is not None:
        arguments += base.shortened(base.resolve([CONFIG, VARIANT]).config, steps)
    if seed is not None:
        arguments.append(f"seed={seed}")
    return tuple(arguments)


def measure(name: str, generator: nn.Module, evaluator: TranslationEvaluator) -> Measured:
    """PSNR and L1 of one row to the paintings of the test set, and its cost at 256x256."""
    found = evaluator.evaluate(generator, "test")
    cost = image_cost(generator) if name in TRAINED else Cost(0, 0, 0)
    return Measured(name, *ROWS[name], found.metrics, found.per_image, cost)


def translations(
    generator: nn.Module, evaluator: TranslationEvaluator, split: str, some: int | None = None
) -> dict[str, Tensor]:
    """What a generator makes of all drawings of a split, or of the first ones."""
    numbers = {evaluator.name(split, number): number for number in range(evaluator.count(split))}
    names = [pair.name for pair in pairs_of(split)][:some]
    return dict(zip(names, evaluator.translations(generator, split, [numbers[name] for name in names]), strict=True))


def distance(pictures: Pictures, others: Pictures) -> dict[str, float]:
    """Between pictures of the same names, means over them: "psnr" in dB and "l1" in levels."""
    ones, twos = (torch.stack([some[name] for name in pictures]) for some in (pictures, others))
    return {metric.name: float(metric.compute(ones, twos).mean()) for metric in (PSNR_OF_PAIRS, L1_OF_PAIRS)}
