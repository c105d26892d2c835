"""The page of the demo of image translation: pictures beside each other, tables, curves, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.methods.gan_settings import FAMILIES, GeneratorSettings
from hpcdistill.metrics.cost import Cost, image_cost
from hpcdistill.models.image_generator import build_generator
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos import base
from hpcdistill.sweep.demos.base import Measured
from hpcdistill.sweep.demos.shape_pairs import COLOURS, SIDE, Pair, pairs_of
from hpcdistill.sweep.demos.translation_story import CONFIG, SOLVED, TEST_SET, TRAINED, GANStory, solved
from hpcdistill.sweep.report import Card, Charts, Commands, Crops, Facts, Image, Page, Row, Section, Table, Text

PAPERS = ("Pix2Pix's generator", "The paper's student")
SHOWN = {"test": (4, 2), "train": (4, 1)}  # columns and lines of the pictures shown
WORST = 2  # of those of the test set: those that the student did worst


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


def paper_costs() -> tuple[Cost, Cost]:
    """What the generators of the paper's own experiment cost, for scale: Pix2Pix's and the student."""
    method = base.resolve([CONFIG]).config.method
    assert isinstance(method, DistilledGANConfig)

    def counted(settings: GeneratorSettings) -> Cost:
        name, arguments = settings.arguments(FAMILIES[method.family])
        with torch.device("meta"):  # only counted
            return image_cost(build_generator(name, **arguments))

    return counted(GeneratorSettings(network=method.teacher.network)), counted(method.student)


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
            ("The paper's own experiment, on one GPU", f"hpcdistill train {CONFIG}"),
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


def places(split: str) -> int:
    """How many pictures of a split are shown."""
    columns, lines = SHOWN[split]
    return columns * lines


def _first(split: str) -> list[Pair]:
    return list(pairs_of(split)[: places(split)])


def _first_and_worst(student: Measured) -> list[Pair]:
    """The first pictures of the test set, then the WORST that the student did worst, the very worst last."""
    best_first = sorted(student.per_image, key=lambda image: -float(image["psnr"]))
    worst = [image["name"] for image in best_first[-WORST:]]
    by_name = {pair.name: pair for pair in pairs_of("test")}
    others = [pair for name, pair in by_name.items() if name not in worst]
    return others[: places("test") - WORST] + [by_name[name] for name in worst]


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
