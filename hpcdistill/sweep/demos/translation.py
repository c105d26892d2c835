"""The demo of image translation: FESD-Pix2Pix paints outline drawings, in miniature."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import EXIT_STOPPED
from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.methods.gan_settings import FAMILIES, GeneratorSettings
from hpcdistill.metrics.base import L1_OF_PAIRS, PSNR_OF_PAIRS
from hpcdistill.metrics.cost import Cost, image_cost
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import load_generator
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos import base
from hpcdistill.sweep.demos.base import Measured, Stage
from hpcdistill.sweep.demos.shape_pairs import (
    COLOURS,
    SIDE,
    FlatColour,
    Pair,
    mean_colour,
    pack_pairs,
    pairs_of,
    write_random_vgg16,
)
from hpcdistill.sweep.report import Card, Charts, Commands, Crops, Facts, Image, Page, Row, Section, Table, Text

CONFIG = "configs/fesd/edges2shoes.yaml"
VARIANT = "configs/variants/demo-gan.yaml"
TEST_SET = "shapes"  # its name under data.eval
VGG = "vgg16-untrained.safetensors"
# Title and colour of each row all over the page; the first two learn nothing.
ROWS = {
    "flat": ("One flat colour", 0),
    "drawing": ("The drawing as it is", 1),
    "teacher": ("Teacher", 3),
    "student": ("Student", 2),
}
TRAINED = ("teacher", "student")
PAPERS = ("Pix2Pix's generator", "The paper's student")
SOLVED = 2.0  # dB above one flat colour, in the distance from the painting and from the teacher's picture
SHOWN = {"test": (4, 2), "train": (4, 1)}  # columns and lines of the pictures shown
WORST = 2  # of those of the test set: those that the student did worst


Pictures = Mapping[str, Tensor]  # name of the pair -> uint8 [3, SIDE, SIDE]


@dataclass(frozen=True)
class GANStory:
    """Everything the page is made of."""

    rows: Sequence[Measured]  # as ROWS
    to_teacher: Mapping[str, Mapping[str, float]]  # row -> "psnr" and "l1" to the teacher's pictures
    stage: Stage  # the run
    pictures: Mapping[str, Mapping[str, Pictures]]  # split -> teacher, student -> what they made
    counts: Mapping[str, int]  # pairs by split
    command: str  # that made the page

    @property
    def method(self) -> DistilledGANConfig:
        method = self.stage.config.method
        assert isinstance(method, DistilledGANConfig)
        return method


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
    seen = {role: translations(generators[role], evaluator, "train", _places("train")) for role in TRAINED}
    return GANStory(
        [measure(name, generator, evaluator) for name, generator in generators.items()],
        {name: distance(made[name], made["teacher"]) for name in made if name != "teacher"},
        stage,
        {"test": {role: made[role] for role in TRAINED}, "train": seen},
        {split: evaluator.count(split) for split in evaluator.test_sets},
        base.own_command("demo_gan", options, Path("runs/demo-gan")),
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
    """What `python -m hpcdistill.train` is called with."""
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


def paper_costs() -> tuple[Cost, Cost]:
    """What the generators of the paper's own experiment cost, for scale: Pix2Pix's and the student."""
    method = base.resolve([CONFIG]).config.method
    assert isinstance(method, DistilledGANConfig)

    def counted(settings: GeneratorSettings) -> Cost:
        name, arguments = settings.arguments(FAMILIES[method.family])
        with torch.device("meta"):  # only counted
            return image_cost(build_generator(name, **arguments))

    return counted(GeneratorSettings(network=method.teacher.network)), counted(method.student)


def solved(story: GANStory) -> bool:
    """Whether the student paints, and as its teacher does: by SOLVED above one flat colour in both."""
    flat, student = (row for row in story.rows if row.name in ("flat", "student"))
    nearer = story.to_teacher["student"]["psnr"] - story.to_teacher["flat"]["psnr"]
    return student.psnr - flat.psnr >= SOLVED and nearer >= SOLVED


def verdict(story: GANStory) -> list[str]:
    """What the numbers say, and what they do not."""
    flat, _, teacher, student = story.rows
    near, far = story.to_teacher["student"], story.to_teacher["flat"]
    done = solved(story)
    shown = (
        "Shown is that a student learned to paint from its teacher and its discriminator alone, on pictures made by a "
        "rule."
        if done
        else "So nothing is shown of learning; more steps may (--steps)."
    )
    return [
        f"The task is {'solved' if done else 'NOT solved'} after {story.stage.steps:,} steps: the student is "
        f"{base.compared(student, flat)}, the teacher {base.compared(teacher, flat)}, on {len(flat.per_image)} "
        f"drawings that were not trained on. The student's pictures are {near['psnr']:.2f} dB ({near['l1']:.1f} "
        f"levels) from the teacher's, the flat colour is {far['psnr']:.2f} dB ({far['l1']:.1f} levels) from them.",
        f"Solved means here: the student is {SOLVED:g} dB better than one flat colour, the mean of all pictures "
        f"trained on, both beside the painting and beside the teacher's picture. {shown} Nothing is shown about "
        "photographs, about FESD against another method, or about FID.",
    ]


def demo_page(story: GANStory) -> Page:
    """The demo's page."""
    *_, teacher_row, student_row = story.rows
    teacher, student = teacher_row.cost, student_row.cost
    near = story.to_teacher["student"]
    further = (
        Card("Student to teacher", f"{near['psnr']:.2f}", "dB", f"{near['l1']:.1f} levels apart, mean of all pixels"),
        Card(
            "Cheaper",
            f"{base.digits(teacher.macs / student.macs, 2)}x",
            "",
            f"{student.macs / 1e9:.3f} G MACs against {teacher.macs / 1e9:.3f} G at 256x256",
        ),
    )
    flat = story.rows[0]
    measured = (
        results_table(story),
        base.by_photograph(
            story.rows, "PSNR by what is on the drawing [dB]", lambda name: f"{name.split('-')[0]} shapes"
        ),
    )
    commands = Commands(
        (
            ("This page", story.command),
            ("The training alone, once the pairs are made", story.stage.command),
            ("The paper's own experiment, on one GPU", f"python -m hpcdistill.train {CONFIG}"),
        )
    )
    return Page(
        title="Paintings from outlines",
        kicker="hpcdistill demo: paired image translation, FESD-Pix2Pix in miniature",
        lead="Outlines of shapes go in, a painting is to come out: each kind in its colour, with light and shadows. A "
        f"teacher of {teacher.params:,} parameters learns it from pairs; a student of {student.params:,} learns beside "
        "it, from the teacher and the discriminator that judges both, and is never shown a painting. The command that "
        f"made this page trained them for {story.stage.steps:,} steps.",
        sections=(
            Section(
                "", (base.cards([flat, teacher_row, student_row], *further), Text(_caution(story), tone="caution"))
            ),
            Section("Drawings that were not trained on", (Text((_VIEWS,)), _crops(story, "test"))),
            Section(
                "Drawings that were trained on",
                (Text(("The first ones. A gap to those above is what was learned by heart.",)), _crops(story, "train")),
            ),
            Section("What was measured", measured),
            Section("How the training went", (Charts(_charts(story)),)),
            base.take_away(story.stage, ("onnx",)),
            Section("How it was made", (_facts(story), commands)),
        ),
        footer=f"Made by `{story.command}` of hpcdistill. This page needs no network and no other file.",
    )


_VIEWS = (
    f"The first of the test set and, at the end, the {WORST} that the student did worst: chosen by rule and not by "
    "eye. Every pixel is magnified as it is. PSNR is to the painting."
)


def _caution(story: GANStory) -> tuple[str, ...]:
    """What such numbers and pictures are worth."""
    stage, crop = story.stage, story.stage.config.data.crop
    full = round(load_recipe("edges2shoes").images["train"]["ab"] * stage.config.train.epochs)
    return (
        *verdict(story),
        "Nor is it shown that a teacher is needed: in a measurement of three seeds the student's network alone, "
        "trained on the pairs as Pix2Pix for 400 steps, came nearer to the paintings (docs/results/demo-gan.md).",
        "The pictures are made by a rule, and a drawing decides its painting; that is why a distance from the painting "
        "is a fair judge here, and why it says little about tasks where much is to be guessed. The literature's FID "
        "needs thousands of pictures to mean anything and is left out. The paper's recipe shows its networks "
        f"{full:,} pairs of 256x256 pixels, this one showed {stage.steps * stage.result['batch_size']:,} of "
        f"{crop}x{crop}. The style and the feature loss compare the student's picture with the teacher's in the eyes "
        "of a VGG16. The paper's was trained on ImageNet, a download of 528 MB; of this one only the first layer is "
        "used, it has random filters and was never trained, and the feature loss has "
        f"{story.method.weight_feature / DistilledGANConfig().weight_feature:g} times the paper's weight.",
    )


def results_table(story: GANStory) -> Table:
    """What was measured and what it costs, on the terminal and on the page."""
    flat = story.rows[0]

    def costs(cost: Cost) -> tuple[str, ...]:
        if not cost.params:
            return ("-",) * 3
        return f"{cost.params:,}", f"{cost.macs / 1e9:.3f} G", f"{cost.true_macs / 1e9:.3f} G"

    def cells(row: Measured) -> tuple[str, ...]:
        near = story.to_teacher.get(row.name)
        return (
            row.title,
            f"{row.psnr:.2f}",
            base.gain_over(row, flat),
            f"{row.metrics['l1']:.1f}",
            f"{near['psnr']:.2f}" if near else "-",
            *costs(row.cost),
        )

    return Table(
        caption=f"Outlines to paintings, mean of {len(flat.per_image)} not trained on",
        columns=("Picture", "PSNR [dB]", "to flat", "L1", "to teacher [dB]", "Parameters", "MACs", "true MACs"),
        rows=(
            *(Row(cells(row), row.series) for row in story.rows),
            *(Row((title, *("-",) * 4, *costs(cost))) for title, cost in zip(PAPERS, paper_costs(), strict=True)),
        ),
        note="PSNR and L1 (mean absolute difference, levels of 255; lower is better) to the painting, on RGB of 8 "
        "bits, the last weights of the run; to teacher: the PSNR to the teacher's picture. One flat colour: the mean "
        "of all pixels trained on, whatever is given. MACs are for an image of 256x256; the literature's rule charges "
        "a transposed convolution at its output's size, true MACs do not. The last two networks are the paper's, for "
        "scale: its student has one sixteenth of the parameters of Pix2Pix's generator, its teacher.",
    )


def _crops(story: GANStory, split: str) -> Crops:
    """Drawings of a split: what is given, what teacher and student make of it, and the painting."""
    columns = SHOWN[split][0]
    shown = _first(split) if split == "train" else _first_and_worst(story.rows[-1])
    views = []
    for place, pair in enumerate(shown):
        pictures: list[tuple[str, Image, str, int | None]] = [("Drawing", pair.drawing, "what is given", None)]
        for row in story.rows:
            if row.name in TRAINED:
                made = story.pictures[split][row.name][pair.name].permute(1, 2, 0).contiguous().numpy()
                decibels = [image["psnr"] for image in row.per_image if image["name"] == pair.name]
                note = f"{decibels[0]:.2f} dB" if split == "test" else ""
                pictures.append((row.title, made, note, row.series))
        pictures.append(("Painting", pair.painting, "what was wanted", None))
        box = place // columns * SIDE, place % columns * SIDE, SIDE, SIDE
        views.append(base.view(split, f"number {pair.name}", box, pictures))
    lines = [
        np.concatenate([pair.painting for pair in shown[place : place + columns]], axis=1)
        for place in range(0, len(shown), columns)
    ]
    return Crops(
        "Their paintings",
        np.concatenate(lines),
        f"{len(shown)} paintings of the {split} set; boxes mark what is below",
        tuple(views),
        f"{len(shown)} of {len(pairs_of(split)):,}, each {SIDE} x {SIDE} pixels",
    )


def _places(split: str) -> int:
    """How many pictures of a split are shown."""
    columns, lines = SHOWN[split]
    return columns * lines


def _first(split: str) -> list[Pair]:
    return list(pairs_of(split)[: _places(split)])


def _first_and_worst(student: Measured) -> list[Pair]:
    """The first pictures of the test set, then the WORST that the student did worst, the very worst last."""
    best_first = sorted(student.per_image, key=lambda image: -float(image["psnr"]))
    worst = [image["name"] for image in best_first[-WORST:]]
    by_name = {pair.name: pair for pair in pairs_of("test")}
    others = [pair for name, pair in by_name.items() if name not in worst]
    return others[: _places("test") - WORST] + [by_name[name] for name in worst]


def _charts(story: GANStory) -> tuple[Chart, ...]:
    """PSNR and every term of the losses; a term that the configuration leaves out has no curve."""
    method, (flat, _, teacher, student) = story.method, story.rows

    def losses(title: str, terms: Sequence[tuple[str, str, int]], note: str, log_y: bool = False) -> Chart:
        """`terms`: key in the log, label, colour."""
        curves = (Line(label, series, story.stage.curve(key)) for key, label, series in terms)
        lines = tuple(line for line in curves if line.points)
        return Chart(title, "step", "loss", lines, log_y=log_y, digits=4, note=note)

    def judged(prefix: str) -> list[tuple[str, str, int]]:
        labels = (("real", "paintings", 1), ("fake", "the teacher's", 3), ("fake_student", "the student's", 2))
        return [(f"discriminator/{prefix}{name}", label, series) for name, label, series in labels]

    charts = (
        base.psnr_chart(
            [(row, story.stage, f"{row.name}/{TEST_SET}/psnr") for row in (teacher, student)], [flat], "drawings"
        ),
        losses(
            "The teacher's distance from the painting",
            [("teacher/reconstruction", "reconstruction", teacher.series)],
            f"Mean absolute error, weight {method.weight_reconstruction:g}. The student is never shown a painting.",
        ),
        losses(
            "Fooling the discriminator",
            [(f"{row.name}/gan", row.title, row.series) for row in (teacher, student)],
            "Hinge loss: below zero, the discriminator takes pictures for paintings.",
        ),
        losses(
            "The student's picture and the teacher's",
            [("student/style", "L_sty", 5), ("student/feature", "L_feat", 6)],
            f"In the eyes of the untrained VGG16: style (weight {method.weight_style:g}) and feature (weight "
            f"{method.weight_feature:g}).",
        ),
        losses(
            "The student's feature maps and the teacher's",
            [("student/dcd", "L_dcd", student.series), ("student/spectral", "L_spectral", 4)],
            f"In the eyes of the discriminator (L_dcd, weight {method.weight_dcd:g}) and of the spectral classifier "
            f"(L_spectral, weight {method.weight_spectral:g}), after the partial channel shift.",
            log_y=True,
        ),
        losses(
            "The discriminator's loss", judged(""), "On paintings and on what the generators make of the same drawings."
        ),
        losses("The spectral classifier's loss", judged("spectral_"), "The same, judged by the radial spectrum alone."),
    )
    return tuple(chart for chart in charts if chart.lines)


def _facts(story: GANStory) -> Facts:
    config, method, result = story.stage.config, story.method, story.stage.result
    kinds = ", ".join(COLOURS)
    crop = config.data.crop
    return Facts(
        (
            ("Trained on", f"{story.counts['train']:,} pairs of {SIDE} x {SIDE} pixels, drawn by this program"),
            ("Measured on", f"{story.counts['test']} others, of another seed"),
            ("Shapes", f"{kinds}; place and size at random, none over another's"),
            ("Licence", "none is needed: no picture is anybody's"),
            (
                "Networks",
                f"U-Nets of {method.teacher.levels} levels, base width {method.teacher.ngf} (teacher) and "
                f"{method.student.ngf} (student); PatchGAN of base width {method.ndf}, "
                f"{method.discriminator_strides} strided layers",
            ),
            (
                "Training",
                f"{story.stage.steps:,} steps of {result['batch_size']} pictures of {crop} x {crop} pixels; "
                f"Adam, learning rate {method.optimizer.learning_rate:g}; {base.clock(result['seconds'])}",
            ),
            ("Seed", str(result["seed"])),
            *story.stage.facts(),
        )
    )
