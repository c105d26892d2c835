"""The GAN demo's page: what is said and shown of its run. How it looks is `report`'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.metrics.cost import Cost
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos.demo_gan_pairs import OF_SCIENCE, SHORT_SIDES, TILE, Image, Pair
from hpcdistill.sweep.demos.demo_gan_rows import SERIES, TITLES, Measured, compared, ratio, translated, verdict
from hpcdistill.sweep.demos.demo_report import Stage
from hpcdistill.sweep.demos.demo_rows import clock
from hpcdistill.sweep.report import (
    Card,
    Cards,
    Charts,
    Commands,
    Crop,
    Crops,
    Facts,
    Page,
    Row,
    Section,
    Table,
    Text,
    View,
)

if TYPE_CHECKING:
    from hpcdistill.config import RunConfig
    from hpcdistill.data.pack.recipes import Recipe

TRAINED_SHOWN = 2  # photographs trained on that are shown, the first ones
PLACES = ("all of it", "the tile with the most edges", "the tile with the fewest")
# Colours of the terms in the charts that have neither teacher nor student alone.
_REAL, _SPECTRAL = 1, 4


@dataclass(frozen=True)
class Story:
    """Everything the page is made of."""

    rows: Sequence[Measured]  # flat, teacher, student
    stage: Stage  # the run
    pairs: Mapping[str, Sequence[Pair]]  # the photographs with their edges: "test", "train"
    generators: Mapping[str, nn.Module]  # teacher, student
    printed: Mapping[str, Cost]  # the paper's own networks
    config: RunConfig
    tiles: Mapping[str, int]  # how many, by split
    recipe: Recipe  # of the photographs
    printed_pairs: int  # that the paper's own experiment trains on
    command: str  # that made the page

    @property
    def method(self) -> DistilledGANConfig:
        method = self.config.method
        assert isinstance(method, DistilledGANConfig)
        return method

    @property
    def names(self) -> dict[str, list[str]]:
        """The photographs by split."""
        return {split: list(dict.fromkeys(pair.name for pair in pairs)) for split, pairs in self.pairs.items()}


def gan_demo_page(story: Story) -> Page:
    """The GAN demo's page."""
    teacher, student = story.rows[1:]
    lead = (
        f"The edges of a photograph go in, a photograph is to come out. A teacher of {teacher.cost.params:,} "
        f"parameters learns it from pairs; a student of {student.cost.params:,}, "
        f"{ratio(teacher.cost.params, student.cost.params)} times fewer, learns beside it, from the teacher and the "
        "discriminator that judges both. The command that made this page trained them for "
        f"{story.stage.result['steps']:,} steps."
    )
    return Page(
        title="Photographs from their edges",
        kicker="hpcdistill demo: paired image translation, FESD-Pix2Pix in miniature",
        lead=lead,
        sections=(
            Section("", (_cards(story.rows), Text(_caution(story), tone="caution"))),
            Section("Photographs that were not trained on", (Text((_places(),)), *_pictures(story, "test"))),
            Section("Photographs that were trained on", (Text((_seen(story),)), *_pictures(story, "train"))),
            Section("What was measured", (_results(story), _by_tile(story), _costs(story))),
            Section("How the training went", (_charts(story),)),
            Section("How it was made", (_facts(story), _commands(story))),
        ),
        footer=f"Made by `{story.command}` of hpcdistill. This page needs no network and no other file.",
    )


def _cards(rows: Sequence[Measured]) -> Cards:
    flat, teacher, student = rows
    size = f"{ratio(teacher.cost.params, student.cost.params)}x"
    return Cards(
        (
            *(
                Card(
                    TITLES[row.name],
                    f"{row.psnr:.2f}",
                    "dB",
                    "the baseline: nothing is learned" if row is flat else compared(row, flat),
                    SERIES[row.name],
                )
                for row in rows
            ),
            Card("Smaller", size, "", f"{teacher.cost.params:,} parameters against {student.cost.params:,}"),
        )
    )


def _caution(story: Story) -> tuple[str, ...]:
    """What such numbers and pictures are worth."""
    names = story.names
    result = story.stage.result
    words = " ".join(verdict(story.rows, result["steps"], (len(names["train"]), len(names["test"]))))
    full = round(story.printed_pairs * story.config.train.epochs)
    seen = result["steps"] * result["batch_size"]
    why = (
        "What a drawing does not say, such as the colour of an empty place, can only be guessed; six photographs of "
        f"other things are no help. The paper's recipe shows its networks {full:,} pairs of 256x256 pixels, this one "
        f"showed {seen:,} of {story.config.data.crop}x{story.config.data.crop}."
    )
    why += (
        " The style and the feature loss compare the student's picture with the teacher's in the eyes of a VGG16. The "
        "paper's was trained on ImageNet, a download of 528 MB; this one has random filters and was never trained. It "
        "tells pictures apart, not what matters in them, and the feature loss has ten times the paper's weight, for so "
        "few steps."
    )
    return (words, why)


def _places() -> str:
    return (
        "Three views of each photograph: all of it, translated in one piece (multiples of 32 pixels fit), then the "
        "tile with the most edges and the one with the fewest, chosen by rule and not by eye. Every pixel is "
        "magnified as it is. The PSNR below a tile is that tile's."
    )


def _seen(story: Story) -> str:
    names = story.names["train"]
    return (
        f"{' and '.join(names[:TRAINED_SHOWN])}, the first of the {len(names)} that were trained on: the gap to the "
        "pictures above is what was learned by heart."
    )


def _pictures(story: Story, split: str) -> tuple[Crops, ...]:
    if split == "test":
        return tuple(_photograph(story, pair, PLACES) for pair in story.pairs["test"])
    smallest: dict[str, Pair] = {}
    for pair in story.pairs["train"]:
        smallest.setdefault(pair.name, pair)
    return tuple(_photograph(story, pair, PLACES[:1]) for pair in list(smallest.values())[:TRAINED_SHOWN])


def _photograph(story: Story, pair: Pair, places: Sequence[str]) -> Crops:
    """A photograph and its places: what is given, what teacher and student make of it, and what it was."""
    size = TILE["test"]
    boxes = [box for _, box in pair.tiles(size)]
    by_place = dict(zip(PLACES, (_around(boxes), *_extremes(pair, boxes)), strict=True))
    known = {name: number for number, name in enumerate(tile["name"] for tile in story.rows[0].per_tile)}
    tile_of = {box: name for name, box in pair.tiles(size)}
    views = []
    for place in places:
        box = by_place[place]
        edges, photograph = _cut(pair.edges, box), _cut(pair.photograph, box)
        where = f"{pair.name}, {place}"
        crops = [Crop("Edges", edges, f"{box[3]} x {box[2]} pixels", f"{where}: its edges")]
        for row in story.rows[1:]:
            number = known.get(tile_of.get(box, ""))
            note = "" if number is None else f"{row.per_tile[number]['psnr']:.2f} dB"
            picture = translated(story.generators[row.name], edges)
            crops.append(Crop(TITLES[row.name], picture, note, f"{where}: {TITLES[row.name]}", SERIES[row.name]))
        crops.append(Crop("Photograph", photograph, "what it was", f"{where}: the photograph"))
        views.append(View(place, box, tuple(crops)))
    height, width = pair.photograph.shape[:2]
    note = f"shrunk to {width} x {height} pixels; {len(boxes)} tiles of {size} x {size}"
    return Crops(
        pair.name, pair.photograph, f"The photograph {pair.name}; boxes mark what is below", tuple(views), note
    )


def _around(boxes: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The box around tiles that lie side by side: a multiple of a tile, so that any number of levels fits."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def _extremes(
    pair: Pair, boxes: Sequence[tuple[int, int, int, int]]
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The tiles with the most and the least ink."""
    by_ink = sorted(boxes, key=lambda box: int(_cut(pair.edges, box).sum(dtype=np.int64)))
    return by_ink[0], by_ink[-1]


def _cut(picture: Image, box: tuple[int, int, int, int]) -> Image:
    top, left, height, width = box
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def _results(story: Story) -> Table:
    crop = story.config.data.crop
    return Table(
        caption=f"Mean of {len(story.rows[0].per_tile)} tiles of photographs that were not trained on",
        columns=("Generator", "PSNR [dB]", "to one flat colour"),
        rows=tuple(
            Row(
                (
                    TITLES[row.name],
                    f"{row.psnr:.2f}",
                    "-" if row is story.rows[0] else f"{row.psnr - story.rows[0].psnr:+.2f}",
                ),
                SERIES[row.name],
            )
            for row in story.rows
        ),
        note=f"PSNR on RGB of 8 bits, tiles of {crop}x{crop}, the last weights of the run. One flat colour: the mean "
        "of all pixels trained on, whatever is given. PSNR is a poor judge of a picture that was guessed; the "
        "literature's FID needs thousands of pictures to mean anything and is left out here.",
    )


def _by_tile(story: Story) -> Table:
    """PSNR by photograph: the mean of its tiles."""
    names = story.names["test"]

    def mean(row: Measured, name: str) -> str:
        values = [tile["psnr"] for tile in row.per_tile if tile["name"].startswith(f"{name}-")]
        return f"{sum(values) / len(values):.2f}"

    return Table(
        caption="By photograph, the mean of its tiles [dB]",
        columns=("Generator", *names),
        rows=tuple(
            Row((TITLES[row.name], *(mean(row, name) for name in names)), SERIES[row.name]) for row in story.rows
        ),
    )


def _costs(story: Story) -> Table:
    costs = {row.name: row.cost for row in story.rows[1:]} | dict(story.printed)
    return Table(
        caption="What the networks cost, for an image of 256x256",
        columns=("Generator", "Parameters", "MACs", "MACs it truly takes"),
        rows=tuple(
            Row(
                (TITLES[name], f"{cost.params:,}", f"{cost.macs / 1e9:.3f} G", f"{cost.true_macs / 1e9:.3f} G"),
                SERIES.get(name),
            )
            for name, cost in costs.items()
        ),
        note="The last two are of the paper's experiment, for scale: its student has one sixteenth of the parameters "
        "of Pix2Pix's generator, which is also its teacher. The literature's rule charges a transposed convolution at "
        "its output's size; the last column does not.",
    )


def _charts(story: Story) -> Charts:
    curve = story.stage.curve
    flat = story.rows[0]
    both = (("teacher", SERIES["teacher"]), ("student", SERIES["student"]))
    judged = (
        ("real", "photographs", _REAL),
        ("fake", "the teacher's", SERIES["teacher"]),
        ("fake_student", "the student's", SERIES["student"]),
    )

    def lines(*wanted: tuple[str, str, int]) -> tuple[Line, ...]:
        found = (Line(label, series, curve(key)) for key, label, series in wanted)
        return tuple(line for line in found if line.points)

    def losses(title: str, terms: tuple[Line, ...], note: str, log_y: bool = False) -> Chart:
        return Chart(title=title, x_label="step", y_label="loss", lines=terms, digits=4, note=note, log_y=log_y)

    weights = story.method
    charts = (
        Chart(
            title="PSNR on the tiles not trained on",
            x_label="step",
            y_label="PSNR [dB]",
            lines=lines(*((f"{role}/tiles/psnr", TITLES[role], series) for role, series in both)),
            levels=(Line(TITLES["flat"], SERIES["flat"], ((0.0, flat.psnr),)),),
            note="The numbers above are the last point of each curve; to choose the best one would be to choose by the "
            "test photographs.",
        ),
        losses(
            "The teacher's distance from the photograph",
            lines(("teacher/reconstruction", "reconstruction", SERIES["teacher"])),
            f"Mean absolute error, weight {weights.weight_reconstruction:g}. The student is never shown a photograph.",
        ),
        losses(
            "Fooling the discriminator",
            lines(*((f"{role}/gan", TITLES[role], series) for role, series in both)),
            "The adversarial loss of each generator (hinge: below zero, the discriminator takes its pictures for "
            "photographs).",
        ),
        losses(
            "The student's picture and the teacher's",
            lines(("student/style", "L_sty", 5), ("student/feature", "L_feat", 6)),
            f"In the eyes of the untrained VGG16: style (weight {weights.weight_style:g}) and feature (weight "
            f"{weights.weight_feature:g}).",
        ),
        losses(
            "The student's feature maps and the teacher's",
            lines(("student/dcd", "L_dcd", SERIES["student"]), ("student/spectral", "L_spectral", _SPECTRAL)),
            f"In the eyes of the discriminator (L_dcd, weight {weights.weight_dcd:g}) and of the spectral classifier "
            f"(L_spectral, weight {weights.weight_spectral:g}), after the partial channel shift.",
            log_y=True,
        ),
        losses(
            "The discriminator's loss",
            lines(*((f"discriminator/{key}", label, series) for key, label, series in judged)),
            "On photographs and on what the generators make of the same edges.",
        ),
        losses(
            "The spectral classifier's loss",
            lines(*((f"discriminator/spectral_{key}", label, series) for key, label, series in judged)),
            "The same, judged by the radial spectrum alone.",
        ),
    )
    return Charts(tuple(chart for chart in charts if chart.lines))


def _facts(story: Story) -> Facts:
    config, method, result, session = story.config, story.method, story.stage.result, story.stage.session
    names, crop = story.names, config.data.crop
    shift = method.shift
    device = result["device"]
    facts = (
        ("Trained on", f"{story.tiles['train']} tiles of {', '.join(names['train'])}; from {story.recipe.origin}"),
        (
            "Tiles",
            f"{TILE['train']} x {TILE['train']} pixels to train on, of photographs shrunk to a shorter side of "
            f"{', '.join(map(str, SHORT_SIDES['train']))} pixels ({', '.join(OF_SCIENCE)}: "
            f"{SHORT_SIDES['train'][0]} only); {TILE['test']} x {TILE['test']}, of {SHORT_SIDES['test'][0]}, to test",
        ),
        ("Measured on", f"{story.tiles['test']} tiles of {', '.join(names['test'])}; from {story.recipe.origin}"),
        ("Licence", story.recipe.licence),
        ("Edges", "strength of the luma's edges (Sobel), dark on white"),
        (
            "Networks",
            f"U-Nets of {method.teacher.levels} levels, base width {method.teacher.ngf} (teacher) and "
            f"{method.student.ngf} (student); PatchGAN of base width {method.ndf}, "
            f"{method.discriminator_strides} strided layer{'s' if method.discriminator_strides > 1 else ''}",
        ),
        (
            "Losses",
            f"adversarial (hinge, weight of the student {method.weight_student:g}); teacher: L1 x "
            f"{method.weight_reconstruction:g}; student: L_sty x {method.weight_style:g}, L_feat x "
            f"{method.weight_feature:g}, L_dcd x {method.weight_dcd:g}, L_spectral x {method.weight_spectral:g}",
        ),
        (
            "Partial channel shift",
            f"{shift.mode}, rate {shift.rate:g}, step {shift.step}, {shift.place} the projection",
        ),
        (
            "Training",
            f"{result['steps']:,} steps of {result['batch_size']} crops of {crop} x {crop} pixels; "
            f"Adam, learning rate {method.optimizer.learning_rate:g}; {clock(result['seconds'])}",
        ),
        ("Seed", str(result["seed"])),
        ("Hardware", session["cpu"] if device == "cpu" else f"{device}; {session['cpu']}"),
        ("Precision", result["precision"]),
        ("Software", ", ".join(f"{name} {version}" for name, version in session["packages"].items())),
        ("Code revision", str(result["revision"] or "not a git clone")),
    )
    return Facts(facts)


def _commands(story: Story) -> Commands:
    return Commands(
        (
            ("This page", story.command),
            ("The training alone, once the pairs are made", story.stage.command),
            (
                "The paper's own experiment, on one GPU",
                "python -m hpcdistill.train configs/fesd/edges2shoes.yaml",
            ),
        )
    )
