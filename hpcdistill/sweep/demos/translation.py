"""The demo of image translation: FESD-Pix2Pix turns edge drawings back into photographs, in miniature."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpcdistill.console import say
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.methods.gan_settings import FAMILIES, GeneratorSettings
from hpcdistill.metrics.cost import Cost, image_cost
from hpcdistill.metrics.sr_evaluation import evaluating
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol, eight_bits, translate
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import load_generator
from hpcdistill.ranks.signals import EXIT_STOPPED, StopSignals
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos import base
from hpcdistill.sweep.demos.base import Box, Measured, Stage
from hpcdistill.sweep.demos.edge_pairs import (
    OF_SCIENCE,
    PHOTOGRAPHS,
    SHORT_SIDES,
    TILE,
    FlatColour,
    Pair,
    mean_colour,
    pack_pairs,
    pairs_of,
    photographs,
    write_random_vgg16,
)
from hpcdistill.sweep.report import Card, Charts, Commands, Crops, Facts, Image, Page, Row, Section, Table, Text

CONFIG = "configs/fesd/edges2shoes.yaml"
VARIANT = "configs/variants/demo-gan.yaml"
TEST_SET = "tiles"  # its name under data.eval
VGG = "vgg16-untrained.safetensors"
# Title and colour of each generator all over the page.
GENERATORS = {"flat": ("One flat colour", 0), "teacher": ("Teacher", 3), "student": ("Student", 2)}
PAPERS = ("Pix2Pix's generator", "The paper's student")
TRAINED_SHOWN = 2  # photographs trained on that are shown, the first ones
PLACES = ("all of it", "the tile with the most edges", "the tile with the fewest")


@dataclass(frozen=True)
class GANStory:
    """Everything the page is made of."""

    rows: Sequence[Measured]  # flat, teacher, student
    stage: Stage  # the run
    generators: Mapping[str, nn.Module]  # teacher, student
    pairs: Mapping[str, Sequence[Pair]]  # the photographs with their edges: "test", "train"
    tiles: Mapping[str, int]  # how many, by split
    command: str  # that made the page

    @property
    def method(self) -> DistilledGANConfig:
        method = self.stage.config.method
        assert isinstance(method, DistilledGANConfig)
        return method

    @property
    def names(self) -> dict[str, list[str]]:
        """The photographs by split."""
        return {split: list(dict.fromkeys(pair.name for pair in pairs)) for split, pairs in self.pairs.items()}


def run_demo(options: argparse.Namespace) -> int:
    """Draw, train, measure, and write the page; returns the exit code."""
    say("[1/3] drawing edges and packing the pairs", style="bold")
    packed = pack_pairs(options.out)
    write_random_vgg16(options.out / VGG)
    say("[2/3] training FESD-Pix2Pix: teacher, student and discriminator together", style="bold")
    with StopSignals() as signals:
        trained = base.train_stage(training_arguments(options.out, options.steps), signals)
    if trained is None:
        return EXIT_STOPPED
    _, stage = trained

    data, result = stage.config.data, stage.result
    protocol = TranslationProtocol("paired", data.direction, data.crop, "test", kid=False)  # as the run measures it
    evaluator = TranslationEvaluator(data.eval, protocol, data.train, None, None)
    say(f"[3/3] measuring on {evaluator.count(TEST_SET)} tiles that were not trained on", style="bold")
    # The last weights: the best ones were chosen by these very tiles.
    last = stage.folder / "generators" / "last"
    generators = {role: load_generator(last / f"{role}.safetensors")[0] for role in ("teacher", "student")}
    pairs = {
        split: [pair for source in sources for pair in pairs_of(source, split)]
        for split, sources in photographs().items()
    }
    flat = FlatColour(mean_colour([pair.photograph for pair in pairs["train"]]))
    rows = [measure(name, generator, evaluator) for name, generator in {"flat": flat, **generators}.items()]
    tiles = {split: len(index.samples) for split, index in packed.items()}
    results = {
        "rows": [{**row.to_json(), "tiles": len(row.per_image), "per_tile": list(row.per_image)} for row in rows],
        "steps": result["steps"],
        "batch_size": result["batch_size"],
        "seconds": result["seconds"],
        "seed": stage.config.seed,
        "size": data.crop,
        "weights": "last",
        "tiles": tiles,
        "photographs": {split: [source.name for source in found] for split, found in photographs().items()},
    }
    story = GANStory(
        rows, stage, generators, pairs, tiles, base.own_command("demo_gan", options, Path("runs/demo-gan"))
    )
    base.publish(options.out, results, demo_page(story), results_table(rows), verdict(rows, stage.steps, story.names))
    return 0


def training_arguments(folder: Path, steps: int | None) -> tuple[str, ...]:
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
    return tuple(arguments)


def measure(name: str, generator: nn.Module, evaluator: TranslationEvaluator) -> Measured:
    """PSNR of one generator on the test tiles, and its cost at 256x256."""
    found = evaluator.evaluate(generator, TEST_SET)
    cost = Cost(0, 0, 0) if name == "flat" else image_cost(generator)
    return Measured(name, *GENERATORS[name], found.metrics, found.per_image, cost)


def paper_costs() -> tuple[Cost, Cost]:
    """What the generators of the paper's own experiment cost, for scale: Pix2Pix's and the student."""
    method = base.resolve([CONFIG]).config.method
    assert isinstance(method, DistilledGANConfig)

    def counted(settings: GeneratorSettings) -> Cost:
        name, arguments = settings.arguments(FAMILIES[method.family])
        with torch.device("meta"):  # only counted
            return image_cost(build_generator(name, **arguments))

    return counted(GeneratorSettings(network=method.teacher.network)), counted(method.student)


def verdict(rows: Sequence[Measured], steps: int, names: Mapping[str, Sequence[str]]) -> list[str]:
    """What the numbers say, and what they do not; `names`: the photographs by split."""
    flat, teacher, student = rows
    return [
        f"After {steps:,} steps the teacher is {base.compared(teacher, flat)} and the student "
        f"{base.compared(student, flat)}, on {len(flat.per_image)} tiles of {len(names['test'])} photographs; the flat "
        "colour is the mean of those trained on.",
        f"So short a training on {len(names['train'])} photographs proves nothing: neither that the method works nor "
        "that it does not. It shows the way from pictures to a student, no more.",
    ]


def demo_page(story: GANStory) -> Page:
    """The demo's page."""
    teacher, student = (row.cost.params for row in story.rows[1:])
    times = base.digits(teacher / student, 2)
    smaller = Card("Smaller", f"{times}x", "", f"{teacher:,} parameters against {student:,}")
    learned = story.names["train"]
    seen = (
        f"{' and '.join(learned[:TRAINED_SHOWN])}, the first of the {len(learned)} that were trained on: the gap to "
        "the pictures above is what was learned by heart."
    )
    smallest = {pair.name: pair for pair in reversed(story.pairs["train"])}  # a photograph's first size
    trained = [smallest[name] for name in learned[:TRAINED_SHOWN]]
    measured = (
        results_table(story.rows),
        base.by_photograph(
            story.rows, "PSNR by photograph, the mean of its tiles [dB]", lambda tile: tile.split("-")[0]
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
        title="Photographs from their edges",
        kicker="hpcdistill demo: paired image translation, FESD-Pix2Pix in miniature",
        lead=f"The edges of a photograph go in, a photograph is to come out. A teacher of {teacher:,} parameters "
        f"learns it from pairs; a student of {student:,}, {times} times fewer, learns beside it, from the teacher and "
        "the discriminator that judges both. The command that made this page trained them for "
        f"{story.stage.steps:,} steps.",
        sections=(
            Section("", (base.cards(story.rows, smaller), Text(_caution(story), tone="caution"))),
            Section(
                "Photographs that were not trained on",
                (Text((_VIEWS,)), *(_crops(story, pair, PLACES) for pair in story.pairs["test"])),
            ),
            Section(
                "Photographs that were trained on",
                (Text((seen,)), *(_crops(story, pair, PLACES[:1]) for pair in trained)),
            ),
            Section("What was measured", measured),
            Section("How the training went", (Charts(_charts(story)),)),
            Section("How it was made", (_facts(story), commands)),
        ),
        footer=f"Made by `{story.command}` of hpcdistill. This page needs no network and no other file.",
    )


_VIEWS = (
    "Three views of each photograph: all of it, translated in one piece, then the tile with the most edges and the one "
    "with the fewest, chosen by rule and not by eye. Every pixel is magnified as it is. The PSNR below a tile is that "
    "tile's."
)


def _caution(story: GANStory) -> tuple[str, ...]:
    """What such numbers and pictures are worth."""
    stage, crop = story.stage, story.stage.config.data.crop
    full = round(load_recipe("edges2shoes").images["train"]["ab"] * stage.config.train.epochs)
    return (
        " ".join(verdict(story.rows, stage.steps, story.names)),
        "What a drawing does not say, such as the colour of an empty place, can only be guessed; six photographs of "
        f"other things are no help. The paper's recipe shows its networks {full:,} pairs of 256x256 pixels, this one "
        f"showed {stage.steps * stage.result['batch_size']:,} of {crop}x{crop}. The style and the feature loss compare "
        "the student's picture with the teacher's in the eyes of a VGG16. The paper's was trained on ImageNet, a "
        "download of 528 MB; this one has random filters and was never trained. It tells pictures apart, not what "
        "matters in them, and the feature loss has ten times the paper's weight, for so few steps.",
    )


def results_table(rows: Sequence[Measured]) -> Table:
    """What was measured and what it costs, on the terminal and on the page."""

    def cells(cost: Cost) -> tuple[str, ...]:
        return f"{cost.params:,}", f"{cost.macs / 1e9:.3f} G", f"{cost.true_macs / 1e9:.3f} G"

    flat, *trained = rows
    return Table(
        caption=f"Edges to photographs, mean of {len(flat.per_image)} tiles not trained on",
        columns=("Generator", "PSNR [dB]", "to flat", "Parameters", "MACs", "true MACs"),
        rows=(
            Row((flat.title, f"{flat.psnr:.2f}", "-", "-", "-", "-"), flat.series),
            *(
                Row((row.title, f"{row.psnr:.2f}", base.gain_over(row, flat), *cells(row.cost)), row.series)
                for row in trained
            ),
            *(Row((title, "-", "-", *cells(cost))) for title, cost in zip(PAPERS, paper_costs(), strict=True)),
        ),
        note="PSNR on RGB of 8 bits, the last weights of the run. One flat colour: the mean of all pixels trained on, "
        "whatever is given. PSNR is a poor judge of a picture that was guessed; the literature's FID needs thousands "
        "of pictures to mean anything and is left out here. MACs are for an image of 256x256; the literature's rule "
        "charges a transposed convolution at its output's size, true MACs do not. The last two networks are the "
        "paper's, for scale: its student has one sixteenth of the parameters of Pix2Pix's generator, its teacher.",
    )


def _crops(story: GANStory, pair: Pair, places: Sequence[str]) -> Crops:
    """A photograph and its places: what is given, what teacher and student make of it, and what it was."""
    size = TILE["test"]
    tile_of = {box: name for name, box in pair.tiles(size)}
    by_ink = sorted(tile_of, key=lambda box: int(base.cut(pair.edges, box).sum(dtype=np.int64)))
    boxes = dict(zip(PLACES, (_around(by_ink), by_ink[0], by_ink[-1]), strict=True))
    views = []
    for place in places:
        box = boxes[place]
        edges, photograph = base.cut(pair.edges, box), base.cut(pair.photograph, box)
        pictures: list[tuple[str, Image, str, int | None]] = [("Edges", edges, f"{box[3]} x {box[2]} pixels", None)]
        for row in story.rows[1:]:
            decibels = [tile["psnr"] for tile in row.per_image if tile["name"] == tile_of.get(box)]
            note = f"{decibels[0]:.2f} dB" if decibels else ""
            pictures.append((row.title, translated(story.generators[row.name], edges), note, row.series))
        pictures.append(("Photograph", photograph, "what it was", None))
        views.append(base.view(pair.name, place, box, pictures))
    height, width = pair.photograph.shape[:2]
    note = f"shrunk to {width} x {height} pixels; {len(tile_of)} tiles of {size} x {size}"
    return Crops(
        pair.name, pair.photograph, f"The photograph {pair.name}; boxes mark what is below", tuple(views), note
    )


def translated(generator: nn.Module, edges: Image) -> Image:
    """The 8-bit photograph that a generator makes of an edge drawing of any size that it takes."""
    with evaluating(generator) as network:
        output = eight_bits(translate(network, torch.from_numpy(edges.transpose(2, 0, 1).copy())[None]))
    picture: Image = output[0].permute(1, 2, 0).contiguous().numpy()
    return picture


def _around(boxes: Sequence[Box]) -> Box:
    """The box around tiles that lie side by side: a multiple of a tile, so that any number of levels fits."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def _charts(story: GANStory) -> tuple[Chart, ...]:
    """PSNR and every term of the losses; a term that the configuration leaves out has no curve."""
    method, (_, teacher, student) = story.method, story.rows

    def losses(title: str, terms: Sequence[tuple[str, str, int]], note: str, log_y: bool = False) -> Chart:
        """`terms`: key in the log, label, colour."""
        curves = (Line(label, series, story.stage.curve(key)) for key, label, series in terms)
        lines = tuple(line for line in curves if line.points)
        return Chart(title, "step", "loss", lines, log_y=log_y, digits=4, note=note)

    def judged(prefix: str) -> list[tuple[str, str, int]]:
        labels = (("real", "photographs", 1), ("fake", "the teacher's", 3), ("fake_student", "the student's", 2))
        return [(f"discriminator/{prefix}{name}", label, series) for name, label, series in labels]

    charts = (
        base.psnr_chart(
            [(row, story.stage, f"{row.name}/{TEST_SET}/psnr") for row in (teacher, student)], story.rows[:1]
        ),
        losses(
            "The teacher's distance from the photograph",
            [("teacher/reconstruction", "reconstruction", teacher.series)],
            f"Mean absolute error, weight {method.weight_reconstruction:g}. The student is never shown a photograph.",
        ),
        losses(
            "Fooling the discriminator",
            [(f"{row.name}/gan", row.title, row.series) for row in (teacher, student)],
            "Hinge loss: below zero, the discriminator takes pictures for photographs.",
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
            "The discriminator's loss", judged(""), "On photographs and on what the generators make of the same edges."
        ),
        losses("The spectral classifier's loss", judged("spectral_"), "The same, judged by the radial spectrum alone."),
    )
    return tuple(chart for chart in charts if chart.lines)


def _facts(story: GANStory) -> Facts:
    config, method, result = story.stage.config, story.method, story.stage.result
    recipe, crop = load_recipe(PHOTOGRAPHS), config.data.crop
    where = {split: f"{story.tiles[split]} tiles of {', '.join(names)}" for split, names in story.names.items()}
    return Facts(
        (
            ("Trained on", f"{where['train']}; from {recipe.origin}"),
            (
                "Tiles",
                f"{TILE['train']} x {TILE['train']} pixels to train on, of photographs shrunk to a shorter side of "
                f"{', '.join(map(str, SHORT_SIDES['train']))} pixels ({', '.join(OF_SCIENCE)}: "
                f"{SHORT_SIDES['train'][0]} only); {TILE['test']} x {TILE['test']}, of {SHORT_SIDES['test'][0]}, to "
                "test",
            ),
            ("Measured on", f"{where['test']}; from {recipe.origin}"),
            ("Licence", recipe.licence),
            ("Edges", "strength of the luma's edges (Sobel), dark on white"),
            (
                "Networks",
                f"U-Nets of {method.teacher.levels} levels, base width {method.teacher.ngf} (teacher) and "
                f"{method.student.ngf} (student); PatchGAN of base width {method.ndf}, "
                f"{method.discriminator_strides} strided layers",
            ),
            (
                "Training",
                f"{story.stage.steps:,} steps of {result['batch_size']} crops of {crop} x {crop} pixels; "
                f"Adam, learning rate {method.optimizer.learning_rate:g}; {base.clock(result['seconds'])}",
            ),
            ("Seed", str(result["seed"])),
            *story.stage.facts(),
        )
    )
